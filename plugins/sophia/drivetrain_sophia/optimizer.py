"""Sophia's step, and the curvature it divides by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from drivetrain import ForeachOptimizer


class Sophia(ForeachOptimizer):
    """Sophia (Liu et al. 2023, arXiv:2305.14342, algorithm 3), all tensors of a group at once.

    m ← β1·m + (1−β1)g, θ ← θ(1 − ηλ), θ ← θ − η·clip(m / max(γh, ε), −1, 1)

    where h estimates the diagonal of the Hessian, averaged by `update_hessian` every few steps. Where h is not positive, or
    before it has been estimated, a weight moves by η along the sign of m. m and h are the state `exp_avg`, in the weights' own
    type, and `hessian`, in float32 at least.

    Args:
        params: parameters, or groups of them with settings of their own.
        lr: learning rate η.
        betas: averaging factors β1 of the gradient and β2 of the curvature.
        gamma: γ, which decides how many weights are clipped: the paper has 0.05 for Sophia-G and 0.01 for Sophia-H.
        eps: ε, the least that m is divided by.
        weight_decay: λ, decoupled from the gradient.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 6e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.05,
        eps: float = 1e-12,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "gamma": gamma, "eps": eps, "weight_decay": weight_decay})

    def update_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Algorithm 3, but for the estimate of h."""
        momenta, denominators = self.states(params, "exp_avg"), self._denominators(group, params)
        torch._foreach_lerp_(momenta, self.gradients(params), 1 - group["betas"][0])
        updates = torch._foreach_div(momenta, denominators)
        torch._foreach_clamp_min_(updates, -1.0)
        torch._foreach_clamp_max_(updates, 1.0)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-group["lr"])

    @torch.no_grad()
    def update_hessian(self, estimate: Sequence[Tensor | None]) -> None:
        """Average an estimate of the Hessian's diagonal in: h ← β2·h + (1−β2)ĥ.

        Args:
            estimate: ĥ for each parameter in the order of the groups; None leaves the parameter's h alone, and so does every
                entry that is not finite.
        """
        params = [(group, p) for group in self.param_groups for p in group["params"]]
        for (group, parameter), found in zip(params, estimate, strict=True):
            if found is not None:
                (h,) = self._hessians([parameter])
                found = found.to(h.dtype)
                h.lerp_(torch.where(found.isfinite(), found, h), 1 - group["betas"][1])

    @torch.no_grad()
    def win_rate(self) -> Tensor:
        """The share of weights that the last step did not clip, a scalar on the device. The paper keeps it between 0.1 and 0.5."""
        wins, count = [], 0
        for group in self.param_groups:
            for p in group["params"]:
                if "exp_avg" in self.state[p]:
                    (divided,) = self._denominators(group, [p])
                    wins.append((self.state[p]["exp_avg"].abs() < divided).sum())
                    count += p.numel()
        total: Any = torch.stack([win.to(wins[0].device) for win in wins]).sum() if wins else torch.zeros(())
        # of sharded weights each process has counted its own
        rate: Tensor = (total.full_tensor() if hasattr(total, "full_tensor") else total) / max(count, 1)
        return rate

    def _denominators(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """max(γh, ε)."""
        scaled = torch._foreach_mul(self._hessians(params), group["gamma"])
        torch._foreach_clamp_min_(scaled, group["eps"])
        return list(scaled)

    def _hessians(self, params: list[Tensor]) -> list[Tensor]:
        """h, which moves by a hundredth at a time: too little for bfloat16, so it is float32 for such weights."""
        return self.states(params, "hessian", lambda p: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave. Torch gives everything the weights' own type; h keeps that of its own."""
        super().load_state_dict(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(keys, params, strict=True):
            if "hessian" in (saved := state_dict["state"].get(key, {})):
                self.state[p]["hessian"] = saved["hessian"].to(p.device, copy=True)
