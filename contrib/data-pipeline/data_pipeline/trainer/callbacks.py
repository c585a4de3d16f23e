"""The callback interface and the built-in callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_pipeline.trainer.lazy import reexport

if TYPE_CHECKING:
    from drivetrain import (
        Callback,
        CallbackContext,
        CheckpointCallback,
        EarlyStoppingCallback,
        LoggingCallback,
        ProgressCallback,
    )

__all__ = [
    "Callback",
    "CallbackContext",
    "CheckpointCallback",
    "EarlyStoppingCallback",
    "LoggingCallback",
    "ProgressCallback",
]

__getattr__ = reexport(__name__, __all__)
