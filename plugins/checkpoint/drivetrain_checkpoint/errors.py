"""The one error of this distribution."""

from __future__ import annotations

from drivetrain import DrivetrainError


class CheckpointError(DrivetrainError):
    """A checkpoint that cannot be written, found, verified or read; the message names the path and the remedy."""
