"""Attention over short sequences under CPU autocast: as three matrix products or in float32, both faster there than torch's kernel.

Torch's CPU kernel multiplies small blocks, and in 16 bits what it does around each product costs more than the product saves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from drivetrain_precision.support import bf16_support, differentiable_gradients

# Keys up to which attention as products took less time than the kernel, forward and backward, on one and two threads of a CPU with
# AVX512-BF16: 0.3 to 0.4 of its time at 128 keys, 0.54 to 0.58 at 256. (0.7 to 0.96 at 512, which is not worth the memory of the weights.)
_FEW = 256
# Length of the keys times size of a head up to which float32 took less time than the kernel in 16 bits: 0.3 to 0.7 of it at
# 128 × 32 and 128 × 64, equal at 512 × 32, 1.06 at 256 × 128.
_SHORT = 16_384


class Attention:
    """`F.scaled_dot_product_attention` as autocast is to compute it; long sequences are left to torch's kernel."""

    def __init__(self) -> None:
        self._bf16_is_native = bf16_support(torch.device("cpu"))[0]

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        wanted = torch.get_autocast_dtype("cpu")
        plain = attn_mask is None and not dropout_p and not enable_gqa and not hasattr(query, "to_local")  # no DTensor
        with torch.autocast("cpu", enabled=False):  # what torch's own rule does: cast, then call the operation without itself
            if plain and wanted == torch.bfloat16 and self._bf16_is_native and _suits_products(query, key, value):
                return _by_products(query.to(wanted), key.to(wanted), value.to(wanted), is_causal, scale)
            computed = torch.float32 if key.shape[-2] * key.shape[-1] <= _SHORT else wanted
            query, key, value = (_cast(tensor, computed) for tensor in (query, key, value))
            mask = None if attn_mask is None else _cast(attn_mask, computed)
            options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
            return _cast(F.scaled_dot_product_attention(query, key, value, mask, dropout_p, **options), wanted)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Like autocast: float64, and what is no floating-point number, stay."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def _suits_products(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Few keys, heads that match, nothing that autocast would leave alone, nobody who asked for another way (`sdpa_kernel`), and no
    transform of torch.func, for which `_Products` has no rules."""
    return (
        query.dim() == key.dim() == 4
        and query.shape[:2] == key.shape[:2]
        and key.shape[:3] == value.shape[:3]
        and key.shape[-2] <= _FEW
        and query.shape[-1] > 0
        and torch.float64 not in (query.dtype, key.dtype, value.dtype)
        and torch.backends.cuda.flash_sdp_enabled()  # one switch for all devices
        and not torch._C._are_functorch_transforms_active()
    )


def _by_products(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    """Attention [batch, heads, queries, size of a value] of bfloat16 [batch, heads, length, size]."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    heads = (tensor.flatten(0, 1) for tensor in (query, key, value))
    mixed: Tensor = _Products.apply(*heads, is_causal, scale).unflatten(0, query.shape[:2])  # type: ignore[no-untyped-call]
    return mixed


class _Products(torch.autograd.Function):
    """softmax(scale · q kᵀ) v (Vaswani et al. 2017, arXiv:1706.03762, equation 1) of [heads, length, size] in bfloat16.

    The scores are a float32 product, as in torch's kernel: rounded to 8 bits, a score of 30 is off by 0.06, a weight by 6 %. The
    weights are rounded for the products with them, as there, and kept for backward. The gradients' products are rounded: where
    scores have a deviation of 10, gradients are off by 1 % instead of the kernel's 0.6 %; where it is 1, by 0.3 % as there.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
        scores = _scores(q, k, is_causal, scale)
        weights = torch.softmax(scores, -1, out=scores).to(q.dtype)
        ctx.save_for_backward(q, k, v, weights)
        ctx.is_causal, ctx.scale = is_causal, scale
        return weights @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants to differentiate once more
            with torch.autocast("cpu", enabled=False):
                mixed = _scores(q, k, ctx.is_causal, ctx.scale).softmax(-1).to(q.dtype) @ v
            return *differentiable_gradients(mixed, (q, k, v), ctx.needs_input_grad[:3], grad), None, None
        zero = q.new_zeros(())
        of_scores = torch.ops.aten._softmax_backward_data(grad @ v.mT, weights, -1, weights.dtype)
        of_q = torch.baddbmm(zero, of_scores, k, beta=0, alpha=ctx.scale)
        of_k = torch.baddbmm(zero, of_scores.mT, q, beta=0, alpha=ctx.scale)
        return of_q, of_k, weights.mT @ grad, None, None


def _scores(q: Tensor, k: Tensor, is_causal: bool, scale: float) -> Tensor:
    """scale · q kᵀ, and −∞ where a query is not to see a key, in float32."""
    bias = torch.full((q.shape[1], k.shape[1]), -torch.inf).triu(1) if is_causal else torch.zeros(())
    return torch.baddbmm(bias, q.float(), k.float().mT, alpha=scale)
