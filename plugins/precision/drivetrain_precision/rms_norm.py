"""RMSNorm under CPU autocast in half of the time: torch puts it together of a dozen operations, each a walk through memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drivetrain_precision.support import differentiable_gradients


def rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """`F.rms_norm` as autocast computes it, in the input's type; with fewer operations where input and weight are float32."""
    if len(normalized_shape) == 1 and weight is not None and _is_plain(input) and _is_plain(weight) and weight.numel():
        eps = torch.finfo(input.dtype).eps if eps is None else eps
        result: Tensor = _RmsNorm.apply(input, weight, eps)  # type: ignore[no-untyped-call]
        return result
    plain: Tensor = torch.ops.aten.rms_norm.default.decompose(input, normalized_shape, weight, eps)
    return plain


def _is_plain(tensor: Tensor) -> bool:
    """Subclasses (DTensor, those that torch.compile traces with) and torch.func's transforms have rules of their own."""
    of_torch = type(tensor) in (Tensor, nn.Parameter)
    return of_torch and tensor.dtype == torch.float32 and not torch._C._are_functorch_transforms_active()


class _RmsNorm(torch.autograd.Function):
    """weight · x / √(mean(x²) + eps) over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4).

    Backward is layer norm's kernel with a mean of zero. It takes the mean over a row of grad · weight, for layer norm's own mean, off
    its result; here that belongs to it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        squares: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        result: Tensor = (x * scale).mul_(weight)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        if torch.is_grad_enabled():  # somebody wants to differentiate once more
            result = torch.ops.aten.rms_norm.default.decompose(x, [size], weight, ctx.eps)
            return *differentiable_gradients(result, (x, weight), ctx.needs_input_grad[:2], grad), None
        wants = [*ctx.needs_input_grad[:2], False]
        of_x, of_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, [size], torch.zeros_like(scale), scale, weight, None, wants
        )
        if of_x is not None:
            of_x.add_(torch.mv(grad.reshape(-1, size), weight).view_as(scale).mul_(scale).div_(size))
        return of_x, of_weight, None
