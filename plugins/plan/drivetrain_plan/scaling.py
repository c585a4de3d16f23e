"""Other numbers of ranks and samples from two simulated steps: what is divided, what grows, who talks to whom.

The moment of the peak is not the same for every size, so memory is fitted at every moment of the step: between two microbatch sizes
each change of memory is a line, and the peak is looked for anew on each.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from drivetrain_plan.profiles import DeviceProfile
from drivetrain_plan.recorder import BEFORE, TEMPORARY, Collective
from drivetrain_plan.roofline import Shares, StepTime, collective_time, offloading, phase_seconds, put_together
from drivetrain_plan.simulate import GRADIENTS, PARAMETERS, STATE, Change, Simulation

_DIVIDED = (PARAMETERS, GRADIENTS, STATE)


class Size(NamedTuple):
    """One way to divide a run.

    Attributes:
        shards: processes among which parameters are divided; 1 where each has them whole.
        microbatch: samples.
        accumulation: microbatches in a step.
    """

    ranks: int
    shards: int
    microbatch: int
    accumulation: int


@frozen
class _Moments:
    """Bytes at every change of memory, as constant + slope × samples; `divided` ones for the simulated shards."""

    constant: Tensor
    slope: Tensor
    divided: Tensor
    gradients: Tensor  # those of them that are gradients, not in `divided`
    made: Tensor  # what a gradient takes that is made at this moment
    in_microbatch: Tensor  # bool


@frozen
class Family:
    """All sizes of one step, from two of a single microbatch; they may be the same where only the ranks change.

    Args:
        small, large: simulated with different microbatch sizes: of one process, which then becomes ddp, or of fsdp.
        tensor: processes that compute one model together.
    """

    small: Simulation
    large: Simulation
    tensor: int = 1
    _moments: list[_Moments] = field(factory=list, init=False, repr=False, eq=False)
    _seconds: dict[tuple[int, bool, bool], list[dict[str, Shares]]] = field(factory=dict, init=False, repr=False, eq=False)

    @property
    def sharded(self) -> bool:
        """Whether fsdp divides the parameters."""
        return self.small.strategy == "fsdp"

    @property
    def _shards(self) -> int:
        return self.small.data_ranks if self.sharded else 1

    def peak(self, size: Size) -> int:
        """Bytes of a rank at the peak."""
        if not self._moments:
            self._moments.append(_moments(self.small, self.large))
        moments, share = self._moments[0], self._shards / size.shards
        fixed = moments.constant + moments.slope * size.microbatch + moments.divided * share
        own = fixed + moments.gradients * share
        if not (size.accumulation > 1 or (not self.sharded and size.ranks > 1)):
            return int(own.max())
        # What earlier microbatches have added up is there all the time, with fsdp not yet divided; so are ddp's buckets, into which
        # it goes only at the last one.
        whole = self._shards if self.sharded else 1
        copies = (size.accumulation > 1) + (not self.sharded and size.ranks > 1)
        held = self.small.largest.get(GRADIENTS, 0) * whole * copies
        within = (fixed + held + moments.made * whole)[moments.in_microbatch]
        return int(max(within.max(), own[~moments.in_microbatch].max()))

    def simulation(self, size: Size) -> Simulation:
        """What is known of a step of this size; kinds of memory as in the smaller one, the peak as it is fitted."""
        peak, known = self.peak(size), self.small.peak
        accumulation = 1 if size.accumulation == 1 else 2
        return evolve(
            self.small,
            ranks=size.ranks,
            data_ranks=size.ranks // self.tensor,
            strategy=self._name(size),
            at_peak={kind: round(part * peak / known) for kind, part in self.small.at_peak.items()},
            collectives=self.collectives(size),
            microbatches=accumulation,
            accumulation=size.accumulation,
            samples_per_microbatch=size.microbatch,
            tokens=self.small.tokens * size.microbatch // max(1, self.small.samples_per_microbatch),
        )

    def _name(self, size: Size) -> str:
        if self.sharded:
            return "fsdp" if size.shards * self.tensor == size.ranks else "hsdp"
        return "ddp" if size.ranks > 1 else "single"

    def time(self, size: Size, device: DeviceProfile, compiled: bool = False, tf32: bool = False) -> StepTime:
        """A step's time: forward and backward on the line between the two, the update for as much as a rank holds."""
        key = (id(device), compiled, tf32)
        if key not in self._seconds:
            self._seconds[key] = [phase_seconds(one, device, compiled, tf32) for one in (self.small, self.large)]
        small, large = self._seconds[key]
        share = self._shards / size.shards
        total = [0.0, 0.0, 0.0]
        for phase, seconds in small.items():
            for at in range(3):
                if phase.startswith(("forward", "backward")):
                    total[at] += size.accumulation * self._on_line(seconds[at], large[phase][at], size.microbatch)
                else:
                    total[at] += seconds[at] * share
        moved = [0.0, 0.0, 0.0]
        for collective, count in self.collectives(size).items():
            for at in range(3):
                moved[at] += count * collective_time(collective, device, at)
        return put_together(
            (total[0], total[1], total[2]), (moved[0], moved[1], moved[2]), offloading(self.small, device) * share
        )

    def _on_line(self, small: float, large: float, samples: int) -> float:
        a, b = self.small.samples_per_microbatch, self.large.samples_per_microbatch
        return small if a == b else max(0.0, small + (large - small) * (samples - a) / (b - a))

    def collectives(self, size: Size) -> Counter[Collective]:
        """Of a whole step."""
        changed: Counter[Collective] = Counter()
        gradients = self.small.largest.get(GRADIENTS, 0) or self.small.host.get(GRADIENTS, 0)
        if not self.sharded:
            if size.ranks > 1:
                changed[Collective("backward 1", "all-reduce", gradients, tuple(range(size.ranks)))] += 1
            return changed
        within = tuple(range(self.tensor))
        shards = tuple(range(0, size.shards * self.tensor, self.tensor))
        for collective, count in self.small.collectives.items():
            micro = collective.phase.startswith(("forward", "backward"))
            if self.tensor > 1 and collective.ranks == within:  # activations, for every microbatch
                grown = (
                    collective.size * size.microbatch // max(1, self.small.samples_per_microbatch) if micro else collective.size
                )
                changed[collective._replace(size=grown)] += count * (size.accumulation if micro else 1)
            else:  # parameters for every microbatch, gradients only at the last
                gathers = micro and collective.name == "all-gather"
                changed[collective._replace(ranks=shards)] += count * (size.accumulation if gathers else 1)
        if size.shards * self.tensor < size.ranks:
            mine = gradients * self._shards // size.shards
            changed[Collective("backward 1", "all-reduce", mine, tuple(range(0, size.ranks, len(shards) * self.tensor)))] += 1
        return changed


