"""The trainings that are compared: by the engine, and by a loop by hand over the same parts."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drivetrain import Component, Duration, Loss, Trainer, TrainingConfig

LONGER = 1_000_000  # so many times the run's length: no turn reaches the end


def trainer(
    config: TrainingConfig, folder: Path, with_callbacks: bool, own: Sequence[Component] = (), **changes: Any
) -> Trainer:
    """A run of a configuration that writes into `folder` and does not end, with or without the configuration's callbacks; `own` ones
    take part after these.

    Each run has ready callbacks of its own, copies. Evaluation never comes, though it is not switched off: callbacks that need it
    would refuse that.
    """
    config = copy.copy(config)
    for key, value in changes.items():
        setattr(config, key, value)
    config.output_dir, config.run_name, config.resume = folder.parent, folder.name, "never"
    config.max_duration = Duration(config.max_duration.value * LONGER, config.max_duration.unit)
    if config.eval_interval is not None:
        config.eval_interval, config.eval_at_start = Duration(LONGER, "st"), False
    if not with_callbacks:
        config.callbacks, config.standard_callbacks = [], False
        config.log_interval = Duration(LONGER, "st")
    config.callbacks = [copy.deepcopy(one) if isinstance(one, Component) else one for one in config.callbacks]
    return Trainer(None, config, callbacks=own)


def by_engine(made: Trainer) -> Iterator[Any]:
    """The engine's steps."""
    return made.steps()


def by_hand(made: Trainer) -> Iterator[Any]:
    """What one would write for the same model, data, precision, optimizer, accumulation, clipping and schedule.

    The parts are those that the engine has put together, so that both do the same work; the loop around them is its own.
    """
    ctx, run = made.ctx, made.ctx.run
    source, optimizer, precision = run.source, ctx.optimizer, ctx.precision
    schedule, max_norm, move = run.loop.schedule, ctx.config.max_grad_norm, run.devices.to
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    autocast = precision.forward() or nullcontext()
    ctx.model.train()
    step = 0
    try:
        for epoch in range(LONGER):
            for window in source.open(epoch):
                if schedule is not None:
                    _set_rate(optimizer, schedule(ctx.position_in(ctx.run_unit) if ctx.run_unit != "st" else step))
                for batch in window.batches:
                    with autocast:
                        found = ctx.loss_of(batch if ctx.device.type == "cpu" else move(batch))
                    loss = found.mean() if isinstance(found, Loss) else found
                    precision.scale(loss / len(window.batches) if len(window.batches) > 1 else loss).backward()
                precision.unscale(optimizer)
                if max_norm:
                    nn.utils.clip_grad_norm_(parameters, max_norm)
                precision.step(optimizer)
                for parameter in parameters:
                    parameter.grad = None
                step += 1
                yield loss.detach()
    finally:
        source.close()  # nothing else ends its worker processes before the end of the process


def _set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        rate = group.get("initial_lr", group["lr"]) * factor
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
