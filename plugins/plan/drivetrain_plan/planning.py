"""The answer: memory, time, cost and the run's course, from a simulated step and a device's profile."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from drivetrain import (
    ConfigError,
    DrivetrainError,
    Duration,
    Problem,
    Trainer,
    TrainingConfig,
    is_installed,
    make_component,
)
from drivetrain_plan.profiles import DeviceProfile, load_profile
from drivetrain_plan.roofline import StepTime, Times, phase_seconds, rate_of, step_time
from drivetrain_plan.simulate import PARAMETERS, STATE, Simulation, simulate

DISK = 2e9  # bytes/s that a file system takes, an assumption
_HOST_COPY = 1e10  # bytes/s of a copy within host memory, an assumption


@attrs.frozen(kw_only=True)
class Course:
    """The run from its beginning to its end, as far as it can be known ahead."""

    steps: float | None  # None when the data has no length, or the run is measured in time
    tokens: float | None
    samples: float
    milestones: list[tuple[float, str]]
    evaluations: int = 0
    eval_batches: int = 0  # of one evaluation, on each rank
    checkpoints: int = 0


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
        return self.device.usable

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
    def model_flops_per_token(self) -> float:
        """FLOPs that the model needs, however it is computed: three times the forward's, which for a transformer is
        6 N + 12 L d T (Chowdhery et al. 2022, arXiv:2204.02311, appendix B); frozen parameters have no gradients of their own."""
        found = self.simulation
        forward = _flops_by_phase(found)["forward 0"] / max(1, found.tokens or found.samples_per_microbatch)
        trained = found.trainable / found.parameters if found.parameters else 1.0
        return forward * (2 + trained) * _share_of_model(found)

    @property
    def mfu(self) -> float | None:
        """Share of the device's peak rate that the model's FLOPs take at the likely time; None for a measured profile."""
        flops: Counter[str] = Counter()
        for operation, count in self.simulation.operations.items():
            flops[rate_of(operation.dtype, self.simulation.precision == "tf32")] += operation.flops * count
        if self.device.measured or not flops or not self.simulation.complete:
            return None
        peak = self.device.rates.get(flops.most_common(1)[0][0], self.device.rates["fp32"])
        return self.model_flops_per_token * self.rate(self.step.total.likely) / (peak * self.ranks)

    @property
    def evaluation(self) -> Times:
        """Seconds of all evaluations: forward alone."""
        found, course = self.simulation, self.course
        forward = phase_seconds(found, self.device, bool(self.config.compile), found.precision == "tf32").get("forward 0")
        if forward is None or not course.evaluations:
            return Times(0.0, 0.0, 0.0)
        size = self.config.per_device_eval_batch_size or self.config.per_device_batch_size
        often = course.evaluations * course.eval_batches * size / max(1, found.samples_per_microbatch)
        return Times(often * forward[2], often * forward[1], often * forward[0])

    @property
    def saving(self) -> float:
        """Seconds that training waits for all checkpoints together; the last one is written while it waits."""
        if not self.course.checkpoints:
            return 0.0
        return self.stall * self.course.checkpoints + self.simulation.whole / DISK

    @property
    def hours(self) -> Times | None:
        """Of the whole run, evaluations and checkpoints included: low, likely, high."""
        if self.course.steps is None or not self.simulation.complete:
            return None
        both = zip(self.step.total, self.evaluation, strict=True)
        low, likely, high = ((step * self.course.steps + extra + self.saving) / 3600 for step, extra in both)
        return Times(low, likely, high)

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
                "host": found.host,
                "usable": self.usable,
                "fits": self.fits,
            },
            "flops_per_token": self.flops_per_token if found.complete else None,
            "model_flops_per_token": self.model_flops_per_token if found.complete else None,
            "mfu": self.mfu,
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
            "evaluation_seconds": {"times": self.course.evaluations, "likely": self.evaluation.likely},
            "hours": self.hours,
            "gpu_hours": None if self.hours is None else self.hours[1] * self.ranks,
            "cost": self.cost,
            "checkpoint": {
                "bytes": found.whole,
                "save_seconds": found.whole / DISK,
                "stall_seconds": self.stall,
                "times": self.course.checkpoints,
            },
            "problems": found.problems,
            "assumptions": self.assumptions,
        }

    @property
    def stall(self) -> float:
        """Seconds that training waits for one checkpoint, as the callback `checkpoint` makes it: from an accelerator it is copied to
        host memory while the next forward and backward run, of a divided model each rank's part; on a CPU the copy is made at
        once."""
        found, device = self.simulation, self.device
        divided = found.ranks > 1 and found.strategy not in ("ddp", "single")
        if found.host:
            return sum(found.host.values()) / _HOST_COPY
        own = sum(found.largest.get(kind, 0) for kind in (PARAMETERS, STATE)) if divided else found.whole
        copy_out = own / device.host_bandwidth
        if device.waits:
            return copy_out
        phases = phase_seconds(found, device).items()
        behind = sum(seconds[1] for phase, seconds in phases if phase.startswith(("forward", "backward")))
        return max(0.0, copy_out - behind)

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
        price: of one device for one hour, at least 0.
        given: with a configuration, what `Trainer` would be given besides: model, train_dataset, loss, step, …

    Raises:
        DrivetrainError: when the run cannot be put together at all. What else could not be simulated is in `simulation.problems`.
    """
    profile = load_profile(device) if isinstance(device, str) else device
    if ranks < 1:
        raise ConfigError([Problem("--ranks", f"must be at least 1, got {ranks}")])
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError([Problem("--price", f"must be at least 0, got {price}")])
    if isinstance(run, Trainer):
        run, given = taken_apart(run)
    assumptions: list[str] = []
    config = for_device(run, profile, assumptions)
    found, used = _simulated(config, ranks, profile, given)
    if config.distributed == "auto" and found.ranks > 1:
        assumptions.append(f"distributed: auto is {found.strategy}, {found.reason.partition('since ')[2] or found.reason}")
    compiled = bool(config.compile)
    if compiled:
        assumptions.append("torch.compile: memory as without it (it needs less), half the traffic between matrix products")
    if config.activation_checkpointing == "offload":
        assumptions.append("activation_checkpointing: memory and time as without offload, which moves activations to the host")
    return Plan(
        config=used,
        ranks=found.ranks,
        device=profile,
        simulation=found,
        step=step_time(found, profile, compiled, tf32=found.precision == "tf32"),
        course=course(config, found),
        price=price,
        assumptions=[*assumptions, *_grounds(found, profile)],
    )


