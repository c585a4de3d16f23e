"""The judgement of a step: a comparison of numbers at hand, or a few operations on the device; more when limits are renewed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from attrs import define, field
from torch import Tensor

from drivetrain import at_hand

NO_LIMIT = 3.4e38  # below fp32's largest number: nothing finite passes it, while NaN and infinity are never under it

Scalar = Tensor | float
Judge = Callable[[Tensor, Tensor, Tensor], Tensor]
JudgeAtHand = Callable[[float, float, Sequence[float]], bool]


def known(value: Tensor) -> Scalar:
    """A scalar's number if it is at hand, else itself."""
    number = at_hand(value)
    return value if number is None else number


def column(values: Sequence[Scalar]) -> Tensor:
    """Scalars of one kind as one tensor, float32 if they are numbers."""
    return torch.stack(list(values)) if isinstance(values[0], Tensor) else torch.tensor(values, dtype=torch.float32)  # type: ignore[arg-type]


class Unread(NamedTuple):
    """A step that no logging step has read yet. What is on the device stays there until then; what is at hand is a number."""

    step: int
    epoch: int
    window: int
    names: list[str] | None  # of the gradients it had; None: all
    loss: Scalar
    norm: Scalar
    norms: Tensor | None  # of each gradient, or of this process's part of it
    limits: list[Scalar]  # of loss and norm at the time


@define
class Detector:
    """Exponential means of loss and gradient norm over the good steps, and the limits that follow from them.

    A spike is a value above `factor` times its mean, once `warmup` good steps have been seen. The mean of n good steps gives the
    newest a weight of max(1/n, 1 − decay): the plain mean at first. A bad step does not enter it. Means and limits are renewed
    now and then, from all values since: two dozen operations then, instead of one dozen in each step.

    Args:
        factors: of the loss and of the gradient norm; `NO_LIMIT` for no limit.
        means: of both, float32 on the device.
        seen: good steps so far, a scalar on the device.
        limits: above which a value is a spike, float32 on the device; never changed in place.
        known_limits: the same two, as numbers if they are at hand.
        fresh: loss and gradient norm of each step since the last renewal.
    """

    factors: Tensor
    warmup: int
    decay: float
    means: Tensor
    seen: Tensor
    limits: Tensor
    fresh: list[Scalar] = field(factory=list)
    known_limits: list[Scalar] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._set_limits(self.limits)

    def _set_limits(self, limits: Tensor) -> None:
        self.limits, self.known_limits = limits, [known(limit) for limit in limits]

    @classmethod
    def on(cls, device: torch.device, loss: float | None, norm: float | None, warmup: int, decay: float) -> Detector:
        """A detector that has seen nothing."""
        factors = torch.tensor([NO_LIMIT if f is None else f for f in (loss, norm)], device=device)
        none = torch.full((2,), NO_LIMIT, device=device)
        return cls(factors, warmup, decay, torch.zeros(2, device=device), torch.zeros((), device=device), none)

    def renew(self) -> None:
        """Take the fresh values into the means, and set the limits by them."""
        fresh, self.fresh = self.fresh, []
        if isinstance(fresh[0], float):
            self._follow(fresh[::2], fresh[1::2])
        else:
            self._follow_on_device(column(fresh).view(-1, 2))
        warm = (self.seen >= self.warmup) & (self.means > 0)  # a loss may be negative: no limit then
        self._set_limits(torch.where(warm, (self.factors * self.means).clamp(max=NO_LIMIT), NO_LIMIT))

    def _follow(self, losses: Sequence[Scalar], norms: Sequence[Scalar]) -> None:
        """Of numbers at hand, as are then the limits, the means and the count."""
        seen, loss_mean, norm_mean = known(self.seen), *map(known, self.means)
        most_loss, most_norm = self.known_limits
        for loss, norm in zip(losses, norms, strict=True):
            if loss <= most_loss and norm <= most_norm:
                seen += 1
                share = max(1 / seen, 1 - self.decay)
                loss_mean += share * (loss - loss_mean)
                norm_mean += share * (norm - norm_mean)
        self.means, self.seen = torch.tensor([loss_mean, norm_mean]), torch.tensor(seen)

    def _follow_on_device(self, values: Tensor) -> None:
        """The same without a loop."""
        good = (values <= self.limits).all(dim=1)
        count = self.seen + good.cumsum(0)
        share = good * torch.clamp(1 / count.clamp(min=1), min=1 - self.decay)
        kept = (1 - share).flip(0).cumprod(0).flip(0)  # of what was there before each value
        after = torch.cat((kept[1:], kept.new_ones(1)))
        added = (torch.where(good[:, None], values, 0.0) * (share * after)[:, None]).sum(0)
        self.means, self.seen = self.means * kept[0] + added, count[-1]

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that the next judgements follow from."""
        state = {"means": self.means, "seen": self.seen, "limits": self.limits}
        return state | {"fresh": column(self.fresh) if self.fresh else self.means[:0]}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave; the tensors are copied."""
        device = self.seen.device
        self.means, self.seen, limits = (saved[key].to(device, copy=True) for key in ("means", "seen", "limits"))
        self._set_limits(limits)
        self.fresh = [known(value) for value in saved["fresh"].to(device, copy=True)]


