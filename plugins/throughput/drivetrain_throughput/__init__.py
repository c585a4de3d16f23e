"""How fast a run is, what it waits for and what memory it holds."""

from __future__ import annotations

import sys
from time import perf_counter
from typing import TYPE_CHECKING, Any

import attrs
import psutil
import torch

from drivetrain import Callback, component, hook

if TYPE_CHECKING:
    from drivetrain import CallbackContext

__all__ = ["ThroughputCallback"]

GB = 1e9


@component
class ThroughputCallback(Callback):
    """Add speed and memory to the values of each log. It measures between logs and does nothing in a step.

    - `speed/steps_per_second`, `speed/samples_per_second`, `speed/tokens_per_second` (when batches have tokens), of all ranks
      together; `speed/step_ms`, the mean over the interval; `speed/data_wait`, the part of the interval spent waiting for data
    - `memory/process_gb` and `memory/process_peak_gb`: resident memory of this process, without its data workers;
      `memory/device_gb`: the most that tensors have held on the accelerator. GB are 1e9 bytes.
    - `system/cpu_percent`: of all cores of the machine together

    Evaluation does not count as training time, and neither does a checkpoint saved in a step that logged or evaluated. One
    saved in any other step does count: nothing tells when it began.
    """

    _process: Any = attrs.field(factory=psutil.Process, init=False, repr=False)
    _device: Any = attrs.field(default=None, init=False, repr=False)  # None when its memory cannot be asked for
    _last: Any = attrs.field(default=None, init=False, repr=False)  # the counters at the previous log
    _paused: float = attrs.field(default=0.0, init=False, repr=False)  # seconds since then that were no training
    _idle_since: Any = attrs.field(default=None, init=False, repr=False)  # (step, time) of the latest log or evaluation

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Begin to measure."""
        self._process = psutil.Process()  # a component may have been made before a fork
        self._device = ctx.device if _device_memory(ctx.device) is not None else None
        psutil.cpu_percent()  # it measures between calls
        self._begin(ctx)

    @hook(tryfirst=True)
    def on_log(self, ctx: CallbackContext) -> None:
        """Add the values of the interval, before the callbacks that show and keep them."""
        ctx.metrics.update(self._speeds(ctx) | self._memory() | {"system/cpu_percent": psutil.cpu_percent()})
        self._begin(ctx)

    @hook(tryfirst=True)
    def on_evaluate_start(self, ctx: CallbackContext) -> None:
        """Stop the clock."""
        self._idle_since = (ctx.step, perf_counter())

    @hook(trylast=True)
    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        """Start it again."""
        self._pause_ends(ctx)

    def on_checkpoint_saved(self, ctx: CallbackContext) -> None:
        """Take out what the step that saved has spent since its log or evaluation."""
        if self._idle_since is not None and self._idle_since[0] == ctx.step:
            self._pause_ends(ctx)

    def _begin(self, ctx: CallbackContext) -> None:
        now = perf_counter()
        self._last = (now, ctx.step, ctx.samples, ctx.tokens, ctx.data_wait)
        self._idle_since, self._paused = (ctx.step, now), 0.0

    def _pause_ends(self, ctx: CallbackContext) -> None:
        now = perf_counter()
        self._paused += now - self._idle_since[1]
        self._idle_since = (ctx.step, now)

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
        return speeds | ({"speed/tokens_per_second": tokens / seconds} if tokens else {})

    def _memory(self) -> dict[str, float]:
        info = self._process.memory_info()
        values = {"memory/process_gb": info.rss / GB, "memory/process_peak_gb": max(_peak_bytes(info), info.rss) / GB}
        held = _device_memory(self._device) if self._device is not None else None
        return values | ({"memory/device_gb": held / GB} if held is not None else {})


def _peak_bytes(info: Any) -> int:
    """The most resident memory this process ever had; psutil knows it on Windows only."""
    if sys.platform == "win32":
        return int(info.peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def _device_memory(device: torch.device) -> int | None:
    """The most bytes that tensors have held on an accelerator; None for the CPU and for backends that do not count."""
    if device.type == "cpu":
        return None
    try:
        return torch.accelerator.max_memory_allocated(device)
    except (RuntimeError, ValueError, NotImplementedError):
        return None