def taken_apart(trainer: Trainer) -> tuple[TrainingConfig, dict[str, Any]]:
    """A trainer's configuration and the objects that it was given.

    Raises:
        DrivetrainError: when it is one of several processes, has trained, or has an optimizer whose parameters have memory.
    """
    if trainer.ctx.strategy.world_size > 1 or trainer.ctx.step:
        raise DrivetrainError("plan: give a trainer of one process that has not trained yet, or its configuration.")
    given = trainer.ctx.run.given
    names = ("model", "train_dataset", "eval_dataset", "loss", "step", "data_collator", "precision")
    objects = {name: getattr(given, name) for name in names}
    if isinstance(given.optimizer, (str, Mapping)):
        objects["optimizer"] = given.optimizer
    elif given.optimizer is not None:
        raise DrivetrainError(
            "plan: the trainer has a ready optimizer, whose parameters have memory; name it in the configuration."
        )
    return trainer.config, {name: value for name, value in objects.items() if value is not None}


def for_device(config: TrainingConfig, profile: DeviceProfile, assumptions: list[str]) -> TrainingConfig:
    """The configuration as it would turn out on that device."""
    changed = copy.copy(config)
    if (
        not profile.waits
        and changed.precision in (None, "auto")
        and "bf16" in profile.rates
        and is_installed("precision", "bf16")
    ):
        changed.precision = "bf16"
        assumptions.append(f"precision: bf16, which {profile.name} computes in hardware")
    name = (
        changed.optimizer["use"] if isinstance(changed.optimizer, Mapping) and "use" in changed.optimizer else changed.optimizer
    )
    if isinstance(name, str) and name.startswith("paged_"):
        plain = name.removeprefix("paged_")
        changed.optimizer = {**changed.optimizer, "use": plain} if isinstance(changed.optimizer, Mapping) else plain
        assumptions.append(f"{name}: its state counts as if it were on the device all the time")
    return changed


