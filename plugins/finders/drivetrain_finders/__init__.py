"""Find the learning rate, and the largest microbatch that fits into memory, before a run begins; nothing of it stays."""

from __future__ import annotations

from drivetrain_finders.batch_size import BatchSizeFinderCallback
from drivetrain_finders.learning_rate import LrFinderCallback, suggestion

__all__ = ["BatchSizeFinderCallback", "LrFinderCallback", "suggestion"]
