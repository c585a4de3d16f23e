"""Learning-rate schedules for Drivetrain: pure functions from the position in the run to the learning rate's factor.

In the formulas s is the position (steps done, or samples, tokens, seconds), w the end of the warm-up, T the end of the run and
p = (s − w)/(T − w). During the warm-up the factor is s/w everywhere but in `one_cycle`. r is `min_factor`.
"""

from __future__ import annotations

from math import cos, pi, sqrt
from typing import Literal

from drivetrain import CallbackContext, ConfigError, Duration, Problem, component, option
from drivetrain_schedulers.base import Schedule, ScheduleComponent, length, min_factor

__all__ = [
    "Constant",
    "Cosine",
    "CosineWithRestarts",
    "InverseSqrt",
    "Linear",
    "OneCycle",
    "Polynomial",
    "Schedule",
    "ScheduleComponent",
    "WarmupStableDecay",
]


@component
class Constant(ScheduleComponent):
    """1 after the warm-up (transformers: `get_constant_schedule_with_warmup`).

    The warm-up, which all schedules here share: Goyal et al. 2017, arXiv:1706.02677, section 2.2.
    """

    def make_schedule(self, ctx: CallbackContext) -> Schedule:
        """The factor as a function of the position."""
        return self.rise(ctx, lambda w: lambda s: 1.0)


@component
class Linear(ScheduleComponent):
    """r + (1 − r)(1 − p) (transformers: `get_linear_schedule_with_warmup`; torch: `LinearLR` from 1 to r).

    With a warm-up and r = 0: Devlin et al. 2019 (BERT, arXiv:1810.04805), appendix A.2.
    """

    min_factor: float = min_factor()

    def make_schedule(self, ctx: CallbackContext) -> Schedule:
        """The factor as a function of the position."""
        return self.fall(ctx, lambda p: 1.0 - p, self.min_factor)


@component
class Cosine(ScheduleComponent):
    """r + (1 − r)·½(1 + cos 2πcp), where c is `cycles` (transformers: `get_cosine_with_min_lr_schedule_with_warmup`).

    With half a cycle: Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5 without restarts (torch: `CosineAnnealingLR`).
    """

    cycles: float = option(default=0.5, help="waves; 0.5 falls once from 1 to r", above=0)
    min_factor: float = min_factor()

    def make_schedule(self, ctx: CallbackContext) -> Schedule:
        """The factor as a function of the position."""
        turns = 2.0 * pi * self.cycles
        return self.fall(ctx, lambda p: 0.5 * (1.0 + cos(turns * p)), self.min_factor)


@component
class CosineWithRestarts(ScheduleComponent):
    """r + (1 − r)·½(1 + cos π(cp mod 1)), and r at p = 1, where c is `cycles`.

    Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5. transformers: `get_cosine_with_hard_restarts_schedule_with_warmup`;
    torch: `CosineAnnealingWarmRestarts` with T_0 = (T − w)/c.
    """

    cycles: int = option(default=1, help="falls from 1 to r, of equal length; 1 has no restart", at_least=1)
    min_factor: float = min_factor()

    def make_schedule(self, ctx: CallbackContext) -> Schedule:
        """The factor as a function of the position."""
        end, cycles, floor = self.end_of_run(ctx), self.cycles, self.min_factor

        def after(w: float) -> Schedule:
            span = end - w

            def factor(s: float) -> float:
                if s >= end:
                    return floor
                turn = (cycles * (s - w) / span) % 1.0  # multiplied first: a restart at a whole step is met exactly
                return floor + (1.0 - floor) * 0.5 * (1.0 + cos(pi * turn))

            return factor

        return self.rise(ctx, after)


@component
class Polynomial(ScheduleComponent):
    """r + (1 − r)(1 − p)^k, where k is `power`.

    The "poly" policy of Chen et al. 2017 (DeepLab, arXiv:1606.00915), section 4.1, there with k = 0.9 and r = 0. transformers:
    `get_polynomial_decay_schedule_with_warmup`; torch: `PolynomialLR`.
    """

    power: float = option(default=1.0, help="exponent; above 1 falls fast at first", above=0)
    min_factor: float = min_factor()

    def make_schedule(self, ctx: CallbackContext) -> Schedule:
        """The factor as a function of the position."""
        power = self.power
        return self.fall(ctx, lambda p: (1.0 - p) ** power, self.min_factor)


_SHAPES: dict[str, Schedule] = {
    "linear": lambda q: 1.0 - q,
    "cosine": lambda q: 0.5 * (1.0 + cos(pi * q)),
    "sqrt": lambda q: 1.0 - sqrt(q),
}


