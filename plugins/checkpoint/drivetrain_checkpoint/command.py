"""`drivetrain checkpoint`: look at checkpoints, verify them, compare two. Only comparing needs torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from drivetrain_checkpoint.errors import CheckpointError
from drivetrain_checkpoint.find import DIRECTORY, Checkpoint, find_checkpoints, verify
from drivetrain_checkpoint.looking import checkpoint_lines, manifest_exists, plain, run_lines


class CheckpointCommand:
    """Inspect, verify and compare checkpoints."""

    help = "inspect, verify or compare checkpoints"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare `inspect`, `verify` and `diff`."""
        actions = parser.add_subparsers(metavar="ACTION", required=True)
        for name, action, count, help in (
            ("inspect", _inspect, 1, "what is in a checkpoint: every tensor and value; of a run, its checkpoints"),
            ("verify", _verify, 1, "whether every file is as it was written; exit code 1 when one is not"),
            ("diff", _diff, 2, "where two checkpoints differ; exit code 1 when they do"),
        ):
            one = actions.add_parser(name, help=help, description=f"Say {help}.")
            one.add_argument("paths", metavar="PATH", nargs=count, type=Path, help="a checkpoint, or a run for its newest one")
            one.set_defaults(action=action)

    def run(self, arguments: argparse.Namespace) -> int:
        """Print what was asked for."""
        return int(arguments.action(*arguments.paths))


def _inspect(path: Path) -> int:
    lines = checkpoint_lines(path) if manifest_exists(path) else run_lines(path, _of_run(path))
    for line in lines:
        print(line)
    return 0


def _verify(path: Path) -> int:
    paths = [path] if manifest_exists(path) or not _is_run(path) else [c.path for c in _of_run(path)]
    bad = 0
    for one in paths:
        problems = verify(one)
        bad += bool(problems)
        print(f"{plain(one)}: {'damaged' if problems else 'whole'}")
        for problem in problems:
            print(f"  {plain(problem)}")
    return 1 if bad else 0


def _diff(first: Path, second: Path) -> int:
    from drivetrain_checkpoint.difference import differences
    from drivetrain_checkpoint.store import read_checkpoint

    count = 0
    for count, line in enumerate(differences(read_checkpoint(_one(first)), read_checkpoint(_one(second))), start=1):
        if count == 1:
            print(f"{plain(first)} and {plain(second)} differ, first at {line.split(': ')[0]}")
        print(f"  {line}")
    print(f"{count} differences" if count != 1 else "1 difference", file=sys.stdout)
    return 1 if count else 0


def _is_run(path: Path) -> bool:
    return path.name == DIRECTORY or (path / DIRECTORY).is_dir()


def _of_run(path: Path) -> list[Checkpoint]:
    """The checkpoints of a run, which may be named by its directory or by the one that holds them."""
    found = find_checkpoints(path.absolute().parent if path.name == DIRECTORY else path) if _is_run(path) else []
    if not found:
        raise CheckpointError(f"{path}: this is neither a checkpoint nor a run with checkpoints")
    return found


def _one(path: Path) -> Path:
    """The checkpoint that is meant: itself, or a run's newest."""
    return path if manifest_exists(path) else _of_run(path)[0].path
