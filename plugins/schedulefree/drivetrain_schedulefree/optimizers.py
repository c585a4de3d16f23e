"""Schedule-free learning: gradients at one point, steps from another, and an average of the steps as the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from drivetrain import ForeachOptimizer, ModelError


class ScheduleFree(ForeachOptimizer):
    """What both optimizers share (Defazio et al. 2024, arXiv:2405.15682, equations 5 to 7), all tensors of a group at once.

        z ← z − η·d(y), x ← (1−c)x + c·z, y ← (1−β)z + βx

    with a direction d that the subclass defines, and weights c = η̂² / Σ η̂² of the average, η̂ the greatest η so far: a warm-up
    counts little. The parameters hold y, where gradients are taken, while training, and x, the result, after `eval`. The state is
    z, and y while the parameters hold x, so that going back is exact; x follows from y and z.
    """

    _momentum: str  # the setting that holds β

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, {**defaults, "steps": 0, "weight_sum": 0.0, "lr_max": 0.0, "averaged": False})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the parameters that have a gradient; `closure`, if given, computes the loss again first.

        Raises:
            ModelError: for a sparse gradient, or when the parameters hold x; no parameter has been changed then.
        """
        if self.averaged:
            raise ModelError(
                "the weights are the averaged ones, at which no step can be taken; call the optimizer's train() first."
            )
        return super().step(closure)

    @staticmethod
    def _advance(group: dict[str, Any]) -> None:
        group["steps"] += 1
        group["lr_max"] = max(group["lr_max"], float(group["lr"]))
        group["weight_sum"] += group["lr_max"] ** 2

    def update_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Equations 5 to 7."""
        self._advance(group)
        lr, beta = group["lr"], self._beta(group)
        share = group["lr_max"] ** 2 / group["weight_sum"] if group["weight_sum"] else 0.0
        origins = self.states(params, "z", torch.clone)
        directions = self._directions(group, params, self.gradients(params))
        if group["weight_decay"]:
            directions = torch._foreach_add(directions, params, alpha=group["weight_decay"])
        # x need not be kept: y moves by c towards z, then by what the new z adds to both of its parts
        torch._foreach_lerp_(params, origins, share)
        torch._foreach_add_(params, directions, alpha=lr * (beta * (1 - share) - 1))
        torch._foreach_add_(origins, directions, alpha=-lr)

    def _directions(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]
    ) -> list[Tensor] | tuple[Tensor, ...]:
        raise NotImplementedError

    def _beta(self, group: dict[str, Any]) -> float:
        beta = group[self._momentum]
        return float(beta[0] if isinstance(beta, (tuple, list)) else beta)

    @torch.no_grad()
    def eval(self) -> None:
        """Let the parameters hold x, the averaged weights: for evaluation and as the result. `train` goes back, exactly."""
        for group in self.param_groups:
            for p in group["params"]:
                if not group["averaged"] and "z" in self.state[p]:
                    z, y = self.state[p]["z"], p.detach().clone()
                    self.state[p]["y"] = y
                    p.copy_(torch.lerp(z, y.to(z.dtype), 1 / self._beta(group)))
            group["averaged"] = True

    @torch.no_grad()
    def train(self) -> None:
        """Let the parameters hold y, at which gradients are taken."""
        for group in self.param_groups:
            for p in group["params"]:
                if "y" in self.state[p]:
                    p.copy_(self.state[p].pop("y"))
            group["averaged"] = False

    @property
    def averaged(self) -> bool:
        """Whether the parameters hold x."""
        return any(group["averaged"] for group in self.param_groups)


class ScheduleFreeSGD(ScheduleFree):
    """Schedule-free SGD: d = g + λy, with β as `momentum` (Defazio et al. 2024, arXiv:2405.15682, equations 5 to 7).

    Args:
        params: parameters, or groups of them with settings of their own.
        lr: learning rate η, after a warm-up constant.
        momentum: β, above 0.
        weight_decay: λ.
    """

    _momentum = "momentum"

    def __init__(self, params: Any, lr: float = 1.0, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _directions(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        return grads


class ScheduleFreeAdamW(ScheduleFree):
    """Schedule-free AdamW: d = g/(√v̂ + ε) + λy (Defazio et al. 2024, arXiv:2405.15682, algorithm 1).

    v ← β2·v + (1−β2)g², v̂ = v/(1−β2ᵗ); β1 is the β of the interpolation. The bias correction of v is Adam's, as in the authors'
    package; the paper has it in η.

    Args:
        params: parameters, or groups of them with settings of their own.
        lr: learning rate η, after a warm-up constant.
        betas: β1, above 0, and β2.
        eps: ε.
        weight_decay: λ.
    """

    _momentum = "betas"

    def __init__(
        self,
        params: Any,
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _directions(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
        beta2, squares = group["betas"][1], self.states(params, "exp_avg_sq")
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
        roots = torch._foreach_div(squares, 1 - beta2 ** group["steps"])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        return torch._foreach_div(grads, roots)
