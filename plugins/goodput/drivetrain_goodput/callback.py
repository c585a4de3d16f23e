"""The callback: one clock, read where one part of the work ends and another begins."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from drivetrain import Callback, Component, component, hook, option
from drivetrain_goodput.sittings import Sitting, read_sittings, table, write_sittings

if TYPE_CHECKING:
    from drivetrain import CallbackContext

Listener = Callable[[Any], None]
_WRITE_EVERY = 1.0  # seconds: what a kill takes away of the account, which then counts as `down`

_NEVER = float("inf")

START, WAIT, TRANSFER, COMPUTE, REDUCE, UPDATE, LOG, EVALUATE, REST = (
    "start",
    "data wait",
    "transfer",
    "forward and backward",
    "communication",
    "optimizer",
    "logging",
    "evaluation",
    "rest",
)


@component
class GoodputCallback(Callback):
    """Account for every second of a run: a table at the end, and RUN_DIR/goodput.json, over restarts too.

    The parts: `start` (from when the run was put together to its first step: building, restoring, opening), `data wait`, `transfer` to
    the device, `forward and backward`, with several ranks `communication` (what of reducing and clipping comes after backward; what
    overlaps with it, or is waited for at its end, is in it), `optimizer`, `logging` (waiting for the device, reading the values),
    `evaluation`, `rest` (the loop itself, and the caller's own code in `for step in trainer.steps()`), each plugin's own hooks under
    its name (`callback:checkpoint` is the stall of saving), and `down`, the time between a sitting's last account and the next
    one's begin: stopped, killed, waiting in a queue, starting Python.

    One clock is read where a part ends and the next begins, so the parts add up to the whole. It is the host's: on a GPU, which
    works on after the host has launched its work, the time shows up where the host waits. Nothing waits for the device; a step
    costs some 10 readings of the clock, and one call more for each listener.
    """

    without_gradients: ClassVar[bool] = True

    show: bool = option(default=True, help="print the table when the run ends")

    _parts: defaultdict[str, float] = attrs.field(factory=lambda: defaultdict(float), init=False, repr=False)
    _part: str = attrs.field(default=START, init=False, repr=False)  # what the time since `_last` belongs to
    _last: float = attrs.field(default=0.0, init=False, repr=False)
    _before_compute: str = attrs.field(default=TRANSFER, init=False, repr=False)  # what a microbatch begins with
    _after_compute: str = attrs.field(default=UPDATE, init=False, repr=False)  # what follows the last one
    _transfers: float = attrs.field(default=0, init=False, repr=False)  # 0, or never
    _reduces: float = attrs.field(default=0, init=False, repr=False)
    _waited: float = attrs.field(default=0.0, init=False, repr=False)  # `ctx.data_wait` at the last look
    _begun: float | None = attrs.field(default=None, init=False, repr=False)
    _written: float = attrs.field(default=0.0, init=False, repr=False)
    _sittings: list[Sitting] = attrs.field(factory=list, init=False, repr=False)

    def make_listener_wrapper(self, ctx: CallbackContext) -> Callable[[Listener, str, Component], Listener]:
        """Time every listener but this one's own."""
        return self._timed

    def _timed(self, call: Listener, event: str, thing: Component) -> Listener:
        if thing is self:
            return call
        name, parts = thing.plugin_name, self._parts

        def timed(ctx: Any) -> None:
            outer, now = self._part, perf_counter()
            parts[outer] += now - self._last
            self._last, self._part = now, name
            try:
                call(ctx)
            finally:
                now = perf_counter()
                parts[name] += now - self._last
                self._last, self._part = now, outer

        return timed

    # -- the run ---------------------------------------------------------------------------------------------------------

    def __attrs_post_init__(self) -> None:
        self._made = perf_counter()  # components are made before the model is built and data is read

    @hook(tryfirst=True)
    def on_restore(self, ctx: CallbackContext) -> None:
        """Start the clock, at the time when this was made."""
        self._begin(self._made)

    @hook(tryfirst=True)
    def on_run_start(self, ctx: CallbackContext) -> None:
        """Start it in a later sitting of the same process, which restores nothing."""
        if self._begun is None:
            self._begin(perf_counter())
        on_host, alone = ctx.device.type == "cpu", ctx.strategy.world_size == 1
        self._before_compute, self._transfers = (COMPUTE, _NEVER) if on_host else (TRANSFER, 0)
        self._after_compute, self._reduces = (UPDATE, _NEVER) if alone else (REDUCE, 0)
        self._waited = ctx.data_wait
        anew = ctx.step == 0 and ctx.resume == "never"  # a run that was killed before its first checkpoint has a past as well
        earlier = read_sittings(ctx.run_dir) if ctx.is_main and not anew else []
        began = time.time() - (perf_counter() - (self._begun or 0.0))
        self._sittings = [*earlier, Sitting(began, ctx.step, ctx.step)]
        self._written = perf_counter()

    @hook(tryfirst=True)
    def on_step_start(self, ctx: CallbackContext) -> None:
        """The data has come."""
        now, waited = perf_counter(), ctx.data_wait - self._waited
        self._waited = ctx.data_wait
        self._parts[self._part] += now - self._last - waited
        self._parts[WAIT] += waited
        self._last, self._part = now, self._before_compute

    @hook(tryfirst=True, not_before="_transfers")
    def on_batch(self, ctx: CallbackContext) -> None:
        """A microbatch is on the device."""
        now = perf_counter()
        self._parts[self._part] += now - self._last
        self._last, self._part = now, COMPUTE

    @hook(tryfirst=True)
    def on_backward(self, ctx: CallbackContext) -> None:
        """Its gradients are there: another one comes, or the update."""
        now = perf_counter()
        self._parts[self._part] += now - self._last
        more = ctx.microbatch + 1 < ctx.microbatches
        self._last, self._part = now, self._before_compute if more else self._after_compute

    @hook(tryfirst=True, not_before="_reduces")
    def on_clipped(self, ctx: CallbackContext) -> None:
        """The gradients are what the optimizer takes."""
        now = perf_counter()
        self._parts[self._part] += now - self._last
        self._last, self._part = now, UPDATE

    @hook(tryfirst=True)
    def on_optimizer_step(self, ctx: CallbackContext) -> None:
        """The update is done."""
        now = perf_counter()
        self._parts[self._part] += now - self._last
        self._last, self._part = now, REST

    @hook(tryfirst=True)
    def on_log(self, ctx: CallbackContext) -> None:
        """The values have been read from the device."""
        self._part = LOG
        self._turn(REST)
        if ctx.is_main and self._last - self._written > _WRITE_EVERY:
            self._write(ctx)

    @hook(tryfirst=True)
    def on_evaluate_start(self, ctx: CallbackContext) -> None:
        """An evaluation begins."""
        self._turn(EVALUATE)

    @hook(trylast=True)
    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        """It is over."""
        self._turn(REST)

    @hook(trylast=True)
    def on_run_end(self, ctx: CallbackContext) -> None:
        """Write and show what has gathered."""
        if self._begun is None:
            return
        if ctx.is_main:
            self._write(ctx, ended=True)
            if self.show:
                utf = (getattr(sys.stderr, "encoding", None) or "ascii").lower().startswith("utf")
                print("\n".join(table(self._sittings, ctx.device.type, "━" if utf else "=")), file=sys.stderr)
        self._begun = None

    # -- the clock -------------------------------------------------------------------------------------------------------

    def _begin(self, at: float) -> None:
        self._parts.clear()
        self._begun = self._last = at
        self._part = START

    def _turn(self, part: str) -> None:
        """What has passed belongs to the part so far, what comes to `part`."""
        now = perf_counter()
        self._parts[self._part] += now - self._last
        self._last, self._part = now, part

    def _write(self, ctx: CallbackContext, ended: bool = False) -> None:
        self._turn(self._part)
        sitting = self._sittings[-1]
        sitting.last_step, sitting.ended = ctx.step, ended
        sitting.seconds, sitting.parts = self._last - (self._begun or 0.0), dict(self._parts)
        write_sittings(ctx.run_dir, self._sittings)
        self._written = self._last
