"""`drivetrain config plot`: the learning rate over the run that a configuration describes, without training."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from drivetrain import Component, ConfigError, DrivetrainError, Duration, Problem
from drivetrain_cli.chart import chart, number, number_at
from drivetrain_cli.terminal import bold, clean

if TYPE_CHECKING:
    from drivetrain import CallbackContext, TrainingConfig

_POINTS = 4000  # more than any picture has columns
_OF_DATA = ("ep", "sp")  # units that need the data's length to become steps


@frozen
class Plan:
    """The learning rate of a run as a function of the position in it, from 0 to `end`."""

    title: str
    rate: Callable[[float], float]
    end: float
    unit: str  # "steps", "tokens", …

    def points(self) -> list[tuple[float, float]]:
        """Positions and rates: of every step of a short run, of equally many from everywhere in a long one."""
        count = int(min(self.end, _POINTS)) if self.unit == "steps" else _POINTS
        positions = [self.end * index / count for index in range(count)]
        if self.unit == "steps":  # a step has a whole number; the last one is end - 1
            positions = [float(int(position)) for position in positions[:-1]] + [self.end - 1]
        return [(position, self.rate(position)) for position in positions]


def plot(config: TrainingConfig, output: Path | None) -> None:
    """Draw the learning rate on the terminal, or into `output`."""
    plan = plan_of(config)
    points = plan.points()
    if output is None:
        print("\n".join([bold(clean(plan.title), sys.stdout), "", *_drawn(plan, points), "", _said(plan, points)]))
    else:
        save(plan, points, output)
        print(clean(f"{plan.title}: {output}"))


def plan_of(config: TrainingConfig) -> Plan:
    """The run's length and schedule; builds the data if, and only if, they depend on it, and nothing else.

    Raises:
        ConfigError: when the length of the run cannot be known.
    """
    parts = config.components({"model", "data", "eval_data", "precision", "distributed"}).single
    ctx = _length(config, parts.get("scheduler"))
    scheduler, optimizer = parts.get("scheduler"), parts.get("optimizer")
    schedule = scheduler.make_schedule(ctx) if scheduler is not None else lambda position: 1.0  # type: ignore[attr-defined]
    if ctx.run_length == float("inf") or ctx.run_unit == "ep":
        raise ConfigError([Problem("max_duration", "the data has no length; give the steps: max_duration=1000st")])
    peak = getattr(optimizer, "lr", None)
    names = [_name(thing) for thing in (scheduler, optimizer) if thing is not None]
    what = "learning rate" if peak is not None else "factor of the learning rate"
    factor = 1.0 if peak is None else float(peak)
    title = " · ".join([what, *names, f"{number_at(ctx.run_length)} {Duration(1, ctx.run_unit).unit_name}"])
    return Plan(title, lambda position: factor * schedule(position), ctx.run_length, Duration(1, ctx.run_unit).unit_name)


def _name(thing: Component) -> str:
    return thing.plugin_name.partition(":")[2]


def _length(config: TrainingConfig, scheduler: Component | None) -> CallbackContext:
    """A context that knows how long the run is, from a trainer with nothing but what that takes."""
    lengths = [config.max_duration, *(getattr(scheduler, name) for name in (scheduler.options() if scheduler else ()))]
    trainer = _bare_trainer(config, None)
    if not any(isinstance(length, Duration) and length.unit in _OF_DATA for length in lengths):
        return trainer.ctx  # type: ignore[no-any-return]
    maker = config.components({"model", "eval_data", "precision", "distributed", "optimizer", "scheduler"}).single.get("data")
    if maker is None:
        message = (
            "is in epochs or samples, and the configuration names no data to count them in; give steps: max_duration=1000st"
        )
        raise ConfigError([Problem("max_duration", message)])
    return _bare_trainer(config, maker.make_dataset(trainer.ctx)).ctx  # type: ignore[attr-defined, no-any-return]


def _bare_trainer(config: TrainingConfig, data: Any) -> Any:
    """A trainer of the same length as the run's own, on one process, with a model of one weight and no plugins."""
    import torch

    from drivetrain import Precision, Strategy, Trainer

    class Endless(torch.utils.data.IterableDataset[torch.Tensor]):
        def __iter__(self) -> Iterator[torch.Tensor]:
            while True:
                yield torch.zeros(1)

    bare = copy.copy(config)
    bare.standard_callbacks, bare.callbacks, bare.compile, bare.activation_checkpointing = False, [], False, False
    bare.model = bare.data = bare.eval_data = bare.optimizer = bare.scheduler = None
    bare.distributed, bare.training_mode, bare.device = "none", "full_finetune", "cpu"
    model = torch.nn.Linear(1, 1)
    return Trainer(
        model,
        bare,
        Endless() if data is None else data,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        precision=Precision(),
        strategy=Strategy(),
    )


# -- showing -------------------------------------------------------------------------------------------------------------------


def _drawn(plan: Plan, points: list[tuple[float, float]]) -> list[str]:
    width = min(120, shutil.get_terminal_size((80, 24)).columns)
    dots = "utf" in (sys.stdout.encoding or "").lower()
    return chart([max(rate, 0.0) for _, rate in points], plan.end, width, dots=dots)


def _said(plan: Plan, points: list[tuple[float, float]]) -> str:
    """The numbers that a curve cannot show."""
    rates = [rate for _, rate in points]
    where, highest = max(points, key=lambda point: (point[1], -point[0]))
    peak = f"highest {number(highest)} after {number_at(where)} {plan.unit}"
    return f"first {number(rates[0])} · {peak} · last {number(rates[-1])} · mean {number(sum(rates) / len(rates))}"


def save(plan: Plan, points: list[tuple[float, float]], output: Path) -> None:
    """Draw the curve into a file, whose suffix says the format: png, svg or pdf.

    Raises:
        DrivetrainError: when matplotlib is not installed, does not know the format, or cannot write the file.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: it would look for a display
    except ImportError as error:
        message = "--output draws with matplotlib, which is not installed: pip install 'drivetrain-cli[plot]'"
        raise DrivetrainError(f"{message}. Without --output the curve is drawn here.") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), linewidth=1.8, color="#3366cc")
    axes.set_title(plan.title, loc="left", fontsize=11)
    axes.set_xlabel(plan.unit)
    axes.set_ylabel(plan.title.partition(" · ")[0])
    axes.set_xlim(0, plan.end)
    axes.set_ylim(0, 1.05 * max(max(rate for _, rate in points), 1e-30))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(output, dpi=150)
    except (OSError, ValueError) as error:
        raise DrivetrainError(f"{output} cannot be written: {error}") from error
