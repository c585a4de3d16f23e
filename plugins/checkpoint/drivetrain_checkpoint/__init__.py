"""Checkpoints of Drivetrain runs: verified, pickle-free transactions.

Each public name is imported when it is first used, so that looking at a checkpoint from the shell does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drivetrain_checkpoint.callback import CheckpointCallback as CheckpointCallback
    from drivetrain_checkpoint.errors import CheckpointError as CheckpointError
    from drivetrain_checkpoint.errors import CheckpointFailure as CheckpointFailure
    from drivetrain_checkpoint.files import Files as Files
    from drivetrain_checkpoint.find import Checkpoint as Checkpoint
    from drivetrain_checkpoint.find import find_checkpoints as find_checkpoints
    from drivetrain_checkpoint.find import verify as verify
    from drivetrain_checkpoint.format import Tree as Tree
    from drivetrain_checkpoint.store import Store as Store
    from drivetrain_checkpoint.store import read_checkpoint as read_checkpoint
    from drivetrain_checkpoint.store import write_checkpoint as write_checkpoint

_HOME = {
    "Checkpoint": "find",
    "CheckpointCallback": "callback",
    "CheckpointError": "errors",
    "CheckpointFailure": "errors",
    "Files": "files",
    "Store": "store",
    "Tree": "format",
    "find_checkpoints": "find",
    "read_checkpoint": "store",
    "verify": "find",
    "write_checkpoint": "store",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value