def _simulated(
    config: TrainingConfig, ranks: int, profile: DeviceProfile, given: dict[str, Any]
) -> tuple[Simulation, TrainingConfig]:
    """A strategy that cannot hold the model leaves one process to be simulated. With "auto" the engine itself chooses."""
    memory = None if profile.waits else profile.memory
    try:
        return simulate(config, ranks, profile.per_node, memory, **given), config
    except Exception as error:
        if ranks == 1:
            raise _not_built(error) from error
        alone = copy.copy(config)
        alone.distributed, alone.global_batch_size = "none", None
        try:
            found = simulate(alone, 1, profile.per_node, memory, **given)
        except Exception as second:
            raise _not_built(second) from second
        found.problems.insert(
            0, f"{ranks} ranks could not be simulated, what follows is one process alone: {why_in_a_line(error)}"
        )
        return found, alone


def why_in_a_line(error: BaseException) -> str:
    """The last line of what an error says, which names the cause."""
    lines = str(error).strip().splitlines()
    said = lines[-1].strip() if lines else ""
    return said if isinstance(error, DrivetrainError) and said else f"{type(error).__name__}: {said}"[:300]


def _not_built(error: Exception) -> Exception:
    if isinstance(error, DrivetrainError):
        return error
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DrivetrainError(f"the run could not be put together without memory, so nothing can be planned: {text}")


def _grounds(found: Simulation, profile: DeviceProfile) -> list[str]:
    shares = ", ".join(f"{x:.0%}" for x in (*profile.products[:2],))
    grounds = ["callbacks are left out: an average of the weights (ema) takes one more copy of them; data is there in time"]
    if profile.measured:
        grounds.append(f"times: measured on {profile.name}")
    else:
        grounds.append(
            f"times: matrix products at {shares} of the peak at worst and usually, memory at {profile.traffic[1]:.0%}"
        )
    if not profile.waits:
        grounds.append("simulated on the CPU: kernels of the device may need workspaces of their own")
    if found.host:
        grounds.append("cpu_offload: shards cross to the device twice and back once a step; the host updates them at 50 GB/s")
    return grounds


# -- the course of the run -----------------------------------------------------------------------------------------------------


def course(config: TrainingConfig, found: Simulation) -> Course:
    """Steps, tokens, where the learning rate turns, and what happens beside the steps."""
    samples = found.samples_per_microbatch * found.accumulation * found.data_ranks
    tokens = found.tokens * found.accumulation * found.data_ranks
    per_epoch = math.ceil(found.samples / samples) if found.samples and samples else None
    steps = _steps(config.max_duration, samples, tokens, per_epoch)
    if steps is None:
        return Course(steps=None, tokens=None, samples=samples, milestones=[])

    def often(period: Duration | None) -> int:
        """How often something periodic happens, at the end as well."""
        length = None if period is None else _steps(period, samples, tokens, per_epoch, steps)
        return math.ceil(steps / length) if length else 0

    each = (config.per_device_eval_batch_size or config.per_device_batch_size) * found.data_ranks
    return Course(
        steps=steps,
        tokens=steps * tokens or None,
        samples=samples,
        milestones=_milestones(config, steps, per_epoch, tokens),
        evaluations=often(config.eval_interval) if found.eval_samples else 0,
        eval_batches=math.ceil((found.eval_samples or 0) / each),
        checkpoints=often(_checkpoint_period(config)),
    )


def _checkpoint_period(config: TrainingConfig) -> Duration | None:
    """Of the configured checkpoint callback, or of the standard one where it is installed."""
    made = [c for c in config.components({"model", "data", "eval_data"}).callbacks if c.plugin_name == "callback:checkpoint"]
    if not made and config.standard_callbacks and is_installed("callback", "checkpoint"):
        made = [make_component("callback", "checkpoint")]
    period = getattr(made[0], "every", None) if made else None
    return None if period is None else Duration.parse(period)


def _steps(length: Duration, samples: int, tokens: int, per_epoch: int | None, run: float = 0.0) -> float | None:
    if length.unit == "st":
        return length.value
    if length.unit == "ep" and per_epoch:
        return math.ceil(length.value * per_epoch)
    if length.unit == "tok" and tokens:
        return math.ceil(length.value / tokens)
    if length.unit == "sp" and samples:
        return math.ceil(length.value / samples)
    return run * length.value / 100 if length.unit == "%" and run else None


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
    at_top = [step for step, factor in points if factor >= top * (1 - 1e-9)]
    found = [(float(at_top[0]), "warm-up ends")] if at_top[0] > 0 else []
    if at_top[0] + 0.01 * steps < at_top[-1] < steps * 0.999:  # it stays up for a while; one step at the top is no plateau
        found.append((float(at_top[-1]), "decay begins"))
    return [*found, (steps, f"end, learning rate × {points[-1][1] / top:.2g}")]
