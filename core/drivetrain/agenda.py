"""What is due when: logging, evaluation and the components' own periods, at the cost of one comparison on an ordinary step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from drivetrain.duration import Duration

if TYPE_CHECKING:
    from drivetrain.context import CallbackContext

NEVER = 1 << 62


class _Item:
    """One action and its period. The next time follows from the position alone, so a resume needs no state."""

    def __init__(self, period: Duration, action: Callable[[], None], at_end: bool, ctx: CallbackContext) -> None:
        self.action, self.at_end = action, at_end
        self.period, self.unit = period.value, period.unit
        if self.unit == "%":
            self.period, self.unit = ctx.run_length * period.value / 100, ctx.run_unit
        if self.unit == "ep" and ctx.steps_per_epoch is not None:
            self.period, self.unit = max(1.0, period.value * ctx.steps_per_epoch), "st"
        self.plan(ctx)

    def plan(self, ctx: CallbackContext) -> None:
        """Find the next time after now."""
        self.count = int(ctx.position_in(self.unit) / self.period + 1e-9) + 1
        self.next = self.count * self.period

    def due(self, ctx: CallbackContext) -> bool:
        """Whether the time has come."""
        return ctx.position_in(self.unit) >= self.next - 1e-9


class Agenda:
    """The periodic actions of a run, in the order in which they are carried out when several are due at once."""

    def __init__(self, ctx: CallbackContext) -> None:
        self._ctx = ctx
        self._items: list[_Item] = []
        self.next_step = NEVER  # before this step nothing can be due

    def add(self, period: Duration, action: Callable[[], None], *, at_end: bool = False) -> None:
        """Carry `action` out whenever `period` has passed, and with `at_end` also where the run ends."""
        self._items.append(_Item(period, action, at_end, self._ctx))

    def replan(self) -> None:
        """Work out all times anew, after counters were restored."""
        for item in self._items:
            item.plan(self._ctx)
        self._set_next_step()

    def run(self, ended: Callable[[], bool]) -> None:
        """Carry out what is due."""
        for item in self._items:
            if item.due(self._ctx) or (item.at_end and ended()):
                item.plan(self._ctx)
                item.action()
        self._set_next_step()

    def _set_next_step(self) -> None:
        """The first step to look again: known ahead for periods in steps, the next one for all others."""
        step = self._ctx.step
        self.next_step = min(
            (math.ceil(item.next - 1e-9) if item.unit == "st" else step + 1 for item in self._items), default=NEVER
        )
