"""Cross entropy of a linear layer's outputs, a few rows at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from drivetrain import ModelError

IGNORED = -100  # the label of a position that does not count, as in `F.cross_entropy`


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, rows: int) -> Tensor:
    """The cross entropy of logits x Wᵀ, summed, without ever having all logits.

    With many tokens and a large vocabulary these are most of a language model's memory, three times over: the logits, the same in
    fp32, and their gradients. Here `rows` rows have them at a time. The gradients are taken in the forward pass, while logits are at
    hand, so there are no second derivatives. As in Liger's kernel: Hsu et al. 2024 (arXiv:2410.10989), section 3.2; the gradient of
    cross entropy is softmax(logits) − onehot(label).

    Args:
        x: [tokens, width].
        weight: [vocabulary, width]. The products are computed in the type of a surrounding autocast.
        labels: int64 [tokens], in the range of the vocabulary; -100 where a token does not count.
        rows: how many at a time.

    Returns:
        Nats, summed in fp32 (fp64 for products in fp64): a scalar.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    with torch.autocast(kind, enabled=False):
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            total: Tensor = _LinearCrossEntropy.apply(x, weight, labels, rows, dtype)  # type: ignore[no-untyped-call]
            return total
        parts = zip(x.split(rows), labels.split(rows), strict=True)
        return torch.stack([_entropy(part.to(dtype), weight.to(dtype), target)[0] for part, target in parts]).sum()


def _entropy(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of some rows: the summed cross entropy, and the logarithms of the probabilities, [rows, vocabulary] in at least fp32."""
    logits = x @ weight.t()
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    return F.nll_loss(logs, labels, ignore_index=IGNORED, reduction="sum"), logs


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        narrow = weight.to(dtype)
        # a sum of many parts has no place in 16 bits
        of_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        of_x, totals = torch.empty_like(x), []
        for part, target, out in zip(x.split(rows), labels.split(rows), of_x.split(rows), strict=True):
            part = part.to(dtype)
            total, logs = _entropy(part, narrow, target)
            totals.append(total)
            counts = (target != IGNORED).to(logs.dtype).unsqueeze(1)
            gradient = logs.exp_().scatter_add_(1, target.clamp(min=0).unsqueeze(1), -counts).mul_(counts).to(dtype)
            out.copy_(gradient @ narrow)
            if dtype == of_weight.dtype:
                of_weight.addmm_(gradient.t(), part)
            else:
                of_weight.add_(gradient.t() @ part)
        ctx.save_for_backward(of_x, of_weight)
        return torch.stack(totals).sum()

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        if torch.is_grad_enabled():  # which create_graph=True does; the saved gradients would pass for constants
            raise ModelError("a loss in parts has no second derivative: set loss_in_parts = false in the model.")
        of_x, of_weight = ctx.saved_tensors  # torch gives the second the type of the weight's gradient
        return of_x * above.to(of_x.dtype), of_weight * above.to(of_weight.dtype), None, None, None
