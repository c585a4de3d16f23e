"""The callback: what of the run is shown, and when."""

from __future__ import annotations

import math
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import Callback, component, hook, option
from drivetrain_progress import text
from drivetrain_progress.views import view_of

if TYPE_CHECKING:
    from drivetrain import CallbackContext

NEVER = math.inf


@component
class ProgressCallback(Callback):
    """Show one bar over the run: position, loss, learning rate, speed, time left; and the results of evaluations above it.

    Where there is no terminal (a file, a batch job) it writes plain lines instead. All goes to the standard error stream.
    The values are those of the newest log, so nothing waits for the device; in a step (of short ones in each eighth) it reads the
    clock and, a few times a second, draws. The time left is by the mean pace of this sitting, evaluation included, the first step not.
    """

    seconds: float = option(default=10.0, above=0, help="least time between two lines where there is no terminal")

    _view: Any = attrs.field(default=None, init=False, repr=False)  # None: nothing is shown (another rank, a broken stream)
    _due: float = attrs.field(default=NEVER, init=False, repr=False)  # when on_step_end draws next
    _log_due: float = attrs.field(default=NEVER, init=False, repr=False)  # when on_log does
    _begun: float = attrs.field(default=0.0, init=False, repr=False)
    _looks: float = attrs.field(default=0, init=False, repr=False)  # the step after which on_step_end looks at the clock
    _looked: list[float] = attrs.field(factory=lambda: [0, 0.0], init=False, repr=False)  # (step, time) of the last look
    _first: Any = attrs.field(default=None, init=False, repr=False)  # (time, position) after the first step of this sitting
    _values: list[str] = attrs.field(factory=list, init=False, repr=False)
    _batches: int = attrs.field(default=0, init=False, repr=False)
    _batches_before: int = attrs.field(default=0, init=False, repr=False)  # of the previous evaluation: most likely the same
    _batch_due: float = attrs.field(default=NEVER, init=False, repr=False)

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Open the bar where the run begins or goes on."""
        self._view = view_of(self.seconds) if ctx.is_main else None
        self._begun, self._first, self._values = monotonic(), None, []
        self._due = self._log_due = self._looks = NEVER
        if self._view is not None:
            self._looks = 0
            self._due, self._log_due = self._begun + self._view.pace, 0.0
            if self._view.live:
                self._draw(ctx)

    @hook(not_before="_looks")
    def on_step_end(self, ctx: CallbackContext) -> None:
        """Move on, a few times a second at most."""
        now, pace = monotonic(), self._view.pace
        if self._first is None:
            self._first = (now, ctx.position)
        step, then = self._looked
        if (now - then) * 8 < pace / 4 * (ctx.step - step):  # eight such steps take a quarter of that time
            self._looks = ctx.step + 8
        self._looked[:] = ctx.step, now
        if now >= self._due:
            self._due = now + pace
            if not self._view.live:  # the new values of a log are worth a drawing at once, but not a line of a file
                self._log_due = self._due
            self._draw(ctx)  # which closes the view when its stream is gone

    @hook(trylast=True)
    def on_log(self, ctx: CallbackContext) -> None:
        """Take the new values, after the other callbacks had their chance to add some."""
        if self._view is None:
            return
        self._values, self._looks = text.values(ctx.metrics), 0  # the run may have gone back
        if (now := monotonic()) >= self._log_due:
            self._due = self._log_due = now + self._view.pace
            self._draw(ctx)

    def on_evaluate_start(self, ctx: CallbackContext) -> None:
        """Begin to count batches."""
        self._batches, self._batch_due = 0, monotonic() + (self._view.patience if self._view is not None else NEVER)

    def on_evaluate_batch(self, ctx: CallbackContext) -> None:
        """Show them when the evaluation takes long enough to be noticed."""
        self._batches += 1
        if (now := monotonic()) >= self._batch_due and self._view is not None:
            self._batch_due = now + self._view.pace
            total = self._batches_before or ctx.eval_batches or 0
            known = total if self._batches <= total else None
            self._safely("evaluating", ctx.step, self._batches, known)

    @hook(trylast=True)
    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        """Write the results as a line."""
        self._batches_before = self._batches
        values = [f"{name} {text.number(value, 4)}" for name, value in ctx.eval_metrics.items()]
        if values:
            self._safely("say", "  ".join([text.step(ctx.step, ctx.run_length, ctx.run_unit), *values]))

    @hook(tryfirst=True)
    def on_exception(self, ctx: CallbackContext) -> None:
        """Leave the bar where it ended, so that what is printed about the error begins on a line of its own."""
        if self._view is not None:
            self._draw(ctx, f"after {text.clock(monotonic() - self._begun)}")
        self._close()

    def on_run_end(self, ctx: CallbackContext) -> None:
        """Show the end, and why it came when it came early."""
        if self._view is None:
            return
        if ctx.stop_reason is not None and ctx.position < ctx.run_length < NEVER:
            self._safely("say", f"stopped at step {ctx.step}: {ctx.stop_reason}")
        self._draw(ctx, f"in {text.clock(monotonic() - self._begun)}")
        self._close()

    # -- drawing ---------------------------------------------------------------------------------------------------------

    def _draw(self, ctx: CallbackContext, last: str = "") -> None:
        position, length = ctx.position, ctx.run_length
        left = text.place(min(position, length), length, ctx.run_unit)
        fraction = min(1.0, position / length) if length < NEVER else None
        self._safely("draw", left, fraction, self._values, last or self._time_left(ctx))

    def _time_left(self, ctx: CallbackContext) -> str:
        if self._first is None or ctx.run_length == NEVER or ctx.position >= ctx.run_length:
            return ""  # at the end, an evaluation and a save may still take their time
        seconds, done = monotonic() - self._first[0], ctx.position - self._first[1]
        return f"ETA {text.clock(seconds / done * (ctx.run_length - ctx.position))}" if done > 0 else ""

    def _safely(self, action: str, *arguments: Any) -> None:
        """Draw, and go on in silence when the stream is gone: a closed terminal is no reason to lose a run."""
        try:
            if self._view is not None:
                getattr(self._view, action)(*arguments)
        except (OSError, ValueError):
            self._close()

    def _close(self) -> None:
        view, self._view = self._view, None
        self._due = self._log_due = self._looks = NEVER
        if view is not None:
            with suppress(OSError, ValueError):
                view.close()
