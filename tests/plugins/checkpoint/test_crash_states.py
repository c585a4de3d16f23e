"""Every state that a crash can leave: from each of them the newest committed checkpoint is found, whole.

The file operations of a few saves and rotations are recorded through the seam, then replayed up to every point, with what was
not durable by then kept, torn or lost. A checkpoint is committed when `save` returned: from then on it may not be lost, unless
a newer committed one has taken its place.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain_checkpoint import CheckpointError, Files, Store, find_checkpoints
from drivetrain_checkpoint.format import unpack
from drivetrain_checkpoint.store import load_newest

Operation = tuple[str, tuple[Any, ...]]  # ("write", (path, data)), ("rename", (source, target)), …, ("committed", (step,))
NAMES = ("mkdir", "write", "rename", "remove", "rmdir")  # operations on names: durable when their directory is


class Recorder(Files):
    """Carries the operations out, and notes them with paths relative to the run's directory."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.operations = run_dir, [("mkdir", (Path(run_dir.name),))]  # by the engine, and not durable

    def note(self, name: str, *paths: Path) -> None:
        self.operations.append((name, tuple(path.relative_to(self.run_dir.parent) for path in paths)))

    def mkdir(self, path):
        super().mkdir(path)
        self.note("mkdir", path)

    def write(self, path, chunks):
        data = b"".join(bytes(chunk) for chunk in chunks)
        super().write(path, (data,))
        self.operations.append(("write", (path.relative_to(self.run_dir.parent), data)))

    def fsync(self, path):
        self.note("fsync", path)

    def fsync_dir(self, path):
        self.note("fsync_dir", path)

    def rename(self, source, target):
        super().rename(source, target)
        self.note("rename", source, target)

    def remove(self, path):
        super().remove(path)
        self.note("remove", path)

    def rmdir(self, path):
        super().rmdir(path)
        self.note("rmdir", path)


@cache
def tree(step: int) -> dict[str, Any]:
    torch.manual_seed(step)
    return {"model": {"w": torch.randn(40, 30)}, "optimizer": {"m": torch.randn(5)}, "step": step}


def record(run_dir: Path, keep_last: int, rotate_first: bool = False) -> list[Operation]:
    """Four saves, each with its rotation."""
    files = Recorder(run_dir)
    store = Store(run_dir, files)
    for step in (1, 2, 3, 4):
        if rotate_first and step > 1:  # the mistake of case 38, one checkpoint less being kept
            for old in find_checkpoints(run_dir):
                store._remove([old.path])
        path = store.save(tree(step), step)
        files.operations.append(("committed", (step,)))
        store.rotate(keep_last, keep={path})
    return files.operations


