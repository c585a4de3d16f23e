"""Every state that a crash in a save by two ranks can leave: the newest committed checkpoint is found, whole."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.plugins.checkpoint import cutting
from tests.plugins.checkpoint import test_crash_states as crashes

from drivetrain_checkpoint import Store, find_checkpoints
from drivetrain_checkpoint.format import pack_own
from drivetrain_checkpoint.resharding import Planning
from drivetrain_checkpoint.together import Together, share_of


@cache
def shares(step: int) -> list[Any]:
    """What each of two ranks writes of the state of a step."""
    whole = crashes.tree(step)  # before the threads: it draws from the one random state

    def act(rank, gather):
        packed, parts = pack_own(whole, cutting.Cut(cutting.rows, rank, 2))
        return share_of(packed, Planning().share(parts, rank, gather), rank)

    return [one.result() for one in cutting.together(2, act)]


def record(run_dir: Path, first: int, steps: tuple[int, ...] = (1, 2)) -> list[Any]:
    """Saves with rotation; rank `first` has written all of its files before the other one begins."""
    files = crashes.Recorder(run_dir)
    store = Store(run_dir, files)
    for step in steps:
        directory = store.begin(step)
        zero, one = (Together(Store(run_dir, files) if rank else store, directory, step, rank, 2) for rank in (0, 1))
        mine, others = shares(step)
        if first == 1:
            one.write(others)
            path = zero.write(mine)
        else:  # as `write` of rank 0, with all of rank 1's while it waits
            entries = store.write_part(directory, mine, step)
            one.write(others)
            path = store.commit(directory, step, entries | zero._others())
        files.operations.append(("committed", (step,)))
        store.rotate(1, keep={path})
    return files.operations


@pytest.fixture
def memory() -> Iterator[Path]:
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        (Path(name) / "run").mkdir()
        yield Path(name)


_SLOW = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("first", "bound", "least"),
    [(0, 2, 1000), pytest.param(0, 5, 5000, marks=_SLOW), pytest.param(1, 5, 5000, marks=_SLOW)],
)
def test_no_crash_loses_a_checkpoint_that_all_ranks_have_agreed_on(memory, diff, first, bound, least):
    operations, count = record(memory / "run", first), []
    assert sum(name == "rename" for name, _ in operations) == 2 + 2 + 1  # notes, checkpoints, one rotation
    assert list(crashes.failures(operations, memory / "replay", crashes.load, diff, bound, count)) == []
    assert count[0] >= least


def test_the_next_start_cleans_up_after_any_crash(memory, diff, quick):
    operations = record(memory / "run", 1)
    present: dict[Path, bytes | None] = {}
    for end in range(0, len(operations) + 1, 3):
        crashes.materialise(crashes.simulate(operations[:end]), memory / "replay", present)
        run = memory / "replay" / "run"
        Store(run, quick).clean()
        assert list((run / "checkpoints").glob(".*")) == [], end
        assert all(not found.problem for found in find_checkpoints(run))
        present = {
            p.relative_to(memory / "replay"): None if p.is_dir() else p.read_bytes() for p in (memory / "replay").rglob("*")
        }
        present[Path(".")] = None


CONTROLS = {
    "rank 1 does not make its files durable": lambda name, paths: name != "fsync" or "00001" not in paths[0].name,
    "nobody makes files durable": lambda name, paths: name != "fsync",
    "rank 0 does not make the names durable": lambda name, paths: name != "fsync_dir",
}


@pytest.mark.parametrize("name", CONTROLS)
def test_control_the_enumeration_finds_what_would_lose_one(memory, diff, name):
    operations = [(what, paths) for what, paths in record(memory / "run", 0) if CONTROLS[name](what, paths)]
    assert next(crashes.failures(operations, memory / "replay", crashes.load, diff), None)
