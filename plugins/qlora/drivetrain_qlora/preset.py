"""Recommended settings for QLoRA. docs/presets.md has the reason and the source of each value."""

from __future__ import annotations

import warnings
from typing import Any

from drivetrain import is_installed, parameters_of

FAMILIES = (
    "smollm",
    "llama",
    "mistral",
    "mixtral",
    "qwen",
    "gemma",
    "phi",
    "gpt2",
)  # by the first that occurs in a model's name
# What a family needs of the model. Gemma 2 caps attention's logits (Gemma Team 2024, arXiv:2408.00118, section 2), which only
# the plain implementation computes and SDPA leaves out.
_OF_MODEL: dict[str, dict[str, str]] = {"gemma2": {"attention": "eager"}}
_LARGE = 13e9  # parameters; from here on the paper halves learning rate and dropout


def qlora(model_name: str) -> dict[str, Any]:
    """Recommended settings for QLoRA fine-tuning of `model_name`, as the table of a configuration.

    The values are those of Dettmers et al. 2023 (arXiv:2305.14314, appendix B, and the scripts beside it), which follow from the
    size, read from the name ("7B", "135M"); what the family adds is how the model is to be loaded (`_OF_MODEL`). The optimizer's
    state is paged where there is a CUDA device. Of a name without a known family or size a warning says that the settings are
    generic: those for models up to 13B.
    """
    family, size = family_and_size(model_name)
    if family is None or size is None:
        what = "no family known to it" if family is None else f"the family {family}, but of a size it cannot tell"
        warnings.warn(
            f"preset qlora: {model_name!r} is of {what}; the settings are the generic ones, for models up to 13B.", stacklevel=2
        )
    large = size is not None and size > _LARGE
    plain = _plain(model_name)
    needs = next((options for member, options in _OF_MODEL.items() if plain.replace("-", "").startswith(member)), {})
    model = {"model": {"use": "transformers", "path": model_name, "dtype": "bf16", **needs}}
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
    name = _plain(model_name)
    return next((family for family in FAMILIES if family in name), None), parameters_of(model_name)


def _plain(model_name: str) -> str:
    """The last part of a name or path, spelled alike."""
    return model_name.rstrip("/").rpartition("/")[2].lower().replace("_", "-").replace("gpt-2", "gpt2")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
