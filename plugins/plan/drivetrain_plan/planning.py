"""The answer: memory, time, cost and the run's course, from a simulated step and a device's profile."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from drivetrain import ConfigError, DrivetrainError, Duration, Problem, Trainer, TrainingConfig
from drivetrain_plan.profiles import DeviceProfile, load_profile
from drivetrain_plan.roofline import StepTime, step_time
from drivetrain_plan.simulate import Simulation, simulate

DISK = 2e9  # bytes/s that a file system takes, an assumption
_RESERVED = 0.06  # of a device's memory: the driver's, fragments of the allocator, communication


@attrs.frozen(kw_only=True)
class Course:
    """The run from its beginning to its end, as far as it can be known ahead."""

    steps: float | None  # None when the data has no length, or the run is measured in time
    tokens: float | None
    samples: float
    milestones: list[tuple[float, str]]


@attrs.frozen(kw_only=True)
class Plan:
    """What a run needs. Everything but the numbers of parameters is an estimate; `assumptions` says on what grounds."""

    config: TrainingConfig
    ranks: int
    device: DeviceProfile
    simulation: Simulation
    step: StepTime
    course: Course
    price: float | None
    assumptions: list[str]

    @property
    def usable(self) -> float:
        """Bytes of a device that a run may take."""
        return self.device.memory * (1 - _RESERVED)

    @property
    def fits(self) -> bool | None:
        """Whether a rank's peak fits its device; None when the step could not be simulated."""
        if not self.simulation.complete:
            return None if self.simulation.peak <= self.usable else False
        return self.simulation.peak <= self.usable

    @property
    def tokens_per_step(self) -> int:
        """Of all ranks together; samples where batches have no tokens."""
        found = self.simulation
        return (found.tokens or found.samples_per_microbatch) * found.accumulation * found.data_ranks

    @property
    def unit(self) -> str:
        """What throughput is counted in."""
        return "tokens" if self.simulation.tokens else "samples"

    def rate(self, seconds: float) -> float:
        """Tokens (or samples) per second of all ranks."""
        return self.tokens_per_step / seconds if seconds else 0.0

    @property
    def flops_per_token(self) -> float:
        """FLOPs as executed, recomputation included, for each token (or sample)."""
        found = self.simulation
        counted = {p: n for p, n in _flops_by_phase(found).items() if p.endswith(" 0")}
        return sum(counted.values()) / max(1, found.tokens or found.samples_per_microbatch) * _share_of_model(found)

    @property
    def hours(self) -> tuple[float, float, float] | None:
        """Of the whole run: low, likely, high."""
        if self.course.steps is None or not self.simulation.complete:
            return None
        low, likely, high = (seconds * self.course.steps / 3600 for seconds in self.step.total)
        return low, likely, high

    def to_dict(self) -> dict[str, Any]:
        """As plain data, in bytes and seconds."""
        found, (low, likely, high) = self.simulation, self.step.total
        return {
            "ranks": self.ranks,
            "strategy": found.strategy,
            "precision": found.precision,
            "device": self.device.name,
            "parameters": found.parameters,
            "trainable": found.trainable,
            "memory": {
                "peak": found.peak,
                "by_kind": found.at_peak,
                "largest": found.largest,
                "usable": self.usable,
                "fits": self.fits,
            },
            "flops_per_token": self.flops_per_token if found.complete else None,
            "communication": [
                {"collective": name, "count": count, "bytes": size, "ranks": ranks}
                for (name, ranks), (count, size) in communication(found).items()
            ],
            "step_seconds": {"low": low, "likely": likely, "high": high} if found.complete else None,
            f"{self.unit}_per_step": self.tokens_per_step,
            f"{self.unit}_per_second": self.rate(likely) if found.complete else None,
            "steps": self.course.steps,
            "tokens": self.course.tokens,
            "milestones": [{"step": step, "what": what} for step, what in self.course.milestones],
            "hours": self.hours,
            "gpu_hours": None if self.hours is None else self.hours[1] * self.ranks,
            "cost": self.cost,
            "checkpoint": {"bytes": found.whole, "save_seconds": found.whole / DISK, "stall_seconds": self.stall},
            "problems": found.problems,
            "assumptions": self.assumptions,
        }

    @property
    def stall(self) -> float:
        """Seconds that training waits for a checkpoint's copy in host memory."""
        return self.simulation.whole / self.device.host_bandwidth

    @property
    def cost(self) -> float | None:
        """Of the whole run at `price` for each device and hour."""
        return None if self.hours is None or self.price is None else self.hours[1] * self.ranks * self.price

    def __str__(self) -> str:
        from drivetrain_plan.report import report

        return report(self)


