"""`--sweep`: what else could be tried, and which of it is cheapest, fastest, or needs the fewest devices."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from typing import Any

import attrs

from drivetrain import ConfigError, DrivetrainError, Problem, TrainingConfig, is_installed
from drivetrain_plan.planning import _RESERVED, _for_device
from drivetrain_plan.profiles import DeviceProfile, load_profile
from drivetrain_plan.report import amount, count, seconds
from drivetrain_plan.roofline import Times, step_time
from drivetrain_plan.scaling import scaled
from drivetrain_plan.simulate import GRADIENTS, PARAMETERS, STATE, Simulation, simulate

_RANKS = (1, 2, 4, 8, 16, 32, 64)
_CHECKPOINTING: tuple[Any, ...] = (False, "selective", True)
_MOST_PER_DEVICE = 64  # samples in a microbatch


@attrs.frozen
class Candidate:
    """One way to run it."""

    ranks: int
    changes: dict[str, Any]
    simulation: Simulation
    time: Times

    @property
    def devices_seconds(self) -> float:
        """Device seconds of a step, which always has the same samples: what is paid for."""
        return self.ranks * self.time.likely

    def named(self) -> str:
        """In a few words."""
        kept = self.changes["activation_checkpointing"]
        checkpointing = {False: "", True: ", checkpointing", "selective": ", selective checkpointing"}[kept]
        optimizer = f", {self.changes['optimizer']}" if "optimizer" in self.changes else ""
        micro = f"{self.changes['per_device_batch_size']} × {self.simulation.accumulation}"
        return f"{self.simulation.strategy}, {micro} samples{checkpointing}{optimizer}"


@attrs.frozen
class Sweep:
    """What was tried.

    Attributes:
        frontier: "cheapest", "fastest" and "fewest devices", each the best that fits.
        tried: all, the ones that do not fit included.
    """

    config: TrainingConfig
    device: DeviceProfile
    samples: int
    frontier: dict[str, Candidate]
    tried: list[Candidate]
    notes: list[str]

    def chosen(self) -> TrainingConfig:
        """The cheapest as a configuration, what was changed with the origin "plan".

        Raises:
            DrivetrainError: when nothing fits.
        """
        if not self.frontier:
            raise DrivetrainError(f"nothing that was tried fits {self.device.name}.")
        config = copy.copy(self.config)
        config.gradient_accumulation_steps = 1
        changes = self.frontier["cheapest"].changes
        for key, value in changes.items():
            setattr(config, key, value)
        config._origins |= dict.fromkeys(changes, "plan")
        return config


def sweep(config: TrainingConfig, device: str | DeviceProfile = "auto", ranks: int | None = None) -> Sweep:
    """Try strategies, checkpointing, microbatch sizes, optimizers and numbers of ranks, with the same samples in each step.

    A few steps are simulated, and the rest is scaled from them.

    Raises:
        DrivetrainError: when the run cannot be put together.
    """
    profile = load_profile(device) if isinstance(device, str) else device
    notes: list[str] = []
    config = _for_device(config, profile, notes)
    samples = config.global_batch_size or config.per_device_batch_size * config.gradient_accumulation_steps
    tried: list[Candidate] = []
    for base, changes in _simulated(config, profile, notes):
        tried += _variants(base, changes, samples, _RANKS if ranks is None else (ranks,), profile)
    if not tried:
        raise ConfigError([Problem("--ranks", f"{samples} samples of a step cannot be shared among {ranks} ranks")])
    usable = profile.memory * (1 - _RESERVED)
    fitting = [candidate for candidate in tried if candidate.simulation.peak <= usable]
    frontier = {}
    if fitting:
        frontier = {
            "cheapest": min(fitting, key=lambda c: (c.devices_seconds, c.ranks)),
            "fastest": min(fitting, key=lambda c: (c.time.likely, c.ranks)),
            "fewest devices": min(fitting, key=lambda c: (c.ranks, c.time.likely)),
        }
    return Sweep(config, profile, samples, frontier, tried, notes)


def _simulated(config: TrainingConfig, profile: DeviceProfile, notes: list[str]) -> Iterator[tuple[Simulation, dict[str, Any]]]:
    """One step of one microbatch of one sample for each way of its own."""
    usable = profile.memory * (1 - _RESERVED)
    whole = 0.0
    for strategy, ranks in (("fsdp", 2), ("none", 1)):
        if strategy == "fsdp" and not is_installed("strategy", "fsdp"):
            continue
        if strategy == "none" and whole > usable:
            notes.append(f"one process, and ddp, were left out: weights, gradients and optimizer state take {amount(whole)}")
            continue
        for checkpointing in _CHECKPOINTING:
            changes = {"distributed": strategy, "activation_checkpointing": checkpointing}
            try:
                found = simulate(_changed(config, changes), ranks, profile.per_node)
            except DrivetrainError as error:
                notes.append(f"{strategy}, checkpointing {checkpointing}: {str(error).strip().splitlines()[-1].strip()}")
                continue
            if not found.complete:
                notes.extend(found.problems[:1])
                continue
            whole = ranks * sum(found.largest.get(kind, 0) for kind in (PARAMETERS, GRADIENTS, STATE))
            yield found, changes
        if strategy == "none" and _is_adamw(config) and is_installed("optimizer", "adamw_8bit"):
            changes = {"distributed": strategy, "activation_checkpointing": True, "optimizer": "adamw_8bit"}
            yield simulate(_changed(config, changes), ranks, profile.per_node), changes


def _is_adamw(config: TrainingConfig) -> bool:
    name = config.optimizer["use"] if isinstance(config.optimizer, dict) else config.optimizer
    return name in (None, "adamw")


def _changed(config: TrainingConfig, changes: dict[str, Any]) -> TrainingConfig:
    changed = copy.copy(config)
    changed.per_device_batch_size, changed.gradient_accumulation_steps, changed.global_batch_size = 1, 1, None
    for key, value in changes.items():
        setattr(changed, key, value)
    return changed


def _variants(
    base: Simulation, changes: dict[str, Any], samples: int, all_ranks: tuple[int, ...], profile: DeviceProfile
) -> Iterator[Candidate]:
    sharded = base.strategy == "fsdp"
    for ranks in all_ranks:
        if samples % ranks or (sharded and ranks == 1):
            continue
        share = samples // ranks
        for size in (2**i for i in range(7)):
            if share % size or size > _MOST_PER_DEVICE:
                continue
            groups = {ranks, profile.per_node} if sharded and ranks > profile.per_node else {ranks}
            for shards in sorted(groups):
                found = scaled(base, ranks, shards=shards, microbatch=size, accumulation=share // size)
                named = "none" if ranks == 1 else "ddp" if not sharded else "fsdp"
                strategy: Any = {"use": "fsdp", "shards": shards} if shards < ranks else named
                settings = {**changes, "distributed": strategy, "per_device_batch_size": size, "global_batch_size": samples}
                yield Candidate(ranks, settings, found, step_time(found, profile).total)


# -- showing -------------------------------------------------------------------------------------------------------------------


def command(config: TrainingConfig, arguments: argparse.Namespace) -> int:
    """Print the frontier; 1 when nothing fits."""
    found = sweep(config, arguments.device, arguments.ranks)
    print(json.dumps(_data(found), indent=2) if arguments.json else text(found, arguments.price))
    if arguments.write is not None and found.frontier:
        found.chosen().save(arguments.write)
        print(f"wrote {arguments.write}: the cheapest")
    return 0 if found.frontier else 1


def _data(found: Sweep) -> dict[str, Any]:
    return {
        "device": found.device.name,
        "samples_per_step": found.samples,
        "tried": len(found.tried),
        "notes": found.notes,
        "frontier": {
            name: {"ranks": c.ranks, "peak": c.simulation.peak, "step_seconds": c.time.likely, "changes": c.changes}
            for name, c in found.frontier.items()
        },
    }


def text(found: Sweep, price: float | None = None) -> str:
    """For people."""
    usable = found.device.memory * (1 - _RESERVED)
    fitting = sum(c.simulation.peak <= usable for c in found.tried)
    lines = [f"{len(found.tried)} ways tried on {found.device.name}, {fitting} fit; {found.samples} samples in each step", ""]
    if not found.frontier:
        least = min(found.tried, key=lambda c: c.simulation.peak)
        lines.append(
            f"nothing fits: the least memory is {amount(least.simulation.peak)} of {amount(usable)}, {least.ranks} ranks:"
        )
        lines.append(f"  {least.named()}")
        return "\n".join([*lines, *(f"! {note}" for note in found.notes)])
    lines.append(
        f"{'':<15}{'devices':>8}{'memory':>12}{'a step':>10}{'tokens/s':>10}  {'device s' if price is None else 'cost'}"
    )
    for name, c in found.frontier.items():
        tokens = c.simulation.tokens * c.simulation.accumulation * c.ranks / c.time.likely
        paid = f"{c.devices_seconds:.3g}" if price is None else f"{c.devices_seconds / 3600 * price:.2g} a step"
        row = f"{name:<15}{c.ranks:>8}{amount(c.simulation.peak):>12}{seconds(c.time.likely):>10}{count(tokens):>10}  {paid}"
        lines += [row, f"  {c.named()}"]
    return "\n".join([*lines, "", *_why(found, usable), *(f"! {note}" for note in found.notes)])


def _why(found: Sweep, usable: float) -> list[str]:
    cheapest, fewest = found.frontier["cheapest"], found.frontier["fewest devices"]
    lines = [f"cheapest: of all that fit it spends the fewest device seconds on a step, {cheapest.devices_seconds:.3g}"]
    lighter = [c for c in found.tried if c.ranks == cheapest.ranks and not c.changes["activation_checkpointing"]]
    if cheapest.changes["activation_checkpointing"] and lighter:
        least = min(c.simulation.peak for c in lighter)
        if least > usable:
            lines.append(f"  without checkpointing it would need at least {amount(least)} on each of {cheapest.ranks}")
    fewer = [c for c in found.tried if c.ranks < fewest.ranks]
    if fewer:
        least = min(c.simulation.peak for c in fewer)
        lines.append(f"fewest devices: on fewer the least memory is {amount(least)}, of {amount(usable)} usable")
    lines.append("scaled from a few simulated steps; plan the chosen one to see it whole")
    return lines
