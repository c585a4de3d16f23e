"""The largest microbatch that fits."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

import torch

from drivetrain import Callback, ConfigError, ModelError, Problem, component, hook, option, state

if TYPE_CHECKING:
    from drivetrain import CallbackContext

_said = logging.getLogger("drivetrain.finders")


@component
class BatchSizeFinderCallback(Callback):
    """Before a run begins or goes on, find the largest microbatch that does not run out of memory; each step keeps its samples.

    A step's samples (`per_device_batch_size` × accumulation, or `global_batch_size`) are tried as one microbatch, then in two, three and
    so on as far as they divide, with two steps of training each, which are taken back bit by bit. The first size that fits is used,
    with as many microbatches as make up the step: a mean over the same samples, equal to rounding. Give the configuration the
    global batch, and this finds how to fit it. A run that goes on keeps the size that it began with. `headroom` leaves memory for
    longer inputs later on.

    For one process. With several, a process that runs out of memory would leave the others waiting: find the size with one
    process of the same kind of device, and configure it.
    """

    largest: int | None = option(default=None, at_least=1, help="no size above this is tried")
    headroom: float = option(default=0.1, at_least=0, below=1, help="part of a GPU's memory to be left free")

    found: int | None = state(default=None)  # samples in a microbatch

    @hook(tryfirst=True)
    def on_run_start(self, ctx: CallbackContext) -> None:
        """Look for the size and use it."""
        if ctx.strategy.world_size > 1:
            raise ConfigError([Problem("callbacks.batch_size_finder", "works with one process; see its documentation")])
        config = ctx.config
        share = config.global_batch_size or config.per_device_batch_size * config.gradient_accumulation_steps
        sizes = [share // parts for parts in range(1, share + 1) if share % parts == 0]
        if ctx.resumed and self.found in sizes:  # what goes on keeps its microbatches: dropout draws once for each
            ctx.resize(self.found)
            return
        for size in sizes:
            if size <= (self.largest or share) and self._fits(ctx, size):
                ctx.resize(size)
                self.found = size
                _said.warning("batch_size_finder: microbatches of %d samples, %d in a step", size, share // size)
                return
        raise ModelError("batch_size_finder: not even a microbatch of one sample fits into memory.")

    def _fits(self, ctx: CallbackContext, size: int) -> bool:
        """Two steps, since an optimizer makes its state in the first."""
        if ctx.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(ctx.device)  # of whatever this process has done before
        try:
            with ctx.rehearsal(size) as step:
                for _ in range(2):
                    step()
                return self._has_headroom(ctx)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            error.__traceback__ = None  # its frames hold what has filled the memory
            return False
        finally:
            gc.collect()
            if ctx.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(ctx.device)

    def _has_headroom(self, ctx: CallbackContext) -> bool:
        if ctx.device.type != "cuda":
            return True
        torch.cuda.synchronize(ctx.device)
        _, total = torch.cuda.mem_get_info(ctx.device)
        return torch.cuda.max_memory_allocated(ctx.device) <= (1 - self.headroom) * total


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