def communication(found: Simulation) -> dict[tuple[str, int], tuple[int, int]]:
    """By collective and number of ranks: how often in a step, and bytes in all."""
    rows: dict[tuple[str, int], tuple[int, int]] = {}
    before = found.accumulation - 1 if found.microbatches > 1 else 1
    for collective, count in found.collectives.items():
        times = count * (before if collective.phase.endswith(" 0") else 1)
        key = (collective.name, len(collective.ranks))
        known = rows.get(key, (0, 0))
        rows[key] = known[0] + times, known[1] + times * collective.size
    return rows


def _flops_by_phase(found: Simulation) -> Counter[str]:
    sums: Counter[str] = Counter()
    for operation, count in found.operations.items():
        sums[operation.phase] += operation.flops * count
    return sums


def _share_of_model(found: Simulation) -> float:
    """Ranks that compute one model together have a share of its arithmetic each."""
    return found.ranks / found.data_ranks


def plan(
    run: Trainer | TrainingConfig,
    ranks: int = 1,
    device: str | DeviceProfile = "auto",
    price: float | None = None,
    **given: Any,
) -> Plan:
    """Plan a run without running it.

    Args:
        run: a configuration, or a trainer that has not trained yet and is one process; its objects are copied without memory.
        ranks: processes to simulate.
        device: a profile, its name, or a TOML file.
        price: of one device for one hour.
        given: with a configuration, what `Trainer` would be given besides: model, train_dataset, loss, step, …

    Raises:
        DrivetrainError: when the run cannot be put together at all. What else could not be simulated is in `simulation.problems`.
    """
    profile = load_profile(device) if isinstance(device, str) else device
    if ranks < 1:
        raise ConfigError([Problem("--ranks", f"must be at least 1, got {ranks}")])
    if isinstance(run, Trainer):
        run, given = _taken_apart(run)
    assumptions: list[str] = []
    config = _for_device(run, profile, assumptions)
    found, used = _simulated(config, ranks, profile, given, assumptions)
    compiled = bool(config.compile)
    if compiled:
        assumptions.append("torch.compile: memory as without it (it needs less), half the traffic between matrix products")
    time = step_time(found, profile, compiled, tf32=found.precision == "tf32")
    return Plan(
        config=used,
        ranks=found.ranks,
        device=profile,
        simulation=found,
        step=time,
        course=course(config, found),
        price=price,
        assumptions=[*assumptions, *_grounds(config, profile)],
    )


def _taken_apart(trainer: Trainer) -> tuple[TrainingConfig, dict[str, Any]]:
    """A trainer's configuration and the objects that it was given."""
    if trainer.ctx.strategy.world_size > 1 or trainer.ctx.step:
        raise DrivetrainError("plan: give a trainer of one process that has not trained yet, or its configuration.")
    given = trainer.ctx.run.given
    names = {
        "model": "model",
        "train_dataset": "train_dataset",
        "loss": "loss",
        "step": "step",
        "data_collator": "collator",
        "precision": "precision",
    }
    objects = {name: getattr(given, field) for name, field in names.items()}
    if isinstance(given.optimizer, (str, Mapping)):
        objects["optimizer"] = given.optimizer
    elif given.optimizer is not None:
        raise DrivetrainError(
            "plan: the trainer has a ready optimizer, whose parameters have memory; name it in the configuration."
        )
    return trainer.config, {name: value for name, value in objects.items() if value is not None}


def _for_device(config: TrainingConfig, profile: DeviceProfile, assumptions: list[str]) -> TrainingConfig:
    """The configuration as it would turn out on that device."""
    changed = copy.copy(config)
    if not profile.waits and changed.precision in (None, "auto") and "bf16" in profile.rates:
        changed.precision = "bf16"
        assumptions.append(f"precision: bf16, which {profile.name} computes in hardware")
    name = changed.optimizer["use"] if isinstance(changed.optimizer, Mapping) else changed.optimizer
    if isinstance(name, str) and name.startswith("paged_"):
        plain = name.removeprefix("paged_")
        changed.optimizer = {**changed.optimizer, "use": plain} if isinstance(changed.optimizer, Mapping) else plain
        assumptions.append(f"{name}: its state counts as if it were on the device all the time")
    return changed


