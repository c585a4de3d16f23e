"""Ready configurations by name, from plugins of the kind `preset`."""

from __future__ import annotations

import inspect
import re
from typing import Any

from drivetrain.config import TrainingConfig
from drivetrain.errors import PluginError
from drivetrain.registry import find

_SIZE = re.compile(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([mb])(?![a-z0-9])")
# Parameters of models whose names do not say them, or not all of them; by the longest that occurs in the name.
_MEMBERS = {
    "gpt2": 124e6, "gpt2-medium": 355e6, "gpt2-large": 774e6, "gpt2-xl": 1558e6,
    "mistral-nemo": 12e9, "mistral-small": 24e9, "mistral-large": 123e9, "mixtral-8x7b": 46.7e9, "mixtral-8x22b": 141e9,
    "phi-1": 1.3e9, "phi-2": 2.7e9, "phi-3-mini": 3.8e9, "phi-3.5-mini": 3.8e9, "phi-3-small": 7e9, "phi-3-medium": 14e9,
    "phi-4-mini": 3.8e9, "phi-4": 14e9,
}  # fmt: skip


def parameters_of(model_name: str) -> float | None:
    """How many parameters a model's name or path says it has ("SmolLM2-135M", "Llama-2-7b-hf", "gpt2-xl"); None when it does not."""
    name = re.sub(r"\.(gguf|safetensors)$", "", model_name.rstrip("/").rpartition("/")[2].lower())
    name = name.replace("_", "-").replace("gpt-2", "gpt2")
    if known := [member for member in _MEMBERS if member in name]:
        return _MEMBERS[max(known, key=len)]
    found = _SIZE.search(name)
    return None if found is None else int(found[1] or 1) * float(found[2]) * (1e9 if found[3] == "b" else 1e6)


def get_preset(name: str, model_name: str, **changes: Any) -> TrainingConfig:
    """The configuration that the preset `name` recommends for a model; its values carry the origin "preset NAME".

    Args:
        changes: single keys to change. What the preset's function has a parameter for is given to it too, so that other values
            can follow from it: the learning rate from the length of a run, say.

    Raises:
        PluginError: when no installed plugin provides the preset.
    """
    candidate = find("preset", name)
    make = candidate.load()
    if not callable(make):
        raise PluginError(f"plugin {candidate} is not a function of a model's name")
    known = {key: value for key, value in changes.items() if key in inspect.signature(make).parameters}
    config = TrainingConfig.from_table(make(model_name, **known), f"preset {name}")
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def get_qlora_config(model_name: str, **changes: Any) -> TrainingConfig:
    """Recommended settings for QLoRA fine-tuning of `model_name`; keyword arguments change single keys."""
    return get_preset("qlora", model_name, **changes)


def get_pretraining_config(model_name: str, **changes: Any) -> TrainingConfig:
    """Recommended settings for training `model_name` from scratch; keyword arguments change single keys."""
    return get_preset("pretraining", model_name, **changes)
