"""The errors of this distribution."""

from __future__ import annotations

from drivetrain import DrivetrainError, RunError


class CheckpointError(DrivetrainError):
    """A checkpoint that cannot be written, found, verified or read; the message names the path and the remedy."""


class CheckpointFailure(CheckpointError, RunError):
    """A disk that refuses, or checkpoints that are all damaged: nothing was wrong with what was asked for."""