def _simulated(
    config: TrainingConfig, ranks: int, profile: DeviceProfile, given: dict[str, Any], assumptions: list[str]
) -> tuple[Simulation, TrainingConfig]:
    """With "auto", ddp if it fits and else fsdp; a strategy that cannot hold the model leaves one process to be simulated."""
    attempt = copy.copy(config)
    if config.distributed == "auto" and ranks > 1:
        attempt.distributed = "ddp"
    try:
        found = simulate(attempt, ranks, profile.per_node, **given)
    except Exception as error:
        if ranks == 1:
            raise _not_built(error) from error
        alone = copy.copy(config)
        alone.distributed, alone.global_batch_size = "none", None
        try:
            found = simulate(alone, 1, profile.per_node, **given)
        except Exception as second:
            raise _not_built(second) from second
        why = str(error).strip().splitlines()[-1].strip()
        found.problems.insert(0, f"{ranks} ranks could not be simulated, what follows is one process alone: {why}")
        return found, alone
    if config.distributed == "auto" and ranks > 1:
        if found.peak > profile.memory * (1 - _RESERVED):
            sharded = copy.copy(config)
            sharded.distributed = "fsdp"
            assumptions.append("distributed: auto is fsdp, since ddp does not fit")
            return simulate(sharded, ranks, profile.per_node, **given), sharded
        assumptions.append("distributed: auto is ddp, which fits")
    return found, attempt


def _not_built(error: Exception) -> Exception:
    if isinstance(error, DrivetrainError):
        return error
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DrivetrainError(f"the run could not be put together without memory, so nothing can be planned: {text}")


def _grounds(config: TrainingConfig, profile: DeviceProfile) -> list[str]:
    shares = ", ".join(f"{x:.0%}" for x in (*profile.products[:2],))
    grounds = ["callbacks are left out: an average of the weights (ema) takes one more copy of them"]
    if profile.measured:
        grounds.append(f"times: measured on {profile.name}")
    else:
        grounds.append(
            f"times: matrix products at {shares} of the peak at worst and usually, memory at {profile.traffic[1]:.0%}"
        )
    if not profile.waits:
        grounds.append("simulated on the CPU: kernels of the device may need workspaces of their own")
    return grounds


# -- the course of the run -----------------------------------------------------------------------------------------------------


def course(config: TrainingConfig, found: Simulation) -> Course:
    """Steps, tokens and where the learning rate turns."""
    samples = found.samples_per_microbatch * found.accumulation * found.data_ranks
    tokens = found.tokens * found.accumulation * found.data_ranks
    steps = _steps(config.max_duration, samples, tokens, found.samples)
    per_epoch = math.ceil(found.samples / samples) if found.samples and samples else None
    if steps is None:
        return Course(steps=None, tokens=None, samples=samples, milestones=[])
    return Course(
        steps=steps, tokens=steps * tokens or None, samples=samples, milestones=_milestones(config, steps, per_epoch, tokens)
    )


def _steps(length: Duration, samples: int, tokens: int, size: int | None) -> float | None:
    if length.unit == "st":
        return length.value
    if length.unit == "ep" and size and samples:
        return math.ceil(length.value * math.ceil(size / samples))
    if length.unit == "tok" and tokens:
        return math.ceil(length.value / tokens)
    if length.unit == "sp" and samples:
        return math.ceil(length.value / samples)
    return None


@attrs.define
class _Length:
    """What a schedule asks of the context: how long the run is, in steps."""

    config: TrainingConfig
    run_length: float
    per: dict[str, float]
    run_unit: str = "st"

    def position_of(self, length: Any) -> float:
        """A duration or a fraction of the run, in steps."""
        if isinstance(length, (int, float)) and not isinstance(length, bool):
            return float(length) * self.run_length
        wanted = Duration.parse(length)
        if wanted.unit == "%":
            return wanted.value / 100 * self.run_length
        return wanted.value * self.per[wanted.unit]


def _milestones(config: TrainingConfig, steps: float, per_epoch: int | None, tokens: int) -> list[tuple[float, str]]:
    try:
        maker: Any = config.components({"model", "data", "eval_data", "precision", "distributed"}).single.get("scheduler")
        per = {"st": 1.0, "ep": float(per_epoch or 0), "tok": 1 / max(1, tokens)}
        schedule: Callable[[float], float] = maker.make_schedule(_Length(config, steps, per))
        points = [(step, schedule(step)) for step in {round(steps * i / 1000) for i in range(1001)}]
    except Exception:  # a schedule that wants more than a length: the rest of the plan stands
        return []
    points.sort()
    top = max(factor for _, factor in points)
    first = next(step for step, factor in points if factor >= top * 0.999)
    last = max(step for step, factor in points if factor >= top * 0.999)
    found = [(float(first), "warm-up ends")] if first > 0 else []
    if last < steps * 0.999:
        found.append((float(last), "decay begins"))
    return [*found, (steps, f"end, learning rate × {points[-1][1] / top:.2g}")]
