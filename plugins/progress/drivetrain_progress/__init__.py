"""A progress bar over the run, or plain lines where there is no terminal."""

from __future__ import annotations

from drivetrain_progress.callback import ProgressCallback

__all__ = ["ProgressCallback"]