def torn(data: bytes) -> list[bytes]:
    """What may be left of content that was not durable."""
    zeroed = [
        data[:start] + bytes(len(data[start : start + 4096])) + data[start + 4096 :] for start in range(0, len(data), 4096)
    ]
    return [b"", data[:1], data[: len(data) // 2], data[:-1], data[: len(data) // 4096 * 4096], *zeroed]


def crash_states(operations: list[Operation], bound: int) -> Iterator[tuple[str, list[Operation], int]]:
    """Each as (description, the operations that reached the disk, the last committed step).

    After every prefix: any subset of at most `bound` of the names that were not durable yet, or all of them, has not reached the
    disk although later ones have; in each such state any file that was not durable yet is whole or torn.
    """
    for end in range(len(operations) + 1):
        done = operations[:end]
        committed = max((paths[0] for name, paths in done if name == "committed"), default=0)
        pending = list(_pending(done))
        sizes = sorted({*range(min(bound, len(pending)) + 1), len(pending)})
        for lost in (set(subset) for size in sizes for subset in itertools.combinations(pending, size)):
            for what, reached in _tears(done):
                yield f"{end} lost {sorted(lost)} {what}", [o for i, o in enumerate(reached) if i not in lost], committed


def _tears(done: list[Operation]) -> Iterator[tuple[str, list[Operation]]]:
    """The operations as they are, with the content of each file in turn torn that was not durable by then, and of each two."""
    yield "", done
    durable = {paths[0] for name, paths in done if name == "fsync"}
    open_ones = [i for i, (name, content) in enumerate(done) if name == "write" and content[0] not in durable]
    for pair in itertools.combinations(open_ones, 2):
        for keep in (0, 2):  # of each two: nothing, or the first half
            cut = {i: ("write", (done[i][1][0], done[i][1][1][: len(done[i][1][1]) // 2 if keep else 0])) for i in pair}
            yield f"two torn {pair} {keep}", [cut.get(i, operation) for i, operation in enumerate(done)]
    for index, (name, content) in enumerate(done):
        if name == "write" and content[0] not in durable:
            for number, data in enumerate(torn(content[1])):
                yield f"torn {content[0].name} {number}", [*done[:index], (name, (content[0], data)), *done[index + 1 :]]


def _pending(done: list[Operation]) -> Iterator[int]:
    """The operations on names whose directory has not been made durable since."""
    for index, (name, paths) in enumerate(done):
        if name in NAMES:
            parents = {path.parent for path in paths if isinstance(path, Path)}
            later = {p[0] for n, p in done[index:] if n == "fsync_dir"}
            if not parents <= later:
                yield index


def simulate(operations: list[Operation]) -> dict[Path, bytes | None]:
    """The files and (None) directories afterwards. What needs a name that is not there does not happen."""
    disk: dict[Path, bytes | None] = {Path("."): None}
    for name, content in operations:
        path = content[0]
        if name in ("write", "mkdir") and path.parent in disk:
            disk[path] = content[1] if name == "write" else None
        elif name == "rename" and path in disk:
            for old in [p for p in disk if p.is_relative_to(path)]:
                disk[content[1] / old.relative_to(path)] = disk.pop(old)
        elif (name == "remove" and path in disk) or (name == "rmdir" and path in disk and not _inside(path, disk)):
            del disk[path]
    return disk


def _inside(directory: Path, disk: dict[Path, Any]) -> bool:
    return any(path.parent == directory for path in disk)


def materialise(disk: dict[Path, bytes | None], root: Path, present: dict[Path, bytes | None]) -> None:
    """Make a directory hold what a crash left; `present` is what it holds, and only the difference is written."""
    for path in sorted(present, reverse=True):
        if path not in disk or (disk[path] is None) != (present[path] is None):
            (root / path).rmdir() if present.pop(path) is None else (root / path).unlink()
    for path in sorted(disk):
        if path not in present or present[path] != disk[path]:
            data = disk[path]
            (root / path).mkdir() if data is None else (root / path).write_bytes(data)
    present.clear()
    present.update(disk)


def failures(
    operations: list[Operation],
    root: Path,
    load: Callable[[Path], Any],
    diff: Any,
    bound: int = 1,
    count: list[int] | None = None,
) -> Iterator[str]:
    """The states in which the newest committed checkpoint, or a newer one, is not loaded as it was saved."""
    seen, present = set(), {}
    for what, reached, committed in crash_states(operations, bound):
        disk = simulate(reached)
        state = (committed, frozenset(disk.items()))
        if state in seen:
            continue
        seen.add(state)
        materialise(disk, root, present)
        try:
            loaded = load(root / "run")
        except (CheckpointError, OSError) as error:
            yield f"{what}: {error}"
            continue
        step = 0 if loaded is None else loaded["step"]
        if step < committed or (step and diff(tree(step), loaded)):
            yield f"{what}: step {step} after {committed}"
    if count is not None:
        count.append(len(seen))


def load(run_dir: Path) -> Any:
    loaded, _ = load_newest(run_dir)
    if loaded is not None:
        assert loaded.tree["step"] == loaded.step
    return loaded and loaded.tree


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory where there is one: thousands of states are written."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        yield Path(name)


_SLOW = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("keep_last", "bound", "least"),
    [(1, 2, 2000), pytest.param(1, 5, 20000, marks=_SLOW), pytest.param(2, 5, 2000, marks=_SLOW)],
)
def test_no_crash_loses_a_committed_checkpoint(memory, diff, keep_last, bound, least):
    (memory / "run").mkdir()
    operations, count = record(memory / "run", keep_last), []
    began = time.process_time()
    assert list(failures(operations, memory / "replay", load, diff, bound, count)) == []
    assert count[0] >= least
    if least == 2000 and bound == 2:
        assert time.process_time() - began < 60  # of this process alone: the machine may be busy


def crashed_twice(
    memory: Path, quick: Files, operations: list[Operation], every: int
) -> Iterator[tuple[str, list[Operation], int]]:
    """After each crash of `operations` a second process cleans up, saves and rotates, and crashes at every point of that."""
    for end in range(0, len(operations) + 1, every):
        shutil.rmtree(memory / "second", ignore_errors=True)
        materialise(simulate(operations[:end]), memory / "second", {})
        if not (memory / "second" / "run").exists():
            continue
        files = Recorder(memory / "second" / "run")
        store = Store(memory / "second" / "run", files)
        store.clean()
        path = store.save(tree(5), 5)
        files.operations.append(("committed", (5,)))
        store.rotate(1, keep={path})
        more = files.operations[1:]
        for second in range(len(more) + 1):
            done = [*operations[:end], *more[:second]]
            yield f"{end} then {second}", done, max((paths[0] for name, paths in done if name == "committed"), default=0)


@pytest.mark.parametrize(("every", "least"), [(4, 150), pytest.param(1, 600, marks=_SLOW)])
def test_a_second_crash_while_cleaning_up_loses_nothing_either(memory, diff, quick, every, least):
    (memory / "run").mkdir()
    operations, present, count = record(memory / "run", keep_last=1), {}, 0
    for what, done, committed in crashed_twice(memory, quick, operations, every):
        materialise(simulate(done), memory / "replay", present)
        if (memory / "replay" / "run").exists():
            loaded = load(memory / "replay" / "run")
            step = 0 if loaded is None else loaded["step"]
            assert step >= committed and (not step or diff(tree(step), loaded) == []), what
            count += 1
    assert count >= least


def test_after_any_crash_the_next_start_cleans_up_and_goes_on(tmp_path, diff, quick):
    (tmp_path / "run").mkdir()
    operations = record(tmp_path / "run", keep_last=1)
    for end in range(len(operations) + 1):
        shutil.rmtree(tmp_path / "replay", ignore_errors=True)
        materialise(simulate(operations[:end]), tmp_path / "replay", {})
        run = tmp_path / "replay" / "run"
        store = Store(run, quick)
        store.clean()
        path = store.save(tree(5), 5)
        store.rotate(1, keep={path})
        assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000005"], end
        assert diff(tree(5), load(run)) == []


def trusting(run_dir: Path) -> Any:
    """A reader as most are: the directory with the greatest number, unverified."""
    found = sorted((run_dir / "checkpoints").glob("step-*")) if (run_dir / "checkpoints").exists() else []
    return unpack(found[-1], ["model.safetensors", "state.safetensors"]) if found else None


def without(*names: str) -> Callable[[list[Operation]], list[Operation]]:
    return lambda operations: [operation for operation in operations if operation[0] not in names]


def renamed_before_the_manifest(operations: list[Operation]) -> list[Operation]:
    """The final name given right after the directory was made, as by a writer that writes in place."""
    early = {}
    result = []
    for name, content in operations:
        if name == "rename" and ".drivetrain-saving" in content[0].name:
            early[content[0]] = content[1]
    for name, content in operations:
        if name == "rename" and content[0] in early:
            continue
        moved = tuple(_moved(part, early) for part in content)
        result.append((name, moved))
    return result


def _moved(part: Any, early: dict[Path, Path]) -> Any:
    if not isinstance(part, Path):
        return part
    return next((target / part.relative_to(source) for source, target in early.items() if part.is_relative_to(source)), part)


def moved_across_devices(operations: list[Operation]) -> list[Operation]:
    """What a move from another file system is: copies at the final place, and the originals removed."""
    result: list[Operation] = []
    for name, content in operations:
        if name == "rename" and ".drivetrain-saving" in content[0].name:
            source, target = content
            copied = [(n, (target / c[0].name, c[1])) for n, c in result if n == "write" and c[0].parent == source]
            result += [
                ("mkdir", (target,)),
                *copied,
                *[("remove", (source / c[0].name,)) for _, c in copied],
                ("rmdir", (source,)),
            ]
        else:
            result.append((name, content))
    return result


CONTROLS = {
    "without fsync of files": (without("fsync"), load, False),
    "without fsync of directories": (without("fsync_dir"), load, False),
    "old ones removed first": (lambda operations: operations, load, True),
    "renamed before the manifest": (renamed_before_the_manifest, load, False),
    "renamed before the manifest, read as others do": (renamed_before_the_manifest, trusting, False),
    "temporary on another device": (moved_across_devices, load, False),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_control_the_enumeration_finds_wrong_orders(tmp_path, diff, name):
    change, reader, rotate_first = CONTROLS[name]
    (tmp_path / "run").mkdir()
    operations = change(record(tmp_path / "run", keep_last=1, rotate_first=rotate_first))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert next(failures(operations, tmp_path / "replay", reader, diff))


def test_verification_makes_even_writing_in_place_safe(tmp_path, diff):
    """What the manifest alone is worth: the same order of operations, read with verification."""
    (tmp_path / "run").mkdir()
    operations = renamed_before_the_manifest(record(tmp_path / "run", keep_last=2))
    bad = failures(operations, tmp_path / "replay", load, diff)
    assert [what for what in bad if "none of its checkpoints" not in what] == []  # the first one, half written: said, not lost
