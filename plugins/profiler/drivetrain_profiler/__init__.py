"""Profiles of chosen steps: where the time goes, operation by operation, and who holds the memory."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch.profiler import ProfilerActivity, profile

from drivetrain import Callback, component, hook, option

if TYPE_CHECKING:
    from drivetrain import CallbackContext

__all__ = ["ProfilerCallback"]

_NEVER = float("inf")
_said = logging.getLogger("drivetrain.profiler")


@component
class ProfilerCallback(Callback):
    """Record chosen steps with torch.profiler, into `profile/` in the run's directory.

    From each step of `start` on, `steps` of them: `rank0-step-00000010.pt.trace.json`, a Chrome trace (ui.perfetto.dev,
    chrome://tracing, or TensorBoard with torch-tb-profiler), and a table of the operations that took most of the time, as a text
    and on the standard error stream. One more step before each is run under the profiler and not counted, since the first is slow.
    With `memory_snapshot` on CUDA, also a pickle of every allocation during those steps, for pytorch.org/memory_viz.

    A profiled step is slower, and waits for the device at the end; all others cost one comparison. A resumed run does not repeat
    what is behind it.
    """

    start: list[int] = option(factory=lambda: [10], at_least=2, help="the first step of each profile")
    steps: int = option(default=3, at_least=1, help="how many steps a profile has")
    top: int = option(default=10, at_least=0, help="so many operations are printed; 0 for none")
    record_shapes: bool = option(default=False, help="tell operations of different shapes apart")
    with_stack: bool = option(default=False, help="record the Python lines that called; slow")
    profile_memory: bool = option(default=False, help="record allocations in the trace")
    memory_snapshot: bool = option(default=False, help="on CUDA, write a snapshot of the allocator's history")
    all_ranks: bool = option(default=False, help="profile every process, not only rank 0")

    _profiler: Any = attrs.field(default=None, init=False, repr=False)
    _next: float = attrs.field(default=_NEVER, init=False, repr=False)  # the steps done when something begins
    _last: float = attrs.field(default=_NEVER, init=False, repr=False)  # the step after which it ends
    _first: int = attrs.field(default=0, init=False, repr=False)

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Find the first profile that is still ahead."""
        self._profiler, self._last = None, _NEVER
        self._plan(ctx.step) if ctx.is_main or self.all_ranks else self._never()

    @hook(tryfirst=True, not_before="_next")
    def on_step_start(self, ctx: CallbackContext) -> None:
        """Begin: to warm up before the first step, to record with it."""
        if self._profiler is None:
            self._begin(ctx)
        else:
            self._profiler.step()
            self._next, self._last = _NEVER, self._first + self.steps - 1

    @hook(trylast=True, not_before="_last")
    def on_step_end(self, ctx: CallbackContext) -> None:
        """End after the last step."""
        self._end(ctx)

    def on_exception(self, ctx: CallbackContext) -> None:
        """Stop the profiler, which belongs to the process."""
        self._stop()

    def on_run_end(self, ctx: CallbackContext) -> None:
        """Write what there is when the run ends in the middle of a profile."""
        if self._last < _NEVER and ctx.exception is None:
            self._end(ctx)
        self._stop()

    # -- a profile -------------------------------------------------------------------------------------------------------

    def _never(self) -> None:
        self._next = _NEVER

    def _plan(self, done: int) -> None:
        """The next profile begins one step early, to warm up."""
        ahead = [step for step in sorted(self.start) if step - 1 > done]
        self._first = ahead[0] if ahead else 0
        self._next = self._first - 2 if ahead else _NEVER

    def _begin(self, ctx: CallbackContext) -> None:
        activities = [ProfilerActivity.CPU]
        if ctx.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        elif ctx.device.type == "xpu":
            activities.append(ProfilerActivity.XPU)
        schedule = torch.profiler.schedule(wait=0, warmup=1, active=self.steps + 1, repeat=1)
        options: dict[str, Any] = {"record_shapes": self.record_shapes, "with_stack": self.with_stack}
        options["profile_memory"] = self.profile_memory
        self._profiler = profile(activities=activities, schedule=schedule, **options)
        if self.memory_snapshot and ctx.device.type == "cuda":
            torch.cuda.memory._record_memory_history()
        self._profiler.start()
        self._next = self._first - 1

    def _end(self, ctx: CallbackContext) -> None:
        if ctx.device.type != "cpu":
            torch.accelerator.synchronize(ctx.device)  # what was launched in these steps belongs to them
        profiler = self._profiler
        self._stop(ctx)
        folder = ctx.run_dir / "profile"
        folder.mkdir(exist_ok=True)
        stem = f"rank{ctx.strategy.rank}-step-{self._first:08d}"
        profiler.export_chrome_trace(str(folder / f"{stem}.pt.trace.json"))
        self._write_table(ctx, profiler, folder / f"{stem}.txt")
        if self.memory_snapshot and ctx.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(folder / f"{stem}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        elif self.memory_snapshot:
            _said.warning("memory_snapshot needs CUDA, this run is on %s; see profile_memory.", ctx.device)
        self._plan(ctx.step)

    def _write_table(self, ctx: CallbackContext, profiler: Any, path: Path) -> None:
        averages = profiler.key_averages(group_by_input_shape=self.record_shapes)
        by = "self_cpu_time_total" if ctx.device.type == "cpu" else f"self_{ctx.device.type}_time_total"
        path.write_text(averages.table(sort_by=by, row_limit=100, max_name_column_width=80))
        if self.top and ctx.is_main:
            lines = averages.table(sort_by=by, row_limit=self.top, max_name_column_width=50)
            last = min(ctx.step, self._first + self.steps - 1)
            print(f"profile of steps {self._first} to {last}, see {path.parent}\n{lines}", file=sys.stderr)

    def _stop(self, ctx: CallbackContext | None = None) -> None:
        profiler, self._profiler, self._last = self._profiler, None, _NEVER
        if profiler is not None:
            profiler.stop()
            if ctx is None and self.memory_snapshot and torch.cuda.is_available():
                torch.cuda.memory._record_memory_history(enabled=None)
