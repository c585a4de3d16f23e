"""What the trials train, named on the command line: a model of a chosen size, data, and a callback that ends its own process.

The variable FAULT names the point: `place:n:how`, at the n-th time that the run comes there; how is "kill" or a signal's name. A place is
an event (on_forward), an operation on the checkpoint's disk (rename; half of write), or saving of the configuration. WORKER_FAULT is
`how:n`: the second worker of the training data kills itself, or hangs, in its n-th sample.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import get_worker_info

from drivetrain import Callback, CallbackContext, Component, OptimizerComponent, TrainingConfig, component, option, state
from drivetrain_checkpoint import Files

EVENTS = (
    "on_restore",
    "on_run_start",
    "on_epoch_start",
    "on_batch",
    "on_forward",
    "on_gradients",
    "on_step_end",
    "on_log",
    "on_evaluate_batch",
    "on_checkpoint_saved",
    "on_run_end",
)
OPERATIONS = ("mkdir", "write", "fsync", "fsync_dir", "rename", "remove", "rmdir")


@component
class TrialModel(Component):
    """Two layers and a dropout."""

    kind = "model"
    width: int = option(default=64, help="neurons")

    def make_model(self, ctx: CallbackContext) -> nn.Module:
        width = self.width
        return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Dropout(0.3), nn.Linear(width, width), nn.Linear(width, 1))

    def make_loss(self, ctx: CallbackContext) -> Any:
        return nn.functional.mse_loss


class Samples:
    """Every one another, with noise that is drawn when it is read."""

    def __init__(self, slow: float, fault: str = "") -> None:
        self.slow, self.read = slow, 0
        self.how, _, self.last = fault.partition(":")

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(self.slow)
        worker, self.read = get_worker_info(), self.read + 1
        if self.how and worker is not None and worker.id == 1 and self.read == int(self.last):
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3600)
        return torch.full((8,), index / 30) + 0.1 * torch.randn(8), torch.tensor([index % 7 / 7])


@component
class TrialData(Component):
    """Thirty samples."""

    kind = "dataset"
    slow: float = option(default=0.0, help="seconds for a sample")

    def make_dataset(self, ctx: CallbackContext) -> Samples:
        return Samples(self.slow, os.environ.get("WORKER_FAULT", ""))

    def make_eval_dataset(self, ctx: CallbackContext) -> Samples:
        return Samples(self.slow)


@component
class TrialAdam(OptimizerComponent):
    """Adam with decoupled weight decay."""

    lr: float = option(default=0.01, help="learning rate")

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        return torch.optim.AdamW(ctx.model.parameters(), lr=self.lr)


@component
class Fall(Component):
    """A learning rate that falls to 0."""

    kind = "scheduler"

    def make_schedule(self, ctx: CallbackContext) -> Any:
        return lambda position: 1 - position / ctx.run_length


@component
class Fault(Callback):
    """Changes the training by what it has counted, and ends its own process where FAULT says."""

    count: int = state(default=0)

    def __attrs_post_init__(self) -> None:
        text = os.environ.get("FAULT", "")
        self.place, number, self.how = text.split(":") if text else ("", "0", "")
        self.number, self.times, self.process = int(number), Counter[str](), os.getpid()

    def at(self, place: str) -> None:
        if place == self.place and os.getpid() == self.process:
            self.times[place] += 1
            if self.times[place] == self.number:
                os.kill(self.process, signal.SIGKILL if self.how == "kill" else signal.Signals[self.how])

    def watch(self) -> None:
        """Put this callback around what a checkpoint, or the command line, does to the disk."""
        if self.place == "configuration":
            around(TrainingConfig, "save", lambda *_: self.at(self.place))
        elif self.place == "half of write":
            Files.write = half_of(Files.write, lambda: self.at("half of write"))  # type: ignore[method-assign]
        else:
            around(Files, self.place, lambda *_: self.at(self.place))

    def on_restore(self, ctx: CallbackContext) -> None:
        if self.place in (*OPERATIONS, "half of write", "configuration"):
            self.watch()
        self.at("on_restore")

    def on_gradients(self, ctx: CallbackContext) -> None:
        self.at("on_gradients")
        self.count += 1
        for parameter in ctx.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1 + 1 / (1 + self.count))


def _event(name: str) -> Any:
    def listen(self: Fault, ctx: CallbackContext) -> None:
        self.at(name)

    return listen


for _name in EVENTS:
    if _name not in ("on_restore", "on_gradients"):
        setattr(Fault, _name, _event(_name))


def around(owner: Any, name: str, call: Any) -> None:
    """Call something before a method, and nothing else."""
    inner = getattr(owner, name)

    def wrapped(*given: Any, **more: Any) -> Any:
        call(*given)
        return inner(*given, **more)

    setattr(owner, name, wrapped)


def half_of(write: Any, call: Any) -> Any:
    """A file's writing, interrupted when half of its pieces are there."""

    def halved(self: Files, path: Path, chunks: Any) -> None:
        pieces = list(chunks)

        def given() -> Any:
            for index, piece in enumerate(pieces):
                if index == len(pieces) // 2:
                    call()
                yield piece

        write(self, path, given())

    return halved