def _moments(small: Simulation, large: Simulation) -> _Moments:
    first, second = small.trace, large.trace
    a, b = small.samples_per_microbatch, large.samples_per_microbatch
    if [change[:2] for change in first] != [change[:2] for change in second]:
        # not the same course: all that the larger one takes counts as growing with its samples, which is too much for more of them
        first, a = [Change(c.kind, c.phase, c.size if _fixed(c) else 0) for c in second], 0
    sizes = torch.tensor([[c.size for c in first], [c.size for c in second]], dtype=torch.float64)
    slope = (sizes[1] - sizes[0]) / (b - a) if a != b else torch.zeros_like(sizes[0])
    constant = sizes[0] - slope * a
    is_gradient = torch.tensor([c.kind == GRADIENTS for c in first])
    is_divided = torch.tensor([_is_divided(c) for c in first]) & ~is_gradient

    def running(chosen: Tensor, values: Tensor) -> Tensor:
        return torch.where(chosen, values, torch.zeros_like(values)).cumsum(0)

    rest = ~(is_gradient | is_divided)
    return _Moments(
        constant=running(rest, constant),
        slope=running(rest, slope),
        divided=running(is_divided, sizes[0]),
        gradients=running(is_gradient, sizes[0]),
        made=torch.where(is_gradient, sizes[0].clamp(min=0), torch.zeros_like(slope)),
        in_microbatch=torch.tensor([c.phase.startswith(("forward", "backward")) for c in first]),
    )


def _fixed(change: Change) -> bool:
    return change.kind in _DIVIDED or change.phase in ("update", BEFORE)


def _is_divided(change: Change) -> bool:
    """Kept in shards, or made in the update, which works on shards."""
    return change.kind in _DIVIDED or (change.kind == TEMPORARY and change.phase == "update")
