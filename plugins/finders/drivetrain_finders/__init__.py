"""Find the learning rate, the largest microbatch that fits into memory, or how many data workers it takes, before a run begins."""

from __future__ import annotations

from drivetrain_finders.batch_size import BatchSizeFinderCallback
from drivetrain_finders.learning_rate import LrFinderCallback, suggestion
from drivetrain_finders.workers import WorkersFinderCallback

__all__ = ["BatchSizeFinderCallback", "LrFinderCallback", "WorkersFinderCallback", "suggestion"]
