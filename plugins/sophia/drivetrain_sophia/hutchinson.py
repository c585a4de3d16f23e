"""Hutchinson's estimate: Hessian-vector products with random vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from drivetrain import CallbackContext, Loss

_RELATIVE_STEP = 1e-3  # of the weights: in fp32 the product was right to 6e-5 for a small GPT, new and trained
_LEAST_SCALE = 1e-3


def by_differences(ctx: CallbackContext, vectors: list[Tensor]) -> list[Tensor | None]:
    """∇²L·u as (∇L(θ + εu) − ∇L(θ − εu)) / 2ε, without autocast: its 8 bits would leave nothing of the difference."""

    def loss(_: nn.Module, batch: Any) -> Tensor | Loss:
        with torch.autocast(ctx.device.type, enabled=False):
            return ctx.loss_of(batch)

    params = [p for group in ctx.optimizer.param_groups for p in group["params"]]
    kept = [p.detach().clone() for p in params]
    step = _step_size(kept, vectors)
    try:
        with _exact_products():
            ahead, behind = (_gradients_at(ctx, params, kept, vectors, s, loss) for s in (step, -step))
    finally:
        with torch.no_grad():
            torch._foreach_copy_(params, kept)
    return [None if a is None or b is None else (a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]


def by_double_backward(ctx: CallbackContext, vectors: list[Tensor]) -> list[Tensor | None]:
    """∇²L·u as the gradient of ⟨∇L, u⟩ (Pearlmutter 1994), exact. Fused attention kernels have no second derivative, so the
    plain one is taken; what has been compiled or fused otherwise may have none. Weights of 16 bits keep their autocast, without
    which they would not fit those of 32."""
    params = [p for group in ctx.optimizer.param_groups for p in group["params"]]
    full = all(p.dtype in (torch.float32, torch.float64) for p in params)

    def product(_: nn.Module, batch: Any) -> Tensor | Loss:
        plain = torch.autocast(ctx.device.type, enabled=False) if full else nullcontext()
        with plain, sdpa_kernel(SDPBackend.MATH):
            loss = ctx.loss_of(batch)
            total = loss.total if isinstance(loss, Loss) else loss
            gradients = torch.autograd.grad(total, params, create_graph=True, allow_unused=True)
        pairs = zip(gradients, vectors, strict=True)
        inner = sum(((g * u).sum() for g, u in pairs if g is not None), start=0.0 * total)
        return Loss(inner, loss.weight) if isinstance(loss, Loss) else inner

    gradients, _ = ctx.gradients_of(step=product)
    return gradients


def _step_size(params: list[Tensor], vectors: list[Tensor]) -> Tensor:
    """ε, a scalar on the device: a thousandth of the weights' root mean square over that of u."""
    weights, directions = (torch.linalg.vector_norm(torch.stack(torch._foreach_norm(ts))) for ts in (params, vectors))
    least = _LEAST_SCALE * math.sqrt(sum(p.numel() for p in params))
    step: Tensor = _RELATIVE_STEP * weights.clamp(min=least) / directions
    return step


@torch.no_grad()
def _move(params: list[Tensor], kept: list[Tensor], vectors: list[Tensor], step: Tensor) -> None:
    moved = torch._foreach_mul(vectors, step)
    torch._foreach_add_(moved, kept)
    torch._foreach_copy_(params, moved)


def _gradients_at(
    ctx: CallbackContext,
    params: list[Tensor],
    kept: list[Tensor],
    vectors: list[Tensor],
    step: Tensor,
    loss: Callable[..., Any],
) -> list[Tensor | None]:
    _move(params, kept, vectors, step)
    return ctx.gradients_of(step=loss)[0]


@contextmanager
def _exact_products() -> Iterator[None]:
    """No TF32 in matrix products: its 10 bits are too few for a difference of gradients."""
    if not torch.cuda.is_available() or torch.backends.cuda.matmul.fp32_precision != "tf32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
