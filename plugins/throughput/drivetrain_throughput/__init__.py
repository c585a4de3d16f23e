"""How fast a run is, what it waits for and what memory it holds."""

from __future__ import annotations

import os
import warnings
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import Callback, component, hook, option
from drivetrain_throughput.flops import StepCounter, peak_tflops
from drivetrain_throughput.machine import Machine

if TYPE_CHECKING:
    from drivetrain import CallbackContext

__all__ = ["ThroughputCallback"]

_NEVER = float("inf")
_MUCH = 0.5  # of the time, spent waiting for data in two intervals one after the other, and
_SECONDS = 1.0  # so long in each: that of tiny runs is not worth a word


@component
class ThroughputCallback(Callback):
    """Add speed and memory to the values of each log. In a step it reads the clock once.

    - `speed/steps_per_second`, `speed/samples_per_second`, `speed/tokens_per_second` (when batches have tokens), of all ranks
      together; `speed/step_ms`, the mean over the interval; `speed/step_ms_p50`, `_p95` and `_max`, of this process's steps;
      `speed/data_wait`, the part of the interval spent waiting for data
    - `speed/tflops_per_second`, of all ranks, from the FLOPs of one step, counted once; `speed/mfu`, over the devices' peak
    - `memory/process_gb` and `memory/process_peak_gb`: resident memory of this process, without its data workers;
      `memory/device_gb`: the most that tensors have held on the accelerator. GB are 1e9 bytes.
    - `system/cpu_percent`, of all cores of the machine together; `system/memory_percent`; `system/disk_free_gb`, where the run
      is kept, if it is. With nvidia-ml-py installed `gpu/percent`, `gpu/memory_gb` (all programs) and `gpu/watts`.

    When a run waits for data more than half of the time it says so, once.

    Evaluation does not count as training time, and neither does a checkpoint saved in a step that logged or evaluated. One
    saved in any other step does count: nothing tells when it began. Steps are timed on the host, which a GPU may lag behind: means
    over an interval are right, single steps only where the host waits for the device.
    """

    flops: bool = option(default=True, help="count the FLOPs of a step, the second one, and report them by second")
    peak_tflops: float | None = option(
        default=None, above=0, help="of one device, dense, for `speed/mfu`; known for common GPUs"
    )

    _machine: Any = attrs.field(default=None, init=False, repr=False)
    _counter: StepCounter = attrs.field(factory=StepCounter, init=False, repr=False)
    _counts: float = attrs.field(default=_NEVER, init=False, repr=False)  # so many steps are done when the next one is counted
    _last: Any = attrs.field(default=None, init=False, repr=False)  # the counters at the previous log
    _paused: float = attrs.field(default=0.0, init=False, repr=False)  # seconds since then that were no training
    _starved: bool = attrs.field(default=False, init=False, repr=False)  # the last interval was spent waiting for data
    _told: bool = attrs.field(default=False, init=False, repr=False)
    _idle_since: Any = attrs.field(default=None, init=False, repr=False)  # (step, time) of the latest log or evaluation
    _ends: list[float] = attrs.field(factory=list, init=False, repr=False)  # of steps since the latest pause, its end first
    _steps: list[float] = attrs.field(factory=list, init=False, repr=False)  # seconds of the interval's steps before that

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Begin to measure."""
        self._machine = Machine(ctx.device, ctx.trainer.run_dir if ctx.trainer.has_run_dir else None)
        self._counter = StepCounter()
        self._counts = ctx.step + 1 if self.flops and not ctx.config.compile else _NEVER
        self._peak = self.peak_tflops or peak_tflops(ctx.device)
        self._begin(ctx)

    @hook(trylast=True, not_before="_counts")
    def on_step_start(self, ctx: CallbackContext) -> None:
        """Count."""
        self._counter.begin()

    @hook(tryfirst=True)
    def on_step_end(self, ctx: CallbackContext) -> None:
        """Look at the clock."""
        self._ends.append(perf_counter())
        if self._counts < _NEVER and self._counter.end():
            self._counts = _NEVER

    @hook(tryfirst=True)
    def on_log(self, ctx: CallbackContext) -> None:
        """Add the values of the interval, before the callbacks that show and keep them."""
        self._no_step()
        speeds = self._speeds(ctx)
        ctx.metrics.update(speeds | self._machine.values())
        self._look_for_data(ctx, speeds.get("speed/data_wait", 0.0))
        self._begin(ctx)

    @hook(tryfirst=True)
    def on_evaluate_start(self, ctx: CallbackContext) -> None:
        """Stop the clock."""
        self._no_step()
        self._idle_since = (ctx.step, perf_counter())

    @hook(trylast=True)
    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        """Start it again."""
        self._pause_ends(ctx)

    def on_checkpoint_saved(self, ctx: CallbackContext) -> None:
        """Take out what the step that saved has spent since its log or evaluation."""
        if self._idle_since is not None and self._idle_since[0] == ctx.step:
            self._pause_ends(ctx)

    def on_run_end(self, ctx: CallbackContext) -> None:
        """Count no further."""
        self._counter.cancel()

    def _look_for_data(self, ctx: CallbackContext, part: float) -> None:
        starved = part > _MUCH and ctx.data_wait - self._last[4] > _SECONDS
        again, self._starved = starved and self._starved, starved
        if again and not self._told:
            self._told = True
            workers, cores = ctx.config.dataloader.num_workers, os.cpu_count() or 1
            warnings.warn(
                f"throughput: {part:.0%} of the time since the last log was spent waiting for data. dataloader.num_workers is "
                f"{workers}, the machine has {cores} cores; the callback workers_finder measures how many it takes. Where more of them "
                "do not help, samples take too long to read or make.",
                stacklevel=2,
            )

    def _begin(self, ctx: CallbackContext) -> None:
        now = perf_counter()
        self._last = (now, ctx.step, ctx.samples, ctx.tokens, ctx.data_wait)
        self._idle_since, self._paused = (ctx.step, now), 0.0
        self._ends, self._steps = [now], []

    def _pause_ends(self, ctx: CallbackContext) -> None:
        now = perf_counter()
        self._paused += now - self._idle_since[1]
        self._idle_since = (ctx.step, now)
        self._ends = [now]

    def _no_step(self) -> None:
        """What comes now is none: neither timed nor counted as one."""
        self._steps += [after - before for before, after in pairwise(self._ends)]
        self._ends = self._ends[-1:]
        self._counter.cancel()

    def _speeds(self, ctx: CallbackContext) -> dict[str, float]:
        now = (perf_counter(), ctx.step, ctx.samples, ctx.tokens, ctx.data_wait)
        seconds, steps, samples, tokens, waited = (a - b for a, b in zip(now, self._last, strict=True))
        seconds -= self._paused
        if steps < 1 or seconds <= 0:
            return {}
        speeds = {
            "speed/steps_per_second": steps / seconds,
            "speed/samples_per_second": samples / seconds,
            "speed/step_ms": 1000 * seconds / steps,
            "speed/data_wait": min(max(waited / seconds, 0.0), 1.0),
        }
        if tokens:
            speeds["speed/tokens_per_second"] = tokens / seconds
        if self._counter.flops is not None:
            each = self._counter.flops * steps / seconds / 1e12
            speeds["speed/tflops_per_second"] = each * ctx.strategy.world_size
            if self._peak is not None:
                speeds["speed/mfu"] = each / self._peak
        return speeds | _percentiles(self._steps)


def _percentiles(seconds: list[float]) -> dict[str, float]:
    """The nearest-rank percentiles, in milliseconds; nothing for no step."""
    if not seconds:
        return {}
    ordered = sorted(1000 * s for s in seconds)
    at = {name: ordered[min(len(ordered) - 1, int(part * len(ordered)))] for name, part in (("p50", 0.5), ("p95", 0.95))}
    return {f"speed/step_ms_{name}": value for name, value in (at | {"max": ordered[-1]}).items()}
