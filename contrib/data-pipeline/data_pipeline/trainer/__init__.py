"""The training module of the data_pipeline framework: Drivetrain under its documented names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_pipeline.trainer.lazy import reexport

if TYPE_CHECKING:
    from drivetrain import (
        Callback,
        CallbackContext,
        CheckpointCallback,
        DeviceManager,
        EarlyStoppingCallback,
        GradientSynchronizer,
        LoggingCallback,
        ProgressCallback,
        Trainer,
        TrainingConfig,
        TrainingMode,
        get_pretraining_config,
        get_qlora_config,
        load_training_config,
    )

__all__ = [
    "Callback",
    "CallbackContext",
    "CheckpointCallback",
    "DeviceManager",
    "EarlyStoppingCallback",
    "GradientSynchronizer",
    "LoggingCallback",
    "ProgressCallback",
    "Trainer",
    "TrainingConfig",
    "TrainingMode",
    "get_pretraining_config",
    "get_qlora_config",
    "load_training_config",
]

__getattr__ = reexport(__name__, __all__)
