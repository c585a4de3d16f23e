"""What a run does not use any more: garbage is collected between steps instead of within them, freed memory is kept for the next step."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from drivetrain import Callback, component, hook, option
from drivetrain_gc.process import COLLECTOR_OFF, MEMORY_KEPT, WhileAnyRuns

if TYPE_CHECKING:
    from drivetrain import CallbackContext

__all__ = ["GcCallback"]

_LOOK_EVERY = 16  # steps


@component
class GcCallback(Callback):
    """Collect garbage between steps, and keep a CPU's freed memory from step to step.

    Python looks for unreachable cycles whenever some hundred objects have been made, in the middle of whatever runs; with several
    processes all wait for the one that does. Meanwhile this is off: what a run begins with is set aside (`gc.freeze`), and a collection
    at each logging step, after the values have been read, looks at what came since. Every 16 steps there is one of young objects,
    if Python would have had one by then (`gc.get_threshold`). Objects that no cycle holds are freed as ever.

    A step on a CPU frees what it computed, and C's allocator hands large blocks back to the system, which gives the next step fresh
    pages, each filled with zeros at its first use: a tenth of a small GPT's step in bf16. Meanwhile glibc keeps them (mallopt(3)), as torch
    does for a GPU, and may have huge pages for them (madvise(2)); other allocators, and one that the environment sets up
    (`MALLOC_…`, `GLIBC_TUNABLES`), are left as they are.

    When the last run of the process that asked for this ends, the collector is as it was and free memory is returned.
    """

    full_every: int = option(
        default=20, at_least=1, help="each so many logging steps' collections look at old objects too, not just at new ones"
    )
    keep_memory: bool = option(default=True, help="on a CPU, keep what a step frees for the next one, in huge pages")

    def __attrs_post_init__(self) -> None:
        self._collections = 0
        self._begun: list[WhileAnyRuns] = []
        self._looks = 0

    @hook(trylast=True)
    def on_run_start(self, ctx: CallbackContext) -> None:
        """Switch the automatic collection off; last, when the others have made what they keep."""
        self._looks = ctx.step + _LOOK_EVERY - ctx.step % _LOOK_EVERY
        self._begin(COLLECTOR_OFF)
        if self.keep_memory and ctx.device.type == "cpu":
            self._begin(MEMORY_KEPT)

    def _begin(self, setting: WhileAnyRuns) -> None:
        self._begun.append(setting)
        setting.begin()

    @hook(trylast=True, not_before="_looks")
    def on_step_end(self, ctx: CallbackContext) -> None:
        """Collect what is young, as Python would have; on all ranks after the same steps."""
        self._looks = ctx.step + _LOOK_EVERY - ctx.step % _LOOK_EVERY
        (young, middle, _), (enough, times, _) = gc.get_count(), gc.get_threshold()
        if 0 < enough < young:
            gc.collect(1 if middle > times else 0)

    @hook(trylast=True)
    def on_log(self, ctx: CallbackContext) -> None:
        """Collect."""
        self._collections += 1
        gc.collect(2 if self._collections % self.full_every == 0 else 1)

    @hook(trylast=True)
    def on_run_end(self, ctx: CallbackContext) -> None:
        """Put back what no other run wants any more."""
        while self._begun:
            self._begun.pop().end()
