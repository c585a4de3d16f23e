"""Lion for Drivetrain: the update is the sign of an averaged gradient, so that only one average is kept for each weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drivetrain import CallbackContext, ForeachOptimizer, OptimizerComponent, component, option

__all__ = ["Lion", "LionComponent"]


class Lion(ForeachOptimizer):
    """Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2), all tensors of a group at once.

    θ ← θ(1 − ηλ), θ ← θ − η·sign(β1·m + (1−β1)g), m ← β2·m + (1−β2)g, where m, zero at first, is the state `exp_avg`, kept in
    the parameter's own type.

    Args:
        params: parameters, or groups of them with settings of their own.
        lr: learning rate η.
        betas: averaging factors β1 of the update and β2 of the state.
        weight_decay: λ, decoupled from the gradient.
    """

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def update_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Algorithm 2."""
        grads, averages, (beta1, beta2) = self.gradients(params), self.states(params, "exp_avg"), group["betas"]
        updates = torch._foreach_lerp(averages, grads, 1 - beta1)
        torch._foreach_sign_(updates)
        torch._foreach_lerp_(averages, grads, 1 - beta2)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-group["lr"])


@component
class LionComponent(OptimizerComponent):
    """Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2): θ ← θ(1 − ηλ) − η·sign(β1·m + (1−β1)g), then m ← β2·m + (1−β2)g.

    Every weight moves by η in each step, whatever its gradient. Compared with AdamW, the paper takes η 3 to 10 times smaller and λ
    as much larger, and large batches. The state is m alone, half of Adam's.
    """

    lr: float = option(default=1e-4, at_least=0, help="peak learning rate; the schedule multiplies it")
    weight_decay: float = option(default=0.1, at_least=0, help="decay of the weights it applies to, see `decay`")
    betas: tuple[float, float] = option(
        default=(0.9, 0.99),
        at_least=0,
        below=1,
        help="averaging factors of the update and of the state; (0.95, 0.98) is steadier",
    )

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """`Lion` over the parameters of `ctx.model`."""
        return Lion(self.parameter_groups(ctx.model), lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
