"""From what a step does to how long it takes: a roofline for each operation, collectives by what connects the devices."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from drivetrain_plan.profiles import DeviceProfile
from drivetrain_plan.recorder import Collective, Operation
from drivetrain_plan.simulate import Simulation

_OVERLAPPED = 0.8  # of the time of forward and backward can hide collectives
_TIMES = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0, "broadcast": 1.0, "all-to-all": 1.0}
_HEAVY = ("exp", "silu", "sigmoid", "gelu", "tanh", "softmax", "log", "pow", "cos", "sin", "dropout", "bernoulli", "erf")
_WORST, _USUAL, _BEST = 0, 1, 2


class Times(NamedTuple):
    """Seconds: no less than `low`, no more than `high` on a machine in good order, `likely` in between."""

    low: float
    likely: float
    high: float


class StepTime(NamedTuple):
    """One step's time and what it is made of, in seconds at the usual shares."""

    total: Times
    compute: float
    communication: float
    exposed: float


def step_time(found: Simulation, device: DeviceProfile, compiled: bool = False, tf32: bool = False) -> StepTime:
    """The time of one optimizer step of the whole run.

    low: matrix products at their best rate, everything between them free (fused into them), the update at full bandwidth,
    communication hidden. high: each operation at the worst share, nothing hidden. likely: each operation at the usual share;
    compiled, half the traffic between products; communication hidden behind 80 % of forward and backward.
    """
    weights = _weights(found)
    compute = [_compute(found, device, share, weights, compiled, tf32) for share in (_WORST, _USUAL, _BEST)]
    moved = [_communication(found, device, share, weights) for share in (_WORST, _USUAL, _BEST)]
    exposed = max(0.0, moved[_USUAL] - _OVERLAPPED * compute[_USUAL])
    likely = compute[_USUAL] + exposed
    low = min(max(compute[_BEST], moved[_BEST]), likely)
    return StepTime(Times(low, likely, max(likely, compute[_WORST] + moved[_WORST])), compute[_USUAL], moved[_USUAL], exposed)


def _weights(found: Simulation) -> dict[str, int]:
    """How often each simulated phase happens in a step."""
    if found.accumulation == 1 or found.microbatches == 1:
        return {}
    before = found.accumulation - 1
    return {"forward 0": before, "backward 0": before}


def _compute(
    found: Simulation, device: DeviceProfile, share: int, weights: dict[str, int], compiled: bool, tf32: bool
) -> float:
    seconds = launches = 0.0
    for operation, count in found.operations.items():
        times = count * weights.get(operation.phase, 1)
        launches += times
        seconds += times * _operation(operation, device, share, compiled, tf32)
    launching = launches * device.launch * (0.3 if compiled else 1.0) * (2.0, 1.0, 0.5)[share]
    if device.waits:
        return seconds + launching
    return seconds if share == _BEST else max(seconds, launching)


def _operation(operation: Operation, device: DeviceProfile, share: int, compiled: bool, tf32: bool) -> float:
    if operation.flops:
        by_rate = device.product(operation.flops, _type(operation.dtype, tf32), share)
        return by_rate if device.waits else max(by_rate, device.moved(operation.traffic, share))
    if share == _BEST and operation.phase != "update":
        return 0.0
    fused = 0.5 if compiled and operation.phase != "update" else 1.0
    return fused * device.moved(operation.traffic, share, any(word in operation.name for word in _HEAVY))


def _type(dtype: torch.dtype | None, tf32: bool) -> str:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8"}
    return names.get(dtype, "tf32" if tf32 else "fp32") if dtype is not None else "fp32"


def _communication(found: Simulation, device: DeviceProfile, share: int, weights: dict[str, int]) -> float:
    return sum(
        count * weights.get(collective.phase, 1) * collective_time(collective, device, share)
        for collective, count in found.collectives.items()
    )


def collective_time(collective: Collective, device: DeviceProfile, share: int = _USUAL) -> float:
    """Rings: each of n ranks sends and receives (n − 1) / n of the whole, for all-reduce twice. Between machines every member on
    one has a network link of its own."""
    ranks = len(collective.ranks)
    if ranks < 2:
        return 0.0
    here = sum(1 for rank in collective.ranks if rank // device.per_node == collective.ranks[0] // device.per_node)
    bandwidth = device.node_bandwidth
    if here < ranks:
        bandwidth = min(bandwidth, device.network_bandwidth * here) if here > 1 else device.network_bandwidth
    volume = _TIMES.get(collective.name, 1.0) * collective.size * (ranks - 1) / ranks
    return volume / (bandwidth * device.links[share]) + device.latency * math.ceil(math.log2(ranks))