def norms_of(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of each gradient; of a sharded one, of the whole."""
    values = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(values)])
    return norms.full_tensor() if hasattr(norms, "full_tensor") else norms


def worst(norms: Sequence[float]) -> int:
    """The index of the gradient to blame: one that is not finite, else the largest."""
    return int(torch.nan_to_num(torch.tensor(norms), nan=torch.inf).argmax())


def judge_for(device: torch.device, loss_counts: bool, loss_is_limited: bool, spikes: bool, nonfinite: bool) -> Judge | None:
    """What tells on the device whether a step is to be vetoed: a function of loss, gradient norm and limits; None when none ever is.

    Args:
        loss_counts: with several ranks, one rank's share of the loss must not decide: then the norm does, in which a NaN of any is.
        loss_is_limited: `limits` are those of loss and norm, otherwise of the norm alone.
        spikes, nonfinite: what is to be vetoed.
    """
    zero = torch.zeros((), device=device)

    def only_spikes(loss: Tensor, norm: Tensor, limits: Tensor) -> Tensor:
        values = torch.stack((loss, norm)) if loss_is_limited else norm
        return ((values > limits) & values.isfinite()).any()

    def of_both(loss: Tensor, norm: Tensor, limits: Tensor) -> Tensor:
        return torch.le(torch.stack((loss, norm)), limits).all().logical_not()

    def of_norm(loss: Tensor, norm: Tensor, limits: Tensor) -> Tensor:
        return torch.le(norm, limits).logical_not()

    def of_norm_and_nan(loss: Tensor, norm: Tensor, limits: Tensor) -> Tensor:
        return torch.le(torch.addcmul(norm, loss, zero), limits).logical_not()  # what is not finite, times 0, is NaN

    if not nonfinite:
        return only_spikes if spikes else None
    return of_both if loss_is_limited else of_norm_and_nan if loss_counts else of_norm


def judge_at_hand(loss_counts: bool, loss_is_limited: bool, spikes: bool, nonfinite: bool) -> JudgeAtHand | None:
    """The same for numbers, whose limits are those of loss and norm in any case."""

    def only_spikes(loss: float, norm: float, limits: Sequence[float]) -> bool:
        return limits[1] < norm < math.inf or (loss_is_limited and limits[0] < loss < math.inf)

    def of_both(loss: float, norm: float, limits: Sequence[float]) -> bool:
        return not (norm <= limits[1] and loss <= limits[0])

    def of_norm(loss: float, norm: float, limits: Sequence[float]) -> bool:
        return not norm <= limits[1]

    def of_norm_and_nan(loss: float, norm: float, limits: Sequence[float]) -> bool:
        return not (norm <= limits[1] and math.isfinite(loss))

    if not nonfinite:
        return only_spikes if spikes else None
    return of_both if loss_is_limited else of_norm_and_nan if loss_counts else of_norm
