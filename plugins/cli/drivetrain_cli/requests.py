"""What is asked of a run from outside, other than by a signal: a file in its directory, or the end of its job's time."""

from __future__ import annotations

import os
import time

import attrs

from drivetrain import Callback, CallbackContext, component

STOP_FILE = "STOP"
_MARGIN = 120.0  # seconds for the last step and its checkpoint


@component
class Requests(Callback):
    """Stops the run when RUN_DIR/STOP appears, or shortly before SLURM would end the job (SLURM_JOB_END_TIME).

    Looks when values are logged, so that a step costs nothing. The file is removed: the same command goes on.
    """

    _ends_at: float | None = attrs.field(default=None, init=False, repr=False)
    _looked_at: float | None = attrs.field(default=None, init=False, repr=False)

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Find out when the job ends."""
        text, now = os.environ.get("SLURM_JOB_END_TIME", ""), time.time()
        self._looked_at = now
        if text.isdecimal():
            self._ends_at = int(text) - min(_MARGIN, max(0.0, int(text) - now) / 10)

    def on_log(self, ctx: CallbackContext) -> None:
        """Stop when it is asked for, or when there may be no time to look once more."""
        now = time.time()
        if self._ends_at is not None and self._looked_at is not None and now + (now - self._looked_at) > self._ends_at:
            ctx.trainer.stop("the SLURM job's time is nearly over")
        self._looked_at = now
        if ctx.is_main and (ctx.run_dir / STOP_FILE).is_file():
            (ctx.run_dir / STOP_FILE).unlink(missing_ok=True)
            ctx.trainer.stop(f"the file {STOP_FILE} was found")
