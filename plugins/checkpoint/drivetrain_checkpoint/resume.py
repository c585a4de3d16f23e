"""Which checkpoint a run goes on from."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from drivetrain_checkpoint.errors import CheckpointError
from drivetrain_checkpoint.find import DIRECTORY, find_checkpoints
from drivetrain_checkpoint.manifest import MANIFEST_FILE
from drivetrain_checkpoint.store import Loaded, load_checkpoint, load_newest

if TYPE_CHECKING:
    from drivetrain import CallbackContext


@frozen
class Choice:
    """A checkpoint that has been read and found whole."""

    loaded: Loaded
    origin: str | None = None  # the run or checkpoint elsewhere that `resume` names
    begins: bool = False  # whether the run begins there now; otherwise it must have begun there


def choose(ctx: CallbackContext, rejected: set[Path]) -> Choice | None:
    """What `resume` says; None for a fresh start. Damaged checkpoints found on the way are added to `rejected`."""
    if ctx.resume not in ("auto", "never"):
        return _by_path(ctx.run_dir if ctx.trainer.has_run_dir else None, Path(ctx.resume).expanduser(), rejected)
    if not ctx.trainer.has_run_dir:  # a new run: asking for its directory would make it
        return None
    if ctx.resume == "never":
        _refuse_used(ctx.run_dir)
        return None
    newest = _newest(ctx.run_dir, rejected)
    return None if newest is None else Choice(newest)


def _by_path(own: Path | None, path: Path, rejected: set[Path]) -> Choice:
    """The run or checkpoint that `resume` names; it must be there and be whole."""
    source = (path.parent if path.name == DIRECTORY else path).resolve()
    is_run = (source / DIRECTORY).is_dir()
    if not is_run and not (source / MANIFEST_FILE).exists():
        raise CheckpointError(f"resume: {path} is neither a run with checkpoints nor a checkpoint")
    if own is not None and (source == own.resolve() or source.parent == own.resolve() / DIRECTORY):
        return Choice(_existing(own, rejected) if is_run else _newest_own(source))
    if own is not None and find_checkpoints(own):  # the same command again: this run began there and has come further
        return Choice(_existing(own, rejected), str(source))
    return Choice(_existing(source, rejected) if is_run else load_checkpoint(source), str(source), begins=True)


def _refuse_used(run_dir: Path) -> None:
    if found := find_checkpoints(run_dir):
        raise CheckpointError(
            f"{run_dir} has checkpoints (the newest: {found[0].path.name}), and resume is 'never': two runs would "
            "be mixed up. Give another run_name, or resume = 'auto' to go on, or remove that directory."
        )


def _newest(run_dir: Path, rejected: set[Path]) -> Loaded | None:
    """The newest whole checkpoint; a warning for each one that is not."""
    loaded, damaged = load_newest(run_dir)
    for path, why in damaged.items():
        warnings.warn(f"checkpoint: {path} was rejected: {why}", stacklevel=2)
    rejected |= set(damaged)
    return loaded


def _existing(run_dir: Path, rejected: set[Path]) -> Loaded:
    loaded = _newest(run_dir, rejected)
    if loaded is None:
        raise CheckpointError(f"resume: {run_dir} has no checkpoint")
    return loaded


def _newest_own(path: Path) -> Loaded:
    """A named checkpoint of this very run: the newest only, or two futures would be mixed up."""
    loaded = load_checkpoint(path)
    newer = [c.path.name for c in find_checkpoints(path.parent.parent) if c.step > loaded.step]
    if newer:
        raise CheckpointError(
            f"resume: {path.parent} has checkpoints beyond {path.name}: {', '.join(newer)}. To go back to it, give another "
            "run_name for what follows, or remove those; to go on from the newest, resume = 'auto'."
        )
    return loaded
