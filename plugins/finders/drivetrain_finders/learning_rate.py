"""The learning rate range test."""

from __future__ import annotations

import csv
import logging
import math
from typing import TYPE_CHECKING, Any

import torch

from drivetrain import Callback, ConfigError, Problem, component, hook, option

if TYPE_CHECKING:
    from drivetrain import CallbackContext

_said = logging.getLogger("drivetrain.finders")


@component
class LrFinderCallback(Callback):
    """Before a new run begins, train some steps with a learning rate that grows exponentially from `lowest` to `highest`, and take it
    all back (L. Smith 2017, arXiv:1506.01186, section 3.3).

    The rate at which the smoothed loss falls most steeply is suggested: written to the log, and to RUN_DIR/lr_finder.csv with the
    whole curve. With `apply` the run takes it; groups with a rate of their own keep their ratio to the first. The steps are those
    that the run will begin with, weights, optimizer and random numbers are put back bit by bit, and no other plugin hears of it. A
    run that goes on from a checkpoint is left alone, and needs the rate in its configuration.
    """

    lowest: float = option(default=1e-7, above=0, help="the rate of the first step")
    highest: float = option(default=1.0, above=0, help="the rate of the last step")
    steps: int = option(default=100, at_least=10, help="how many steps")
    diverged: float = option(default=4.0, above=0, help="end when the smoothed loss is above this many times its best")
    apply: bool = option(default=False, help="train with what was found")

    def __attrs_post_init__(self) -> None:
        if self.lowest >= self.highest:
            raise ConfigError([Problem("lowest", f"must be below highest = {self.highest:g}, got {self.lowest:g}")])

    @hook(tryfirst=True)
    def on_run_start(self, ctx: CallbackContext) -> None:
        """Look for the rate."""
        if ctx.step > 0 or ctx.resumed:
            return
        rates, losses = self._curve(ctx)
        found = suggestion(rates, losses)
        if ctx.is_main:
            self._write(ctx, rates, losses)
            _said.warning(
                "lr_finder: %s (curve in %s)",
                "no rate makes the loss fall" if found is None else f"suggested learning rate {found:.2e}",
                ctx.run_dir / "lr_finder.csv",
            )
        if found is not None and self.apply:
            first = float(ctx.optimizer.param_groups[0]["initial_lr"])
            for group in ctx.optimizer.param_groups:
                group["initial_lr"] = found * group["initial_lr"] / first
                _set(group, group["initial_lr"])

    def _curve(self, ctx: CallbackContext) -> tuple[list[float], list[float]]:
        """Rates and smoothed losses, means over ranks. Reads each loss: nobody trains while a finder looks."""
        rates: list[float] = []
        losses: list[float] = []
        mean = 0.0
        with ctx.rehearsal() as step:
            first = float(ctx.optimizer.param_groups[0]["initial_lr"])
            for index in range(self.steps):
                rate = self.lowest * (self.highest / self.lowest) ** (index / (self.steps - 1))
                for group in ctx.optimizer.param_groups:
                    _set(group, rate * group["initial_lr"] / first)
                loss = float(ctx.strategy.sum(step().float())) / ctx.strategy.world_size
                mean = 0.9 * mean + 0.1 * loss
                smooth = mean / (1 - 0.9 ** (index + 1))
                if not math.isfinite(loss) or (losses and smooth > self.diverged * min(losses) > 0):
                    break
                rates.append(rate)
                losses.append(smooth)
        return rates, losses

    def _write(self, ctx: CallbackContext, rates: list[float], losses: list[float]) -> None:
        with (ctx.run_dir / "lr_finder.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("lr", "loss"), *zip(rates, losses, strict=True)])


def suggestion(rates: list[float], losses: list[float]) -> float | None:
    """The rate at which the loss falls most steeply over the logarithm of the rate, before its minimum; None when it never falls."""
    end = losses.index(min(losses)) + 1 if losses else 0
    slopes = [losses[i + 1] - losses[i - 1] for i in range(1, end - 1)]  # the rates are evenly spaced in the logarithm
    if not slopes or min(slopes) >= 0:
        return None
    return rates[1 + slopes.index(min(slopes))]


def _set(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
