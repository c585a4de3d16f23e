"""How many processes should fetch the data."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from multiprocessing import current_process
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from drivetrain import Callback, component, hook, option

if TYPE_CHECKING:
    from drivetrain import CallbackContext

_said = logging.getLogger("drivetrain.finders")
_WARM, _TIMED = 2, 8  # steps, and as many more as the workers have fetched ahead


@component
class WorkersFinderCallback(Callback):
    """Whenever a run begins or goes on, find how many data workers it takes until steps no longer wait for data.

    No worker, 1, 2, 4 and so on up to `most` are tried with some steps of training each, which are taken back bit by bit. More
    are used as long as they make a step faster by `gain`. The number changes no sample, no random number and no result, so each
    sitting, on whatever machine, finds its own; it takes the place of `dataloader.num_workers`. With several processes the mean of
    their times decides, the same for all. Ready batches and streams are left as they are.
    """

    most: int | None = option(default=None, at_least=0, help="no more than this; false for this process's share of the cores")
    gain: float = option(default=0.05, above=0, below=1, help="the part of a step's time that twice the workers must save")

    @hook(tryfirst=True)
    def on_run_start(self, ctx: CallbackContext) -> None:
        """Look for the number and use it."""
        if ctx.sample_order is None:
            return
        counts = self._counts(ctx)
        best, least = 0, self._seconds(ctx, 0) if counts else 0.0
        tried = [(0, least)]
        for count in counts:
            seconds = self._seconds(ctx, count)
            tried.append((count, seconds))
            if seconds <= least * (1 - self.gain):
                best, least = count, seconds
            elif count > 1:  # one alone saves nothing where fetching is all that there is to do
                break
        ctx.resize(num_workers=best)
        if ctx.is_main:
            times = ", ".join(f"{count}: {seconds * 1e3:.3g} ms" for count, seconds in tried)
            _said.warning("workers_finder: dataloader.num_workers = %d (a step with %s)", best, times)

    def _counts(self, ctx: CallbackContext) -> list[int]:
        if current_process().daemon:  # such as another program's worker, which may not start processes
            return []
        most = _cores(ctx) if self.most is None else self.most
        counts = [1]
        while counts[-1] * 2 <= most:
            counts.append(counts[-1] * 2)
        return [count for count in counts if count <= most]

    def _seconds(self, ctx: CallbackContext, workers: int) -> float:
        """Of a step with so many workers, once what they have fetched ahead is used up; the mean over processes."""
        ahead = workers * ctx.config.dataloader.prefetch_factor
        with ctx.rehearsal(num_workers=workers) as step:
            _several(step, _WARM + ahead)
            began = time.perf_counter()
            _several(step, _TIMED + ahead)
            seconds = (time.perf_counter() - began) / (_TIMED + ahead)
        return float(ctx.strategy.sum(torch.tensor(seconds, device=ctx.device))) / ctx.strategy.world_size


def _several(step: Callable[[], Tensor], times: int) -> None:
    """Train, and wait for the device."""
    for _ in range(times):
        loss = step()
    loss.item()


def _cores(ctx: CallbackContext) -> int:
    """Those of this machine that are this process's share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    hosts = [peer.host for peer in ctx.strategy.peers]
    return max(1, cores // max(1, hosts.count(hosts[ctx.strategy.rank]) if hosts else 1))
