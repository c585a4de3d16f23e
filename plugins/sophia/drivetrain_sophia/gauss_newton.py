"""The Gauss-Newton-Bartlett estimate: gradients of labels that the model itself has drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drivetrain import Loss, ModelError

IGNORED = -100  # the label of a position that does not count, as in `F.cross_entropy`
_CHUNK = 1 << 22  # numbers drawn at once
_CAUSAL = (None, "ForCausalLM", "ForConditionalGeneration")  # the `loss_type`s of transformers that shift


def sampled_cross_entropy(logits: Tensor, labels: Tensor | None = None, generator: torch.Generator | None = None) -> Loss:
    """Cross entropy with labels drawn from the model's own prediction: ŷ ~ softmax(logits).

    With ĝ the gradient of its mean over B positions, B·ĝ⊙ĝ estimates the diagonal of the Gauss-Newton matrix without bias (Liu et
    al. 2023, arXiv:2305.14342, algorithm 2).

    Args:
        logits: [..., classes]; [batch, classes, ...] where the labels' shape says so.
        labels: the true ones, of which only those that are -100 matter: their positions are left out. None counts every position.
        generator: source of random numbers on the logits' device; None for the global one.

    Returns:
        The summed loss and the number of positions that count.

    Raises:
        ModelError: when these are no logits with integer labels.
    """
    rows, flat = _rows(logits, labels)
    ignored = None if flat is None else flat == IGNORED
    total = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
    size = max(1, _CHUNK // rows.shape[-1])
    for first in range(0, len(rows), size):
        part = rows[first : first + size].to(total.dtype)
        drawn = _draw(part.detach(), generator)
        if ignored is not None:
            drawn = drawn.masked_fill(ignored[first : first + size], IGNORED)
        total = total + F.cross_entropy(part, drawn, ignore_index=IGNORED, reduction="sum")
    return Loss(total, float(len(rows)) if ignored is None else (~ignored).sum())


def find_logits(outputs: Any) -> Tensor | None:
    """The logits in what a model returned: a tensor of two or more dimensions, `["logits"]` or `.logits`; None when there are none."""
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    return found if isinstance(found, Tensor) and found.dim() >= 2 and found.is_floating_point() else None


def next_labels(labels: Tensor) -> Tensor:
    """Labels moved to the position that predicts them: [..., t + 1] to [..., t]; the last position predicts nothing (-100)."""
    return F.pad(labels[..., 1:], (0, 1), value=IGNORED)


def shifts_labels(model: nn.Module) -> bool:
    """Whether a model's own loss compares logits[t] with labels[t + 1], as that of transformers' causal language models does.

    Known by what such a model says of itself: its `loss_type`, absent in other models, is that of a causal loss or None (GPT-2),
    and it is no encoder with a decoder, whose inputs are shifted instead of its labels.
    """
    while isinstance(inner := getattr(model, "module", getattr(model, "_orig_mod", None)), nn.Module):
        model = inner  # DDP's and torch.compile's wrappers
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return not encodes and getattr(model, "loss_type", "none of transformers") in _CAUSAL


def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One label for each row, int64 [rows]: argmax of logit + Gumbel noise, which is −log of an exponential number."""
    return (logits - torch.empty_like(logits).exponential_(generator=generator).log_()).argmax(dim=-1)


def _rows(logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Logits as [positions, classes], and labels as [positions]."""
    if labels is not None and labels.is_floating_point():
        raise ModelError(
            "sophia draws class labels from the model's logits, but here the labels are not integers. For regression and other "
            "losses use sophia_h."
        )
    if labels is None or labels.shape == logits.shape[:-1]:
        rows = logits.flatten(0, -2)
    elif labels.shape == logits.shape[:1] + logits.shape[2:]:
        rows = logits.movedim(1, -1).flatten(0, -2)
    else:
        raise ModelError(
            f"sophia needs a label for each position of the logits; these have the shape {tuple(logits.shape)}, the labels "
            f"{tuple(labels.shape)}. Subclass drivetrain_sophia.SophiaGComponent and override logits_and_labels(model, batch)."
        )
    if rows.shape[-1] < 2:
        raise ModelError("sophia draws labels from two or more classes, but the model gives one number. Use sophia_h.")
    return rows, None if labels is None else labels.flatten()