@component
class WarmupStableDecay(ScheduleComponent):
    """Warm-up, then 1, then over the last `decay` of the run r + (1 − r)·shape(q), q from 0 to 1.

    Shapes: linear 1 − q, cosine ½(1 + cos πq), sqrt 1 − √q. Hu et al. 2024 (MiniCPM, arXiv:2404.06395), section 4; shapes from
    Hägele et al. 2024 (arXiv:2405.18392), section 3, who found sqrt best. transformers: `get_wsd_schedule`.
    """

    decay: Duration | float = length(0.2, "length of the fall at the end")
    shape: Literal["linear", "cosine", "sqrt"] = option(default="linear", help="how it falls: linear, cosine, or sqrt (1 − √q)")
    min_factor: float = min_factor()

    def make_schedule(self, ctx: CallbackContext) -> Schedule:
        """The factor as a function of the position.

        Raises:
            ConfigError: when warm-up and decay together are longer than the run.
        """
        end, decay, shape, floor = self.end_of_run(ctx), self.length_of("decay", ctx), _SHAPES[self.shape], self.min_factor
        start = end - decay

        def after(w: float) -> Schedule:
            if w > start + 1e-9 * end:
                message = f"warm-up {self.warmup} and decay {self.decay} together are longer than the run of {ctx.run_length:g}"
                raise ConfigError([Problem(f"{self.path}.decay", message)])
            return lambda s: 1.0 if s < start else floor + (1.0 - floor) * shape((s - start) / decay if s < end else 1.0)

        return self.rise(ctx, after)


@component
class InverseSqrt(ScheduleComponent):
    """max(r, 1/√((s + t − w)/t)), where t is `timescale` (Vaswani et al. 2017, arXiv:1706.03762, equation 3, scaled to 1 at w).

    transformers: `get_inverse_sqrt_schedule`. Needs no end of the run.
    """

    timescale: Duration | float | None = length(
        None, "how slowly it falls; default: the warm-up, or 10000st without one", above=True
    )
    min_factor: float = min_factor()

    def make_schedule(self, ctx: CallbackContext) -> Schedule:
        """The factor as a function of the position."""
        floor = self.min_factor

        def after(w: float) -> Schedule:
            t = self._timescale(w, ctx)
            shift = t - w
            return lambda s: max(floor, 1.0 / sqrt((s + shift) / t))

        return self.rise(ctx, after)

    def _timescale(self, w: float, ctx: CallbackContext) -> float:
        if self.timescale is not None:
            return self.length_of("timescale", ctx, within=False)
        if w == 0 and ctx.run_unit != "st":
            unit = Duration(1, ctx.run_unit).unit_name
            raise ConfigError(
                [Problem(f"{self.path}.timescale", f"is needed without a warm-up: the run is measured in {unit}")]
            )
        return w or 10_000.0


@component
class OneCycle(ScheduleComponent):
    """Up from 1/`div_factor` to 1 over `warmup`, then down to 1/(`div_factor`·`final_div_factor`), along half cosines or lines.

    Smith & Topin 2018, arXiv:1708.07120, section 3. The optimizer's `lr` is the largest rate (torch: `OneCycleLR` with
    `total_steps` = T); as there, in steps the peak is at step w − 1 and the end at T − 1, the last step. The momentum stays as
    it is.
    """

    warmup: Duration | float = length(0.3, "length of the rise (torch: pct_start)")
    anneal: Literal["cos", "linear"] = option(default="cos", help="half cosines or straight lines")
    div_factor: float = option(default=25.0, help="the first factor is 1/div_factor", at_least=1)
    final_div_factor: float = option(default=1e4, help="the last factor is the first one divided by this", at_least=1)

    def make_schedule(self, ctx: CallbackContext) -> Schedule:
        """The factor as a function of the position."""
        one = 1.0 if ctx.run_unit == "st" else 0.0
        end, peak = self.end_of_run(ctx) - one, self.length_of("warmup", ctx) - one
        first = 1.0 / self.div_factor
        last = first / self.final_div_factor
        curve = _half_cosine if self.anneal == "cos" else _line

        def factor(s: float) -> float:
            if s < peak:
                return curve(first, 1.0, s / peak)
            return curve(1.0, last, (s - peak) / (end - peak) if s < end else 1.0)

        return factor


def _half_cosine(start: float, stop: float, q: float) -> float:
    return stop + (start - stop) * 0.5 * (1.0 + cos(pi * q))


def _line(start: float, stop: float, q: float) -> float:
    return start + (stop - start) * q
