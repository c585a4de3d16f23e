"""Killed or signalled at random instants and started again by the same call, a run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the trials fork their training processes"),
    pytest.mark.timeout(3600),
]
TRIALS = int(os.environ.get("TRIALS", "300"))


def trials(folder: Path, seed: int, *, variables: dict[str, str] | None = None, **numbers: int) -> None:
    """So many trials of each kind; all of them must end well."""
    asked = [f"{what}={number}" for what, number in numbers.items()]
    command = [sys.executable, str(Path(__file__).with_name("trials.py")), str(folder), str(seed), *asked]
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | (variables or {})
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    for (what, number), line in zip(numbers.items(), done.stdout.splitlines(), strict=True):
        count: dict[str, int] = json.loads(line)
        assert count["failed"] == 0, done.stderr
        assert count["hit"] >= number / 2  # else they came too late to mean anything
        assert count["equal"] == count["tidy"] == number, count
        assert what == "kill" or number < 50 or count["preempted"] > number / 8  # of a few, all may come before the first step


@pytest.fixture
def elsewhere(tmp_path: Path) -> Any:
    """A temporary directory on another file system, as node-local /tmp is on a cluster."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield folder


def test_killed_and_signalled(tmp_path: Path) -> None:
    trials(tmp_path, 1, kill=20, signal=5)


@pytest.mark.slow
def test_killed_many_times(tmp_path: Path) -> None:
    trials(tmp_path, 3, kill=TRIALS)


@pytest.mark.slow
def test_signalled_many_times(tmp_path: Path) -> None:
    trials(tmp_path, 4, signal=TRIALS)


@pytest.mark.slow
def test_killed_with_temporary_files_on_another_file_system(tmp_path: Path, elsewhere: str) -> None:
    trials(tmp_path, 5, kill=20, variables={"TMPDIR": elsewhere})


def test_it_would_notice_a_difference(tmp_path: Path) -> None:
    """Negative control: one bit of the reference's last checkpoint is another run."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import trials as module
    finally:
        sys.path.pop(0)
    module.train(tmp_path, "a")
    one, other = module.final(tmp_path, "a"), module.final(tmp_path, "a")
    assert module.equal(one, other)
    weight = next(iter(other["model"].values())).view(-1)
    weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    assert not module.equal(one, other)
