"""Other numbers of ranks and samples from one simulated step: what is divided, what grows, who talks to whom."""

from __future__ import annotations

from collections import Counter

import attrs

from drivetrain_plan.recorder import ACTIVATIONS, TEMPORARY, Collective, Operation
from drivetrain_plan.simulate import BATCH, GRADIENTS, PARAMETERS, STATE, Simulation

_DIVIDED = (PARAMETERS, GRADIENTS, STATE)
_GROWING = (ACTIVATIONS, TEMPORARY, BATCH)


def scaled(
    found: Simulation, ranks: int, *, shards: int | None = None, microbatch: int = 1, accumulation: int = 1
) -> Simulation:
    """A step on other ranks, from one of a single microbatch. Exact for what is divided; what forward and backward make is taken
    to grow with the samples, which is a little too much.

    Args:
        found: of one process, which then becomes ddp, or of fsdp.
        shards: processes among which fsdp divides; by default all. Fewer make groups of neighbours with the same shards (HSDP).
        microbatch: samples of one, as a multiple of those simulated.
        accumulation: microbatches in a step.
    """
    sharded = found.strategy == "fsdp"
    shards = (shards or ranks) if sharded else 1
    share = found.ranks / shards if sharded else 1.0
    memory = {kind: _grown(kind, size, share, microbatch) for kind, size in found.largest.items()}
    at_peak = {kind: _grown(kind, size, share, microbatch) for kind, size in found.at_peak.items()}
    whole = found.largest.get(PARAMETERS, 0) * (found.ranks if sharded else 1)
    if sharded and accumulation > 1:  # until the last microbatch gradients are whole
        at_peak[TEMPORARY] = at_peak.get(TEMPORARY, 0) + whole
    if not sharded and (ranks > 1 or accumulation > 1):  # ddp's buckets, or what has been added up
        at_peak[GRADIENTS] = max(at_peak.get(GRADIENTS, 0), found.largest.get(GRADIENTS, 0))
    return attrs.evolve(
        found,
        ranks=ranks,
        data_ranks=ranks,
        strategy=_name(found, ranks, shards),
        at_peak=at_peak,
        largest=memory,
        operations=_operations(found, share, microbatch, accumulation),
        collectives=_collectives(found, ranks, shards, accumulation),
        accumulation=accumulation,
        samples_per_microbatch=found.samples_per_microbatch * microbatch,
        tokens=found.tokens * microbatch,
    )


def _name(found: Simulation, ranks: int, shards: int) -> str:
    if found.strategy == "fsdp":
        return "fsdp" if shards == ranks else "hsdp"
    return "ddp" if ranks > 1 else "single"


def _grown(kind: str, size: int, share: float, microbatch: int) -> int:
    return int(size * share) if kind in _DIVIDED else size * microbatch if kind in _GROWING else size


def _operations(found: Simulation, share: float, microbatch: int, accumulation: int) -> Counter[Operation]:
    changed: Counter[Operation] = Counter()
    for operation, count in found.operations.items():
        if operation.phase.startswith(("forward", "backward")):
            grown = operation._replace(flops=operation.flops * microbatch, traffic=operation.traffic * microbatch)
            changed[grown] += count * accumulation
        else:
            changed[operation._replace(traffic=int(operation.traffic * share))] += count
    return changed


def _collectives(found: Simulation, ranks: int, shards: int, accumulation: int) -> Counter[Collective]:
    changed: Counter[Collective] = Counter()
    gradients = found.largest.get(GRADIENTS, 0)
    if found.strategy != "fsdp":
        if ranks > 1:
            changed[Collective("backward 0", "all-reduce", gradients, tuple(range(ranks)))] += 1
        return changed
    for collective, count in found.collectives.items():
        gathers = collective.name == "all-gather"  # for every microbatch; gradients only at the last
        changed[collective._replace(ranks=tuple(range(shards)))] += count * (accumulation if gathers else 1)
    if shards < ranks:
        size = gradients * found.ranks // shards
        changed[Collective("backward 0", "all-reduce", size, tuple(range(0, ranks, shards)))] += 1
    return changed
