"""Checkpoints that several processes write together: either one killed at any point of a save, and what memory it takes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("saving.py")
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the trials fork their training processes"),
    pytest.mark.timeout(600),
]


def run(*arguments: object) -> tuple[Any, str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def all_kills() -> list[str]:
    spec = importlib.util.spec_from_file_location("e2e_saving", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.KILLS)


def newest(name: str) -> tuple[int, ...]:
    """The step of the newest checkpoint after a kill in the second save, at step 4: the first one's until rank 0 has renamed."""
    if "has left its note" in name:  # rank 0 has all that it needs, and lives
        return (2, 4)
    return (4,) if any(word in name for word in ("has renamed", "rotates", "removes")) else (2,)


def check(found: Any, said: str) -> None:
    for name, trial in found.items():
        assert trial["killed"], (name, trial, said[-3000:])  # else the point was never reached
        assert trial["newest"] in newest(name), (name, trial)
        assert trial["rejected"] == 0
        assert trial["again"] == [0, 0], (name, said[-3000:])
        assert trial["left"] == ["step-00000006"], (name, trial)
        assert trial["unequal"] == [], (name, trial)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(tmp_path_factory.mktemp("saving"), "rank 1 writes")


def test_a_rank_killed_in_a_save_leaves_a_checkpoint_to_go_on_from(quick: Any) -> None:
    found, said = quick
    check(found["kills"], said)


def test_a_disk_that_refuses_one_rank_is_an_error_or_a_warning_for_all(quick: Any) -> None:
    """The checkpoint before it stays; nothing is left of the one that failed."""
    refusals = quick[0]["refusals"]
    first, second = refusals["raise"]["ranks"]
    assert "on rank 1: " in first["said"] and "step 4 could not be written: No space left on device" in first["said"]
    assert "No space left on device" in second["said"]
    assert first["step"] == second["step"] and 4 <= first["step"] <= 6
    assert refusals["raise"]["left"] == ["step-00000002"]
    assert [(rank["said"], rank["step"]) for rank in refusals["warn"]["ranks"]] == [("", 6), ("", 6)]
    assert [rank["warned"] for rank in refusals["warn"]["ranks"]] == [1, 0]
    assert refusals["warn"]["left"] == ["step-00000002", "step-00000006"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_either_rank_killed_at_every_point_of_a_save(tmp_path: Path) -> None:
    found, said = run(tmp_path, *all_kills())
    check(found["kills"], said)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_no_process_has_more_than_its_own_part_in_memory(quick: Any) -> None:
    """A save copies this rank's part, a load makes room for it; gathering, as a control, takes the whole on rank 0."""
    found = quick[0]["memory"]
    state = 3 * found["weights"]  # and two moments
    slack = 6 << 20
    for rank in found["ranks"]:
        assert rank["saving"] < state / 2 + slack, found
        assert rank["loading"] < state / 2 + slack, found
    assert found["ranks"][0]["gathering"] > 0.9 * state, found
