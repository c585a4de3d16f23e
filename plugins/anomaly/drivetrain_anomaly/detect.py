"""The judgement of a step, in a few operations on the device."""

from __future__ import annotations

import torch
from attrs import define
from torch import Tensor

FINE, LARGE_GRADIENT, LARGE_LOSS, NONFINITE_GRADIENT, NONFINITE_LOSS = range(5)  # judgements; two kinds of anomaly
_UNREACHED = 3.4e38  # a factor's limit that nothing finite passes


@define
class Detector:
    """Exponential means of loss and gradient norm over the good steps, and what they say of the next one.

    A spike is a value above `factor` times its mean, once `warmup` good steps have been seen. The mean of n good steps gives the
    newest a weight of max(1/n, 1 − decay): the plain mean at first. A bad step does not enter it.

    Args:
        factors: of the loss and of the gradient norm; infinity for no limit.
        means: of both, float32 on the device.
        seen: good steps so far, a scalar on the device.
    """

    factors: Tensor
    warmup: int
    decay: float
    means: Tensor
    seen: Tensor
    _grades: Tensor

    @classmethod
    def on(cls, device: torch.device, loss: float | None, norm: float | None, warmup: int, decay: float) -> Detector:
        """A detector that has seen nothing."""
        factors = torch.tensor([_UNREACHED if f is None else f for f in (loss, norm)], device=device)
        grades = torch.tensor(
            [LARGE_LOSS, LARGE_GRADIENT, NONFINITE_LOSS, NONFINITE_GRADIENT], dtype=torch.float, device=device
        )
        return cls(factors, warmup, decay, torch.zeros(2, device=device), torch.zeros((), device=device), grades)

    def judge(self, loss: Tensor, norm: Tensor, overflow: bool) -> Tensor:
        """FINE, or the gravest of what is wrong: a scalar on the device.

        Args:
            overflow: gradients that are not finite are the business of a loss scale: no anomaly, and no good step either.
        """
        values = torch.stack((loss, norm))
        wrong = ~torch.isfinite(values)
        finite = ~wrong.any()
        limits = torch.where(self.means > 0, self.factors * self.means, torch.inf)  # a loss may be negative: no limit then
        large = (values > limits) & (self.seen >= self.warmup) & finite
        if overflow:
            wrong = wrong & wrong[0]
        grades = torch.cat((large, wrong)) * self._grades
        enters = finite & ~large.any()
        self.seen += enters
        share = torch.clamp(1 / self.seen.clamp(min=1), min=1 - self.decay)
        self.means = torch.where(enters, torch.lerp(self.means, values, share), self.means)
        return grades.max()


def norms_of(grads: list[Tensor]) -> Tensor:
    """The 2-norm of each gradient; of a sharded one, of the whole."""
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(grads)])
    return norms.full_tensor() if hasattr(norms, "full_tensor") else norms


def worst(norms: Tensor) -> Tensor:
    """The index of the gradient to blame: one that is not finite, else the largest."""
    return torch.nan_to_num(norms, nan=torch.inf).argmax()
