"""Muon and AdamW as one torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from drivetrain import ForeachOptimizer, ModelError
from drivetrain_muon.orthogonal import orthogonalize

_MOST = 1 << 27  # numbers orthogonalized at once; with the temporary ones, a few times this much memory
_TINY = 1e-10


class Muon(ForeachOptimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices, AdamW for what else there is.

    Groups with `algorithm = "muon"` (the default) hold matrices, or kernels of convolutions, which are matrices of [outputs, rest]:

        m ← μm + (1−μ)g, u = (1−μ)g + μm (Nesterov), O = orthogonalize(u), θ ← θ(1 − ηλ) − η·s·O

    with s = 0.2√max(rows, columns) (`adjust_lr = "match_rms_adamw"`: Liu et al. 2025, arXiv:2502.16982, equation 4) or
    √max(1, rows/columns) (`"original"`). Matrices of one shape are orthogonalized together.

    - `normuon` (Li et al. 2025, arXiv:2510.05491, algorithm 1): each row of O is divided by the root of the running mean v of its
      squares, v ← βv + (1−β)·mean(O²), and the whole is brought back to its norm.
    - `cautious` (Chen et al. 2025, arXiv:2510.12402, algorithm 1): only weights that the update moves towards zero decay.

    Groups with `algorithm = "adamw"` follow `torch.optim.AdamW` (`betas`, `eps`), whose kernels do the work.

    Args:
        params: parameters, or groups of them with settings of their own.
        lr, weight_decay: η and λ.
        momentum: μ.
        coefficients, ns_steps: polynomials of the orthogonalization and how many; see `orthogonalize`.
        adjust_lr, normuon, normuon_beta, cautious: see above.
        betas, eps: of AdamW.

    Raises:
        ModelError: when a group of Muon holds a vector or a number.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        coefficients: str = "polar_express",
        ns_steps: int = 5,
        adjust_lr: str = "match_rms_adamw",
        normuon: bool = False,
        normuon_beta: float = 0.95,
        cautious: bool = False,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "algorithm": "muon",
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "coefficients": coefficients,
            "ns_steps": ns_steps,
            "adjust_lr": adjust_lr,
            "normuon": normuon,
            "normuon_beta": normuon_beta,
            "cautious": cautious,
            "betas": betas,
            "eps": eps,
            "fused": None,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            if group["algorithm"] == "muon":
                _check_matrices(group)
            elif group["fused"] is None:
                group["fused"] = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in group["params"])

    def update_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Muon or AdamW, as the group says."""
        if group["algorithm"] == "adamw":
            self._adamw(group, params)
        else:
            for batch in _batches(params):
                self._muon(group, batch)

    def _muon(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update matrices of one shape, type and device."""
        grads, momenta = self.gradients(params), self.states(params, "momentum_buffer")
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        looked_ahead = torch._foreach_lerp(grads, momenta, group["momentum"])
        stack = torch.stack([_whole(update).flatten(1) for update in looked_ahead]).to(_type_of(params[0]))
        stack = orthogonalize(stack, group["coefficients"], group["ns_steps"])
        if group["normuon"]:
            stack = self._normalize_rows(group, params, stack)
        scale = _scale(group["adjust_lr"], *stack.shape[1:])
        updates = [_like(matrix.view(p.shape), p) for matrix, p in zip(stack.to(params[0].dtype).unbind(), params, strict=True)]
        _decay(group, params, updates)
        torch._foreach_add_(params, updates, alpha=-group["lr"] * scale)

    def _normalize_rows(self, group: dict[str, Any], params: list[Tensor], stack: Tensor) -> Tensor:
        """NorMuon: rows of equal size in the long run, each matrix' norm as it was; `stack` is [matrices, rows, columns]."""
        # of a sharded matrix too every process keeps all of it: it is small, and the rows are whole here
        moments = self.states(params, "row_moment", lambda p: torch.zeros(len(p), 1, dtype=p.dtype, device=p.device))
        squares = stack.square().mean(dim=-1, keepdim=True, dtype=torch.float32)
        torch._foreach_lerp_(moments, list(squares.to(moments[0].dtype).unbind()), 1 - group["normuon_beta"])
        rows = stack / (torch.stack(moments).sqrt() + _TINY).to(stack.dtype)
        before, after = (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) for x in (stack, rows))
        normalized: Tensor = rows * (before / (after + _TINY))
        return normalized

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        first, second = (self.states(params, key) for key in ("exp_avg", "exp_avg_sq"))
        # a fused kernel counts on the device, the others on the host
        fused = bool(group["fused"])
        steps = self.states(params, "step", lambda p: torch.zeros((), device=p.device if fused else "cpu"))
        beta1, beta2 = group["betas"]
        adamw(
            params,
            self.gradients(params),
            first,
            second,
            [],
            steps,
            fused=fused,
            foreach=not fused,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _check_matrices(group: dict[str, Any]) -> None:
    for index, parameter in enumerate(group["params"]):
        if parameter.ndim < 2:
            raise ModelError(
                f"Muon updates matrices, and {_name(group, index)} has {parameter.ndim} dimensions. Put it into a group with "
                "algorithm = 'adamw'."
            )


def _name(group: dict[str, Any], index: int) -> str:
    names = group.get("param_names")
    return repr(names[index]) if names else f"a parameter of shape {tuple(group['params'][index].shape)}"


def _batches(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters that can be stacked, as many at once as memory should allow."""
    alike: dict[Any, list[Tensor]] = {}
    for parameter in params:
        alike.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(parameter)
    for same in alike.values():
        count = max(1, _MOST // max(1, same[0].numel()))
        if same[0].numel():
            yield from (same[first : first + count] for first in range(0, len(same), count))


def _type_of(parameter: Tensor) -> torch.dtype:
    """What the orthogonalization computes in: bfloat16 is enough for it (Jordan et al. 2024), and slow on most CPUs."""
    if parameter.device.type in ("cuda", "xpu"):
        return torch.bfloat16
    return torch.promote_types(parameter.dtype, torch.float32)


def _is_sharded(tensor: Any) -> bool:
    """Whether this is a `DTensor`, as FSDP makes them, without importing it."""
    return hasattr(tensor, "device_mesh")


def _whole(matrix: Any) -> Tensor:
    """A sharded matrix in one piece, on every process: its singular values are not those of its parts."""
    whole: Tensor = matrix.full_tensor() if _is_sharded(matrix) else matrix
    return whole


def _like(matrix: Tensor, parameter: Any) -> Tensor:
    """Cut a whole matrix as the parameter is cut. All processes have the same one, so nothing is sent."""
    if not _is_sharded(parameter):
        return matrix
    from torch.distributed.tensor import distribute_tensor  # 0.2 s that only sharded training should cost

    return distribute_tensor(matrix, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _scale(adjust_lr: str, rows: int, columns: int) -> float:
    return 0.2 * math.sqrt(max(rows, columns)) if adjust_lr == "match_rms_adamw" else math.sqrt(max(1.0, rows / columns))


def _decay(group: dict[str, Any], params: list[Tensor], updates: list[Tensor]) -> None:
    rate = group["lr"] * group["weight_decay"]
    if not rate:
        return
    if not group["cautious"]:
        torch._foreach_mul_(params, 1 - rate)
        return
    products = torch._foreach_mul(params, updates)
    for parameter, product in zip(params, products, strict=True):
        parameter.sub_(parameter * (product >= 0), alpha=rate)
