"""LAMB: Adam with a step in proportion to each matrix' size."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from drivetrain import CallbackContext, ForeachOptimizer, component, option
from drivetrain_optimizers.base import DECAY_HELP, LR_HELP, TorchOptimizer, betas


class LambOptimizer(ForeachOptimizer):
    """LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2), all tensors of a group at once.

    m ← β1·m + (1−β1)g, v ← β2·v + (1−β2)g², u = m̂/(√v̂ + ε) + λθ, θ ← θ − η·(‖θ‖/‖u‖)·u for each tensor, with m̂ = m/(1−β1ᵗ) and
    v̂ = v/(1−β2ᵗ). The trust ratio ‖θ‖/‖u‖ is 1 where one of the two is 0, and for vectors unless `adapt` is "all". φ, the paper's
    limit to ‖θ‖, is the identity.

    Args:
        params: parameters, or groups of them with settings of their own.
        lr: learning rate η.
        betas: averaging factors β1 and β2.
        eps: ε.
        weight_decay: λ.
        adapt: what has a trust ratio: "matrices" (tensors of two or more dimensions) or "all".
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        adapt: str = "matrices",
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": adapt})

    def update_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Algorithm 2."""
        updates = self._updates(group, params)
        _scale([(p, u) for p, u in zip(params, updates, strict=True) if p.ndim >= 2 or group["adapt"] == "all"])
        torch._foreach_add_(params, updates, alpha=-group["lr"])

    def _updates(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """u for each parameter."""
        grads, (beta1, beta2) = self.gradients(params), group["betas"]
        for p in params:
            if not self.state[p]:
                self.state[p].update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            self.state[p]["step"] += 1
        steps, means, squares = ([self.state[p][key] for p in params] for key in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
        roots = torch._foreach_div(squares, [1 - beta2**step for step in steps])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(means, [1 - beta1**step for step in steps])
        torch._foreach_div_(updates, roots)
        if group["weight_decay"]:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        return list(updates)


def _scale(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Multiply each update by its trust ratio, in place; nothing is read by the host."""
    if not pairs:
        return
    weights, updates = [p for p, _ in pairs], [u for _, u in pairs]
    ratios = [
        torch.where((w > 0) & (u > 0), w / u, torch.ones_like(w))
        for w, u in zip(torch._foreach_norm(weights), torch._foreach_norm(updates), strict=True)
    ]
    torch._foreach_mul_(updates, ratios)


@component
class Lamb(TorchOptimizer):
    """LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2), for very large batches.

    u = m̂/(√v̂ + ε) + λθ with Adam's m̂ and v̂, θ ← θ − η·(‖θ‖/‖u‖)·u for each matrix; biases and norms have no such ratio and no
    decay unless `adapt` and `decay` say "all". Where ‖θ‖ or ‖u‖ is 0 the ratio is 1.
    """

    lr: float = option(default=1e-3, at_least=0, help=LR_HELP)
    weight_decay: float = option(default=0.01, at_least=0, help=DECAY_HELP)
    betas: tuple[float, float] = betas(0.9, 0.999)
    eps: float = option(default=1e-6, at_least=0, help="added to the denominator")
    adapt: Literal["matrices", "all"] = option(
        default="matrices", help="whose step is in proportion to its size: tensors of two or more dimensions, or everything"
    )

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """`LambOptimizer` over the parameters of `ctx.model`."""
        return self.build(LambOptimizer, ctx, betas=self.betas, eps=self.eps, adapt=self.adapt)
