"""From what a step does to how long it takes: a roofline for each operation, collectives by what connects the devices."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from drivetrain_plan.profiles import DeviceProfile
from drivetrain_plan.recorder import Collective, Operation, Recorder
from drivetrain_plan.simulate import Simulation

_OVERLAPPED = 0.8  # of the time of forward and backward can hide collectives
_TIMES = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0, "broadcast": 1.0, "all-to-all": 1.0}
_HEAVY = ("exp", "silu", "sigmoid", "gelu", "tanh", "softmax", "log", "pow", "cos", "sin", "dropout", "bernoulli", "erf")
_WORST, _USUAL, _BEST = 0, 1, 2
_HOST_MEMORY = 5e10  # bytes/s that one process's optimizer reaches in host memory, an assumption

Shares = tuple[float, float, float]  # seconds at the worst, the usual and the best shares of what the device can do


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
    compiled, half the traffic between products; communication hidden behind 80 % of forward and backward. In all three the host
    has to launch every operation.
    """
    phases, weights = phase_seconds(found, device, compiled, tf32), weights_of(found)
    compute = [sum(seconds[share] * weights.get(phase, 1) for phase, seconds in phases.items()) for share in range(3)]
    return put_together((compute[0], compute[1], compute[2]), communication_seconds(found, device), offloading(found, device))


def put_together(compute: Shares, moved: Shares, host: float = 0.0) -> StepTime:
    """A step's time from that of its computing and its communication; `host` are seconds that host memory adds."""
    exposed = max(0.0, moved[_USUAL] - _OVERLAPPED * compute[_USUAL])
    likely = compute[_USUAL] + exposed + host
    low = min(max(compute[_BEST], moved[_BEST]), likely)
    high = max(likely, compute[_WORST] + moved[_WORST] + 2 * host)
    return StepTime(Times(low, likely, high), compute[_USUAL], moved[_USUAL], exposed)


def weights_of(found: Simulation) -> dict[str, int]:
    """How often each simulated phase happens in a step; once those that are not named."""
    if found.accumulation == 1 or found.microbatches == 1:
        return {}
    before = found.accumulation - 1
    return {"forward 0": before, "backward 0": before}


def phase_seconds(
    found: Simulation | Recorder, device: DeviceProfile, compiled: bool = False, tf32: bool = False
) -> dict[str, Shares]:
    """What each phase of a step computes, simulated or recorded from a real one, in seconds, communication left out."""
    sums: dict[str, list[float]] = {}
    launches: dict[str, int] = {}
    for operation, count in found.operations.items():
        row = sums.setdefault(operation.phase, [0.0, 0.0, 0.0])
        launches[operation.phase] = launches.get(operation.phase, 0) + count
        for share in range(3):
            row[share] += count * _operation(operation, device, share, compiled, tf32)
    return {phase: _launched(row, launches[phase], device, compiled) for phase, row in sums.items()}


def _launched(seconds: list[float], launches: int, device: DeviceProfile, compiled: bool) -> Shares:
    """With the host's time for each operation: it adds to its own work, and runs beside an accelerator's."""
    each = device.launch * (0.3 if compiled else 1.0)
    host = [launches * each * factor for factor in (2.0, 1.0, 0.5)]
    both = [a + b if device.waits else max(a, b) for a, b in zip(seconds, host, strict=True)]
    return both[0], both[1], both[2]


def _operation(operation: Operation, device: DeviceProfile, share: int, compiled: bool, tf32: bool) -> float:
    if operation.flops:
        by_rate = device.product(operation.flops, rate_of(operation.dtype, tf32), share)
        return by_rate if device.waits else max(by_rate, device.moved(operation.traffic, share))
    if share == _BEST and operation.phase != "update":
        return 0.0
    fused = 0.5 if compiled and operation.phase != "update" else 1.0
    return fused * device.moved(operation.traffic, share, any(word in operation.name for word in _HEAVY))


def rate_of(dtype: torch.dtype | None, tf32: bool) -> str:
    """The name of the rate in a device's profile."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8"}
    return names.get(dtype, "tf32" if tf32 else "fp32") if dtype is not None else "fp32"


def offloading(found: Simulation, device: DeviceProfile) -> float:
    """Seconds of a step in which shards cross to the device and back, and the host updates them; 0 without `cpu_offload`."""
    if not found.host:
        return 0.0
    parameters, gradients = found.host.get("parameters", 0), found.host.get("gradients", 0)
    crossing = (2 * parameters + gradients) / device.host_bandwidth
    return crossing + 2 * sum(found.host.values()) / _HOST_MEMORY


def communication_seconds(found: Simulation, device: DeviceProfile) -> Shares:
    """Of all collectives of a step."""
    weights = weights_of(found)
    sums = [
        sum(
            count * weights.get(collective.phase, 1) * collective_time(collective, device, share)
            for collective, count in found.collectives.items()
        )
        for share in range(3)
    ]
    return sums[0], sums[1], sums[2]


def collective_time(collective: Collective, device: DeviceProfile, share: int = _USUAL) -> float:
    """Volume as on a ring: each of n ranks sends and receives (n − 1) / n of the whole, for all-reduce twice. Between machines every
    member on one has a network link of its own.

    Hops as NCCL has them: n − 1 around a ring for all-gather and reduce-scatter, at best log2(n) (its PAT algorithm); log2(n) along a
    tree for all-reduce and broadcast.
    """
    ranks = len(collective.ranks)
    if ranks < 2:
        return 0.0
    here = sum(1 for rank in collective.ranks if rank // device.per_node == collective.ranks[0] // device.per_node)
    bandwidth = device.node_bandwidth
    if here < ranks:
        bandwidth = min(bandwidth, device.network_bandwidth * here) if here > 1 else device.network_bandwidth
    volume = _TIMES.get(collective.name, 1.0) * collective.size * (ranks - 1) / ranks
    around = share != _BEST and collective.name in ("all-gather", "reduce-scatter")
    hops = ranks - 1 if around else math.ceil(math.log2(ranks))
    return volume / (bandwidth * device.links[share]) + device.latency * hops
