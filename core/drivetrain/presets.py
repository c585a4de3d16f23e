"""Ready configurations by name, from plugins of the kind `preset`."""

from __future__ import annotations

from typing import Any

from drivetrain.config import TrainingConfig
from drivetrain.errors import PluginError
from drivetrain.registry import find


def get_preset(name: str, model_name: str, **changes: Any) -> TrainingConfig:
    """The configuration that the preset `name` recommends for a model; its values carry the origin "preset NAME".

    Raises:
        PluginError: when no installed plugin provides the preset.
    """
    candidate = find("preset", name)
    make = candidate.load()
    if not callable(make):
        raise PluginError(f"plugin {candidate} is not a function of a model's name")
    config = TrainingConfig.from_table(make(model_name), f"preset {name}")
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def get_qlora_config(model_name: str, **changes: Any) -> TrainingConfig:
    """Recommended settings for QLoRA fine-tuning of `model_name`; keyword arguments change single keys."""
    return get_preset("qlora", model_name, **changes)


def get_pretraining_config(model_name: str, **changes: Any) -> TrainingConfig:
    """Recommended settings for training `model_name` from scratch; keyword arguments change single keys."""
    return get_preset("pretraining", model_name, **changes)
