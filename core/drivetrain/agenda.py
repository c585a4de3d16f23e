"""What is due when: logging, evaluation and the components' own periods, at the cost of one comparison on an ordinary step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from drivetrain.duration import Duration

if TYPE_CHECKING:
    from drivetrain.context import CallbackContext

NEVER = 1 << 62
_WINDOWS = "windows"  # of all passes: a pass is over when its data is, whether or not a step was made of each window


class _Item:
    """One action and its period. The next time follows from the position alone, so a resume needs no state."""

    def __init__(self, period: Duration, action: Callable[[], None], at_end: bool, ctx: CallbackContext) -> None:
        self.action, self.at_end = action, at_end
        self.period, self.unit = period.value, period.unit
        if self.unit == "%":
            by_passes = ctx.run_unit == "st" and ctx.config.max_duration.unit == "ep"
            self.period, self.unit = ctx.run_length * period.value / 100, _WINDOWS if by_passes else ctx.run_unit
        if self.unit == "ep" and ctx.steps_per_epoch is not None:
            self.period, self.unit = max(1.0, period.value * ctx.steps_per_epoch), _WINDOWS
        # ranks have clocks and, where the run's length does not need the sum, counts of tokens of their own: rank 0's decide
        self.of_rank_0 = self.unit == "s" or (self.unit == "tok" and ctx.run_unit != "tok")
        self.plan(ctx)

    def plan(self, ctx: CallbackContext) -> None:
        """Find the next time after now."""
        self.count = int(self._position(ctx) / self.period + 1e-9) + 1
        self.next = self.count * self.period

    def due(self, ctx: CallbackContext) -> bool:
        """Whether the time has come."""
        return self._position(ctx) >= self.next - 1e-9

    def _position(self, ctx: CallbackContext) -> float:
        return _windows(ctx) if self.unit == _WINDOWS else ctx.position_in(self.unit)


def _windows(ctx: CallbackContext) -> int:
    return ctx.epoch * (ctx.steps_per_epoch or 0) + ctx.step_in_epoch


class Agenda:
    """The periodic actions of a run, in the order in which they are carried out when several are due at once."""

    def __init__(self, ctx: CallbackContext) -> None:
        self._ctx = ctx
        self._items: list[_Item] = []
        self._timed: list[_Item] = []
        self._counted: list[_Item] = []
        self.next_step = NEVER  # before this step nothing can be due

    def add(self, period: Duration, action: Callable[[], None], *, at_end: bool = False) -> None:
        """Carry `action` out whenever `period` has passed, and with `at_end` also where the run ends."""
        self._items.append(_Item(period, action, at_end, self._ctx))

    def replan(self) -> None:
        """Work out all times anew, after counters were restored."""
        for item in self._items:
            item.plan(self._ctx)
        self._set_next_step()

    def is_due(self) -> bool:
        """Whether something is due by what all ranks count alike."""
        return self._ctx.step >= self.next_step or any(item.due(self._ctx) for item in self._counted)

    def is_late(self) -> bool:
        """Whether something is due by this process's own clock or count of tokens, of which rank 0's decide."""
        ctx = self._ctx
        if ctx.strategy.rank != 0:
            return False
        ended = ctx.run_unit == "s" and ctx.elapsed >= ctx.run_length
        return ended or any((ctx.elapsed if i.unit == "s" else ctx.tokens) >= i.next - 1e-9 for i in self._timed)

    def run(self, met: bool, ended: Callable[[], bool]) -> None:
        """Carry out what is due; where all have `met`, by rank 0's clock as well."""
        for item in self._items:
            if (item.due(self._ctx) and (met or not item.of_rank_0)) or (item.at_end and ended()):
                item.plan(self._ctx)
                item.action()
        self._set_next_step()

    def look_ahead(self) -> None:
        """To be called when a window has passed without a step, or a pass ended early: what is counted in passes comes sooner then."""
        lead = {"st": 0, _WINDOWS: _windows(self._ctx) - self._ctx.step}
        self.next_step = min(
            (math.ceil(item.next - 1e-9) - lead[item.unit] for item in self._items if item.unit in lead), default=NEVER
        )

    def _set_next_step(self) -> None:
        """The first step at which something counted in steps or passes is due, and what has to be asked after each step instead."""
        self.look_ahead()
        self._timed = [item for item in self._items if item.of_rank_0]
        self._counted = [item for item in self._items if item.unit not in ("st", _WINDOWS) and not item.of_rank_0]
