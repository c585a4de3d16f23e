"""Early stopping: end the run when a metric has stopped improving."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch

from drivetrain import Callback, DrivetrainError, component, hook, option, state

if TYPE_CHECKING:
    from drivetrain import CallbackContext

__all__ = ["EarlyStoppingCallback"]


@component
class EarlyStoppingCallback(Callback):
    """Stop when a metric has not improved for `patience` evaluations in a row.

    An improvement is a value better than the best so far by more than `min_delta`; NaN never is one. "eval/" metrics are looked
    at after each evaluation, all others ("train/loss") each time values are logged. The count is part of the checkpoint: a run
    that stopped stays stopped when it is resumed, unless it is given more patience.

    Source: I. Goodfellow, Y. Bengio, A. Courville, "Deep Learning" (2016), algorithm 7.1.
    """

    monitor: str = option(default="eval/loss", help="the metric to watch: eval/NAME, or one of the log such as train/loss")
    mode: Literal["min", "max"] = option(default="min", help="whether smaller or greater is better")
    patience: int = option(default=3, at_least=1, help="evaluations in a row without improvement that end the run")
    min_delta: float = option(default=0.0, at_least=0, help="smallest change that counts as an improvement")
    baseline: float | None = option(default=None, help="a value that must be beaten first; none by default")

    best: float | None = state(default=None)
    best_step: int | None = state(default=None)
    looked_at: int | None = state(default=None)
    misses: int = state(default=0)
    stopped: str | None = state(default=None)

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Keep a run that had stopped from training on (huggingface/transformers#10290); more patience lets it."""
        if self.monitor.startswith("eval/") and ctx.config.eval_interval is None:
            raise DrivetrainError(f"early_stopping watches {self.monitor}, but eval_interval is false; set it, such as to 1ep")
        if self.monitor.startswith("eval/") and ctx.eval_batches == 0:
            raise DrivetrainError(f"early_stopping watches {self.monitor}, but the run has no evaluation data; give it some")
        if self.stopped and self.misses >= self.patience:
            ctx.stop(self.stopped)
        else:
            self.stopped = None

    @hook(trylast=True)
    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        """Look at a metric of the evaluation, when the other callbacks have added theirs."""
        if self.monitor.startswith("eval/"):
            self._look(ctx, ctx.eval_metrics, "the evaluation gives")  # values of all ranks together

    @hook(trylast=True)
    def on_log(self, ctx: CallbackContext) -> None:
        """Look at a metric of the log."""
        if not self.monitor.startswith("eval/"):
            self._look(ctx, _over_ranks(ctx, ctx.metrics, self.monitor), "the log has")

    def _look(self, ctx: CallbackContext, metrics: Mapping[str, float], where: str) -> None:
        if self.monitor not in metrics:
            if self.looked_at is None:
                raise DrivetrainError(_missing(self.monitor, metrics, where))
            return  # a value that is logged now and then
        if self.looked_at == ctx.step:
            return  # the same weights once more, by a call of `trainer.evaluate` or at the end of the run
        self.looked_at = ctx.step
        value = metrics[self.monitor]
        if self._improved(value):
            self.best, self.best_step, self.misses = value, ctx.step, 0
            return
        self.misses += 1
        if self.misses >= self.patience:
            self.stopped = self._reason(value)
            ctx.stop(self.stopped)

    def _improved(self, value: float) -> bool:
        best = self.best if self.best is not None else self.baseline
        if math.isnan(value):
            return False
        if best is None:
            return True
        return value < best - self.min_delta if self.mode == "min" else value > best + self.min_delta

    def _reason(self, value: float) -> str:
        times = "the last time" if self.misses == 1 else f"the last {self.misses} times"
        if self.best is not None:
            target = f"its best {self.best:.6g} of step {self.best_step}"
        elif self.baseline is not None:
            target = f"the baseline {self.baseline:.6g}"
        else:
            return f"early stopping: {self.monitor} was NaN {times}"
        margin = f" by more than {self.min_delta:g}" if self.min_delta else ""
        return f"early stopping: {self.monitor} did not improve on {target}{margin} {times} (now {value:.6g})"


def _over_ranks(ctx: CallbackContext, metrics: Mapping[str, float], name: str) -> Mapping[str, float]:
    """The log with the mean of one value over the ranks that have it: all must come to the same decision.

    Each rank logs what it has, and all of them ask, whether they have the value or not: those that did not would leave the rest waiting.
    """
    if ctx.strategy.world_size == 1:
        return metrics
    mine = [metrics.get(name, 0.0), float(name in metrics)]
    total, count = ctx.strategy.sum(torch.tensor(mine, dtype=torch.float32, device=ctx.device)).tolist()
    return {**metrics, name: total / count} if count else metrics


def _missing(name: str, metrics: Mapping[str, float], where: str) -> str:
    near = difflib.get_close_matches(name, list(metrics), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"early_stopping: there is no metric {name!r} to monitor; {where} {', '.join(sorted(metrics)) or 'none'}.{hint} "
        "Set 'monitor' to one of them."
    )
