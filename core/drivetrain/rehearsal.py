"""Training steps that never were: for finders, which try something and put everything back."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from drivetrain.context import CallbackContext
from drivetrain.data import Source, Window
from drivetrain.errors import DataError
from drivetrain.hooks import Events, RunPluginManager
from drivetrain.loop import Loop, no_batch
from drivetrain.rng import random_state, set_random_state

_READ_ONCE = (
    "train data: an iterator gives each sample once, and the steps tried here would take them from the run. Give an iterable "
    "whose __iter__ begins anew, or leave out the finder."
)


@contextmanager
def rehearsal(ctx: CallbackContext, loop: Loop, source: Source) -> Iterator[Callable[[], Tensor]]:
    """Gives a function that trains one step, on the data from where the run stands, and returns its loss on the device.

    No component hears of it. Afterwards weights, buffers, optimizer, precision and random numbers are as before, bit by bit; until
    then a copy of them takes memory.

    Raises:
        DataError: when the data can be read only once, so that the run would lack what is read here.
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
        if source.is_read_once():
            raise DataError(_READ_ONCE)
        yield step
    finally:
        loop.events = events
        loop.break_off()
        put_back()


def _windows(ctx: CallbackContext, source: Source) -> Iterator[Window]:
    epoch, start = ctx.epoch, ctx.step_in_epoch
    while True:
        window = None
        for window in source.open(epoch, start):
            yield window
        if window is None and start == 0:
            raise DataError(no_batch(epoch))
        epoch, start = epoch + 1, 0


def _kept(ctx: CallbackContext) -> Callable[[], None]:
    """Copy what training changes; gives the function that puts it back, in place."""
    random = random_state(ctx.device)
    buffers = [module._buffers for module in ctx.model.modules()]
    refill = _held([*ctx.model.parameters(), *buffers, ctx.optimizer])
    precision = copy.deepcopy(dict(ctx.precision.state_dict()))
    fields: dict[str, Any] = {
        name: getattr(ctx, name) for name in ("loss_tensor", "grad_norm", "batch", "outputs", "microbatch", "microbatches")
    }

    def put_back() -> None:
        refill()
        ctx.precision.load_state_dict(precision)
        for name, value in fields.items():
            setattr(ctx, name, value)
        set_random_state(random, ctx.device)

    return put_back


def _held(things: list[Any]) -> Callable[[], None]:
    """Remember what a tree of tensors, dicts, lists and optimizers holds; gives the function that puts it back into the same objects.

    An optimizer is all of its attributes: one made of others has its state in those, and others keep theirs wherever they like.
    """
    seen: dict[int, Any] = {}
    refills: list[Callable[[], Any]] = []
    left = list(things)
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            refills.append(partial(thing.copy_, thing.detach().clone()))
        elif isinstance(thing, torch.Generator):
            refills.append(partial(thing.set_state, thing.get_state()))
        elif isinstance(thing, torch.optim.Optimizer) or (is_dataclass(thing) and hasattr(thing, "__dict__")):
            left.append(vars(thing))
        elif isinstance(thing, dict):
            refills += [thing.clear, partial(thing.update, dict(thing))]
            left += thing.values()
        elif isinstance(thing, (list, deque)):
            refills += [thing.clear, partial(thing.extend, list(thing))]
            left += thing
        elif isinstance(thing, tuple):
            left += thing

    def refill() -> None:
        with torch.no_grad():
            for call in refills:
                call()

    return refill
