"""Recommended settings for QLoRA. docs/presets.md has the reason and the source of each value."""

from __future__ import annotations

import re
import warnings
from typing import Any

from drivetrain import is_installed

# By the first that occurs in the model's name; sizes in parameters of the members whose names do not say theirs.
FAMILIES: dict[str, dict[str, float]] = {
    "smollm": {},
    "llama": {},
    "mistral": {"small": 24e9, "nemo": 12e9, "large": 123e9},
    "mixtral": {},
    "qwen": {},
    "gemma": {},
    "phi": {"phi-1": 1.3e9, "phi-2": 2.7e9, "phi-3-mini": 3.8e9, "phi-3.5-mini": 3.8e9, "phi-3-small": 7e9, "phi-3-medium": 14e9,
            "phi-4-mini": 3.8e9, "phi-4": 14e9},
    "gpt2": {"gpt2-medium": 355e6, "gpt2-large": 774e6, "gpt2-xl": 1.5e9, "gpt2": 124e6},
}  # fmt: skip
_SIZE = re.compile(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([mb])(?![a-z0-9])")
_LARGE = 13e9  # parameters; from here on the paper halves learning rate and dropout


def qlora(model_name: str) -> dict[str, Any]:
    """Recommended settings for QLoRA fine-tuning of `model_name`, as the table of a configuration.

    The values are those of Dettmers et al. 2023 (arXiv:2305.14314, appendix B, and the scripts beside it), for every family the
    same: they depend on the size alone, which is read from the name ("7B", "135M"). Of a name without a known family or size a
    warning says that the settings are generic: those for models up to 13B.
    """
    family, size = family_and_size(model_name)
    if family is None or size is None:
        what = "no family known to it" if family is None else f"the family {family}, but of a size it cannot tell"
        warnings.warn(
            f"preset qlora: {model_name!r} is of {what}; the settings are the generic ones, for models up to 13B.", stacklevel=2
        )
    large = size is not None and size > _LARGE
    model = {"model": {"use": "transformers", "path": model_name, "dtype": "bf16"}}
    return {
        "training_mode": {"use": "qlora", "r": 64, "alpha": 16.0, "dropout": 0.05 if large else 0.1},
        "model_name": model_name,
        **(model if is_installed("model", "transformers") else {}),
        "precision": "bf16",
        "optimizer": {
            "use": "paged_adamw_8bit" if _has_cuda() else "adamw_8bit",
            "lr": 1e-4 if large else 2e-4,
            "betas": [0.9, 0.999],
            "weight_decay": 0.0,
        },
        "scheduler": {"use": "constant", "warmup": 0.03},
        "max_grad_norm": 0.3,
        "max_duration": "3ep",
        "per_device_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "activation_checkpointing": True,
    }


def family_and_size(model_name: str) -> tuple[str | None, float | None]:
    """The family that a model's name tells, and its number of parameters; None for what it does not tell."""
    name = re.sub(r"\.(gguf|safetensors)$", "", model_name.rstrip("/").rpartition("/")[2].lower()).replace("_", "-")
    spelled = name.replace("gpt-2", "gpt2")
    family = next((family for family in FAMILIES if family in spelled), None)
    if found := _SIZE.search(spelled):
        experts, number, unit = found.groups()
        return family, int(experts or 1) * float(number) * (1e9 if unit == "b" else 1e6)
    members = FAMILIES[family] if family else {}
    return family, next((members[m] for m in sorted(members, key=len, reverse=True) if m in spelled), None)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
