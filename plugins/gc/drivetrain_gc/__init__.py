"""Python's garbage collection between steps instead of within them."""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING

from drivetrain import Callback, component, hook, option

if TYPE_CHECKING:
    from drivetrain import CallbackContext

__all__ = ["GcCallback"]


@component
class GcCallback(Callback):
    """Collect garbage at logging steps, after the values have been read, and not in the middle of others.

    Python looks for unreachable cycles whenever some hundred objects have been made, in the middle of whatever runs; with several
    processes all wait for the one that does. Meanwhile this is off: what a run begins with is set aside (`gc.freeze`), so that a
    collection looks at what came since. Objects that no cycle holds are freed as ever. When the last run of the process that asked
    for this ends, everything is as it was.
    """

    full_every: int = option(default=20, help="each so many collections look at old objects too, not just at new ones")

    def __attrs_post_init__(self) -> None:
        self._collections = 0
        self._holds = False

    @hook(trylast=True)
    def on_run_start(self, ctx: CallbackContext) -> None:
        """Switch the automatic collection off; last, when the others have made what they keep."""
        self._holds = True
        _SWITCH.off()

    @hook(trylast=True)
    def on_log(self, ctx: CallbackContext) -> None:
        """Collect."""
        self._collections += 1
        gc.collect(2 if self._collections % self.full_every == 0 else 1)

    @hook(trylast=True)
    def on_run_end(self, ctx: CallbackContext) -> None:
        """Switch it on again."""
        if self._holds:
            self._holds = False
            _SWITCH.on()


class _Switch:
    """The collector is the whole process's: it stays off until no run wants it so any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs = 0
        self._was_on = self._froze = False

    def off(self) -> None:
        with self._lock:
            self._runs += 1
            if self._runs == 1:
                self._was_on, self._froze = gc.isenabled(), gc.get_freeze_count() == 0
                gc.collect()
                gc.disable()
                if self._froze:  # otherwise the program has set aside what it wants to
                    gc.freeze()

    def on(self) -> None:
        with self._lock:
            self._runs -= 1
            if self._runs == 0:
                if self._froze:
                    gc.unfreeze()
                if self._was_on:
                    gc.enable()


_SWITCH = _Switch()
