"""Hyperparameters, their files and presets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_pipeline.trainer.lazy import reexport

if TYPE_CHECKING:
    from drivetrain import TrainingConfig, TrainingMode, get_pretraining_config, get_qlora_config, load_training_config

__all__ = [
    "TrainingConfig",
    "TrainingMode",
    "get_pretraining_config",
    "get_qlora_config",
    "load_training_config",
]

__getattr__ = reexport(__name__, __all__)
