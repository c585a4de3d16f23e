"""Evaluation: every sample once, weighted means, values added up on the device and read once at the end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from drivetrain.calling import ModelCall
from drivetrain.context import CallbackContext
from drivetrain.data import Source
from drivetrain.errors import ModelError
from drivetrain.hooks import Events
from drivetrain.loss import Loss, samples_in
from drivetrain.rng import isolated
from drivetrain.strategy import Strategy

Metrics = Callable[[Any, Any], Mapping[str, Any]] | Mapping[str, Any] | None


def evaluate(
    ctx: CallbackContext,
    events: Events,
    source: Source,
    call: ModelCall,
    metrics: Metrics,
    transfer: Callable[[Any], Any] | None,
) -> dict[str, float]:
    """Run the model over all of `source` in eval mode.

    Weights, gradients, random state and the modules' modes are as before afterwards.

    Args:
        metrics: `function(outputs, batch)` that returns a mapping of names to means (weighted by the batch's samples) or to
            `Loss(total, weight)`; or a mapping of names to objects with `update(outputs, targets)`, `compute()` and `reset()`, and
            with several ranks `merge_state(other)`, as torchmetrics has them.

    Returns:
        "eval/loss", when the model or a loss function gives one, and "eval/NAME" for each metric.
    """
    modes = [module for module in ctx.model.modules() if module.training]
    kept = ctx.batch, ctx.outputs
    forward = copy.copy(ctx.precision.forward()) or nullcontext()  # a listener may evaluate while the training's own is entered
    ctx.model.eval()
    try:
        with torch.no_grad(), isolated(device=ctx.device):
            if events.evaluate_start is not None:
                events.evaluate_start(ctx)
            sums = _Sums(metrics)
            for (batch,), (count,), _ in source.open(0):
                ctx.batch = batch if transfer is None else transfer(batch)
                with forward:
                    ctx.outputs = call.forward(ctx.model, ctx.batch)
                    sums.add(ctx.outputs, ctx.batch, call, counts=count > 0)
                if events.evaluate_batch is not None:
                    ctx.counts = count > 0
                    events.evaluate_batch(ctx)
            ctx.eval_metrics = sums.values(ctx.strategy)
            if events.evaluate_end is not None:
                events.evaluate_end(ctx)
    finally:
        for module in modes:
            module.training = True
        ctx.batch, ctx.outputs = kept
    return ctx.eval_metrics


class _Sums:
    """Weighted sums of the loss and of streaming metrics, on the device until they are asked for."""

    def __init__(self, metrics: Metrics) -> None:
        self.function = metrics if callable(metrics) else None
        self.objects: Mapping[str, Any] = metrics if isinstance(metrics, Mapping) else {}
        self.totals: dict[str, Any] = {}
        self.weights: dict[str, Any] = {}
        for thing in self.objects.values():
            thing.reset()

    def add(self, outputs: Any, batch: Any, call: ModelCall, counts: bool) -> None:
        """Take one batch in. One that does not count, since it stands in where other ranks have more, tells what values there are."""
        samples = samples_in(batch) if counts else 0
        if call.can_lose(outputs):
            self._add("loss", call.loss(outputs, batch), samples)
        if self.function is not None:
            for name, value in self.function(outputs, batch).items():
                self._add(name, value, samples)
        for thing in self.objects.values() if counts else ():
            thing.update(outputs, batch[1] if isinstance(batch, (tuple, list)) else batch)

    def _add(self, name: str, value: Any, samples: int) -> None:
        loss = value if isinstance(value, Loss) else Loss(torch.as_tensor(value) * samples, samples)
        if not isinstance(loss.total, Tensor) or loss.total.dim() != 0:
            raise ModelError(f"the metric {name!r} must be a number, a scalar tensor or Loss(total, weight), not {value!r:.80}")
        # fp64 where the device has it: a long evaluation must not lose small values to a large sum
        exact = torch.float32 if loss.total.device.type == "mps" else torch.float64
        total = loss.total.detach().to(exact)
        self.totals[name] = self.totals.get(name, 0) + (total if samples else torch.zeros_like(total))
        # bf16 counts to 256
        weight = loss.weight.detach().to(exact) if isinstance(loss.weight, Tensor) else loss.weight
        self.weights[name] = self.weights.get(name, 0) + (weight if samples else 0.0)

    def values(self, strategy: Strategy) -> dict[str, float]:
        """The means over all ranks, read from the device in one go."""
        if not self.totals and not self.objects:
            return {}
        names = list(self.totals)
        result = {}
        if names:
            both = torch.stack(
                [t for n in names for t in (self.totals[n], torch.as_tensor(self.weights[n]).to(self.totals[n]))]
            )
            totals = strategy.sum(both).view(-1, 2).tolist()
            result = {
                f"eval/{n}": total / weight if weight else float("nan")
                for n, (total, weight) in zip(names, totals, strict=True)
            }
        return result | {
            f"eval/{name}": float(_joined(name, thing, strategy).compute()) for name, thing in self.objects.items()
        }


def _joined(name: str, thing: Any, strategy: Strategy) -> Any:
    """A streaming metric that has seen what those of all ranks have."""
    if strategy.world_size == 1:
        return thing
    if not callable(getattr(thing, "merge_state", None)):
        raise ModelError(
            f"the metric {name!r} ({type(thing).__name__}) has seen the samples of this rank only, and has no merge_state(other) to "
            "take in what the other ranks' have. Add it, or give a function that returns means or Loss(total, weight)."
        )
    whole, *others = strategy.gather(thing)[:: strategy.world_size // strategy.data_ranks]
    for other in others:
        whole.merge_state(other)
    whole.distributed_available_fn = lambda: False  # or torchmetrics would add up over the ranks once more
    return whole
