"""Signum for Drivetrain: every weight moves by the sign of an average of its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from drivetrain import CallbackContext, ModelError, OptimizerComponent, component, option

__all__ = ["Signum", "SignumOptimizer"]


class Signum(torch.optim.Optimizer):
    """Signum (Bernstein et al. 2018, arXiv:1802.04434, algorithm 2): m ← βm + (1 − β)g, θ ← θ(1 − ηλ) − η·sign(m)."""

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(p.grad is not None and p.grad.is_sparse for group in self.param_groups for p in group["params"]):
            raise ModelError("a gradient is sparse, which Signum cannot use. Make the embedding dense (sparse=False).")
        for group in self.param_groups:
            if params := [p for p in group["params"] if p.grad is not None]:
                self._update(params, group)
        return loss

    def _update(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["average"] = torch.zeros_like(p)
        averages = [self.state[p]["average"] for p in params]
        torch._foreach_lerp_(averages, [p.grad for p in params], 1 - group["momentum"])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, [average.sign() for average in averages], alpha=-group["lr"])


@component
class SignumOptimizer(OptimizerComponent):
    """The sign of a momentum (Bernstein et al. 2018, arXiv:1802.04434, algorithm 2)."""

    lr: float = option(default=1e-3, at_least=0, help="how far every weight moves in a step; the schedule multiplies it")
    momentum: float = option(default=0.9, at_least=0, below=1, help="averaging factor β of the gradients")

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """`Signum` over the parameters of `ctx.model`."""
        return Signum(self.parameter_groups(ctx.model), self.lr, self.momentum, self.weight_decay)
