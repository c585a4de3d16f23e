"""What the schedules share: the warm-up, the end of the run, and checked options."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

from drivetrain import CallbackContext, Component, ConfigError, Duration, Problem, component, option

Schedule = Callable[[float], float]
LENGTH = "'100st', '1e6tok', '5%', or a fraction of the run such as 0.05"


def length(default: float | None, help: str, *, above: bool = False) -> Any:
    """An option that is a length: a duration, or a fraction of the run; more than none with `above`."""

    def check(_: Any, field: Any, value: Any) -> None:
        if isinstance(value, (int, float)) and (not 0 <= value <= 1 or (above and value == 0)):
            hint = f"; for steps write '{value:g}st'" if value > 1 else ""
            raise ConfigError([Problem(field.name, f"a number is a fraction of the run, from 0 to 1, got {value!r}{hint}")])

    return option(default=default, help=f"{help}: {LENGTH}", validator=check)


def min_factor() -> Any:
    """The option that every falling schedule has."""
    return option(default=0.0, help="where the factor ends, as a fraction of the learning rate", at_least=0, at_most=1)


@component
class ScheduleComponent(Component):
    """Base of the schedules: a linear rise from 0 over `warmup`, then the schedule's own shape.

    A position is how far the run was before a step, in its own unit: the first step is at 0, and with a warm-up moves nothing.
    """

    kind: ClassVar[str] = "scheduler"

    warmup: Duration | float = length(0.0, "linear rise from 0 at the start")

    @property
    def path(self) -> str:
        """Where a configuration has this component, such as "scheduler.cosine"."""
        return self.plugin_name.replace(":", ".") or "scheduler"

    def end_of_run(self, ctx: CallbackContext) -> float:
        """Where the run ends.

        Raises:
            ConfigError: when that is not known, or known only in epochs, whose steps nobody has counted.
        """
        if math.isinf(ctx.run_length) or ctx.run_unit == "ep":
            message = (
                f"{self.path} must know how many steps the run has, but the length of the data is unknown. "
                "Give max_duration in steps, samples or tokens, such as '1000st'."
            )
            raise ConfigError([Problem("max_duration", message)])
        return ctx.run_length

    def length_of(self, name: str, ctx: CallbackContext, *, within: bool = True) -> float:
        """The option `name` in the run's unit.

        Raises:
            ConfigError: when it cannot be converted, or, with `within`, is longer than the run.
        """
        given = getattr(self, name)
        if given == 0:
            return 0.0
        if isinstance(given, (int, float)) or str(given).endswith("%") or ctx.run_unit == "ep":
            self.end_of_run(ctx)
        try:
            found = ctx.position_of(given)
        except ConfigError as error:
            raise ConfigError([Problem(f"{self.path}.{name}", problem.message) for problem in error.problems]) from None
        if within and found > ctx.run_length:
            run = Duration(ctx.run_length, ctx.run_unit)
            raise ConfigError([Problem(f"{self.path}.{name}", f"{given} is longer than the run of {run}")])
        return found

    def rise(self, ctx: CallbackContext, after: Callable[[float], Schedule]) -> Schedule:
        """The warm-up of length w, s/w, followed by the schedule that `after(w)` makes."""
        w = self.length_of("warmup", ctx)
        then = after(w)
        return then if w == 0 else lambda s: s / w if s < w else then(s)

    def fall(self, ctx: CallbackContext, shape: Schedule, floor: float) -> Schedule:
        """The warm-up, then floor + (1 − floor)·shape(p), p from 0 at the end of the warm-up to 1 at the end of the run."""
        end = self.end_of_run(ctx)

        def after(w: float) -> Schedule:
            span = end - w
            return lambda s: floor + (1.0 - floor) * shape((s - w) / span if s < end else 1.0)

        return self.rise(ctx, after)
