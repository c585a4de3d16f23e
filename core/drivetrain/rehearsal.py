"""Training steps that never were: for finders, which try something and put everything back."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from drivetrain.context import CallbackContext
from drivetrain.data import Source, Window
from drivetrain.hooks import Events, RunPluginManager
from drivetrain.loop import Loop
from drivetrain.rng import random_state, set_random_state


@contextmanager
def rehearsal(ctx: CallbackContext, loop: Loop, source: Source) -> Iterator[Callable[[], Tensor]]:
    """Gives a function that trains one step, on the data from where the run stands, and returns its loss on the device.

    No component hears of it. Afterwards weights, buffers, optimizer, precision and random numbers are as before, bit by bit; until
    then a copy of them takes memory.
    """
    put_back = _kept(ctx)
    events, loop.events = loop.events, Events(RunPluginManager())
    windows = _windows(ctx, source)

    def step() -> Tensor:
        window = next(windows)
        ctx.microbatches = len(window.batches)
        loop.update(loop.gradients(window))
        assert ctx.loss_tensor is not None
        return ctx.loss_tensor

    try:
        yield step
    finally:
        loop.events = events
        for parameter in loop.parameters:
            parameter.grad = None
        put_back()


def _windows(ctx: CallbackContext, source: Source) -> Iterator[Window]:
    epoch, start = ctx.epoch, ctx.step_in_epoch
    while True:
        yield from source.open(epoch, start)
        epoch, start = epoch + 1, 0


def _kept(ctx: CallbackContext) -> Callable[[], None]:
    """Copy what training changes; gives the function that puts it back, in place."""
    optimizer, random = ctx.optimizer, random_state(ctx.device)
    tensors = [*ctx.model.parameters(), *ctx.model.buffers()]
    copies = [tensor.detach().clone() for tensor in tensors]
    groups = [{key: copy.copy(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    state = {parameter: copy.deepcopy(entries) for parameter, entries in optimizer.state.items()}
    precision = copy.deepcopy(dict(ctx.precision.state_dict()))
    fields: dict[str, Any] = {
        name: getattr(ctx, name) for name in ("loss_tensor", "grad_norm", "batch", "outputs", "microbatch", "microbatches")
    }

    @torch.no_grad()
    def put_back() -> None:
        for tensor, kept in zip(tensors, copies, strict=True):
            tensor.copy_(kept)
        for group, options in zip(optimizer.param_groups, groups, strict=True):
            parameters = group["params"]
            group.clear()
            group.update({"params": parameters, **options})
        optimizer.state = defaultdict(dict, state)
        ctx.precision.load_state_dict(precision)
        for name, value in fields.items():
            setattr(ctx, name, value)
        set_random_state(random, ctx.device)

    return put_back
