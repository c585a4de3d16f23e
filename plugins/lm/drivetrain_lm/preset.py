"""Settings for training from scratch. docs/presets.md has the reason and the source of each value."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from drivetrain import Duration, is_installed, parameters_of

TOKENS_PER_PARAMETER = 20
CONTEXT = 2048  # the row length that batch sizes are given for
_GENERIC = 125e6


def pretraining(model_name: str, max_duration: Any = None) -> dict[str, Any]:
    """Recommended settings for training `model_name` from scratch, as the table of a configuration.

    The number of parameters is read from the name ("125M", "1.5B", "gpt2"). From it follow the tokens to train on, 20 for each
    parameter (Hoffmann et al. 2022, arXiv:2203.15556, table 3), and from the compute both take the batch and the learning rate
    (`batch_and_rate`). Of a name without a size a warning says that the settings are for 125M parameters. Batches are counted
    in rows of 2048 tokens; with rows of another length change `global_batch_size` in proportion.

    Args:
        max_duration: how long to train instead. From one in tokens batch and rate follow as well; of another unit nobody knows
            the tokens here, and they stay those of 20 for each parameter.
    """
    size = parameters_of(model_name)
    if size is None:
        warnings.warn(
            f"preset pretraining: the name {model_name!r} does not say how many parameters the model has; the settings are for "
            f"{_GENERIC / 1e6:.0f}M.",
            stacklevel=2,
        )
    tokens = TOKENS_PER_PARAMETER * (size or _GENERIC)
    given = _duration(max_duration)
    if given is not None and given.unit == "tok":
        tokens = given.value
    batch, rate = batch_and_rate(6 * (size or _GENERIC) * tokens)
    rows = max(1, round(batch / CONTEXT))
    rows = 2 ** round(math.log2(rows))  # a power of two can be shared out to any usual number of devices
    model = {"model": {"use": "transformers", "path": model_name}}
    return {
        "training_mode": "PRETRAINING",
        "model_name": model_name,
        **(model if is_installed("model", "transformers") else {}),
        "max_duration": f"{tokens:.4g}tok" if given is None else str(given),
        "per_device_batch_size": min(8, rows),
        "global_batch_size": rows,
        "precision": "bf16",
        "optimizer": {"use": "adamw", "lr": float(f"{rate:.2g}"), "betas": [0.9, 0.95], "weight_decay": 0.1},
        "scheduler": {"use": "wsd", "warmup": 0.02, "decay": 0.2, "shape": "sqrt"},
        "max_grad_norm": 1.0,
        "compile": torch.cuda.is_available(),
        "dataloader": {"num_workers": 2, "drop_last": True},
        "eval_interval": "1000st",
    }


def _duration(given: Any) -> Duration | None:
    """A duration that was given; None for none, and for what is none, of which the configuration says so itself."""
    try:
        return Duration.parse(given)
    except ValueError:
        return None


def batch_and_rate(compute: float) -> tuple[float, float]:
    """The batch in tokens and the peak learning rate for a budget of compute in FLOP: B = 0.2920 C^0.3271, η = 0.3118 C^-0.1250.

    DeepSeek LLM (arXiv:2401.02954), equation 1, fitted to sweeps with AdamW (betas 0.9 and 0.95, decay 0.1, clipping at 1).
    """
    return 0.2920 * compute**0.3271, 0.3118 * compute**-0.1250
