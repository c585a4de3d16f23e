"""Which checkpoints there are, and whether one is whole. Nothing here needs torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

from attrs import frozen

from drivetrain_checkpoint.errors import CheckpointError
from drivetrain_checkpoint.manifest import check_files, read_manifest

DIRECTORY = "checkpoints"
_FINAL = re.compile(r"step-(\d{8,})(?:-(\d+))?")


@frozen
class Checkpoint:
    """A directory that should be a checkpoint, judged by its manifest alone: `problem` says why it is none, or is empty."""

    path: Path
    step: int = -1
    problem: str = ""

    @property
    def is_named_by_its_step(self) -> bool:
        """Whether the directory's name and the recorded step agree; renamed checkpoints are as good as any."""
        match = _FINAL.fullmatch(self.path.name)
        return match is not None and int(match[1]) == self.step


def find_checkpoints(run_dir: str | os.PathLike[str]) -> list[Checkpoint]:
    """The checkpoints of a run, the newest step first; those without a believable manifest last. File contents are not read."""
    root = Path(run_dir) / DIRECTORY
    try:
        entries = [entry for entry in os.scandir(root) if _FINAL.fullmatch(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be searched for checkpoints: {error.strerror or error}") from error
    found = [_look(root / entry.name) for entry in entries]
    return sorted(found, key=lambda c: (-c.step, -_serial(c.path), c.path.name))


def verify(path: str | os.PathLike[str]) -> list[str]:
    """Everything that is wrong with a checkpoint; an empty list when all of it is as it was written."""
    directory = Path(path)
    try:
        return check_files(directory, read_manifest(directory))
    except CheckpointError as error:
        return [str(error)]


def _serial(path: Path) -> int:
    """Which of the checkpoints of one step this is, in the order of their saving."""
    match = _FINAL.fullmatch(path.name)
    return int(match[2]) if match and match[2] else 0


def _look(path: Path) -> Checkpoint:
    try:
        return Checkpoint(path, read_manifest(path).step)
    except CheckpointError as error:
        return Checkpoint(path, problem=str(error))
