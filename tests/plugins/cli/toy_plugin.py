"""The plugins of the distribution that conftest.py makes."""

from __future__ import annotations

import argparse
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

from drivetrain import Callback, CallbackContext, Component, DrivetrainError, Duration, Precision, RunError, component, option


@component
class Line(Component):
    """A straight line through four inputs.

    This second paragraph is not shown.
    """

    kind = "model"
    inputs: int = option(default=4, help="how many numbers go in")

    def make_model(self, ctx: CallbackContext) -> torch.nn.Module:
        return torch.nn.Linear(self.inputs, 1)

    def make_loss(self, ctx: CallbackContext) -> Any:
        return torch.nn.functional.mse_loss


@component
class Points(Component):
    """Points on a line."""

    kind = "dataset"
    size: int = option(default=64, help="how many points")
    file: str | None = option(default=None, help="a file that need not exist")

    def make_dataset(self, ctx: CallbackContext) -> TensorDataset:
        if self.file:
            Path(self.file).read_text()
        x = torch.randn(self.size, 4, generator=torch.Generator().manual_seed(0))
        return TensorDataset(x, x.sum(1, keepdim=True))

    make_eval_dataset = make_dataset


@component
class Fall(Component):
    """A straight line from 1 to 0, after some waiting."""

    kind = "scheduler"
    wait: Duration | None = option(default=None, help="how long it stays at 1")

    def make_schedule(self, ctx: CallbackContext) -> Any:
        wait, end = ctx.position_of(self.wait) if self.wait else 0.0, ctx.run_length
        return lambda position: 1.0 if position < wait else (end - position) / (end - wait)


@component
class PlainSgd(Component):
    """Gradient descent."""

    kind = "optimizer"
    lr: float = option(help="learning rate")

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        return torch.optim.SGD(ctx.model.parameters(), lr=self.lr)


@component
class Exact(Component):
    """Full precision, said at length."""

    kind = "precision"

    def make_precision(self, ctx: CallbackContext) -> Precision:
        precision = Precision()
        precision.reason = "fp32: " + "one word after another " * 9
        return precision


@component
class Keep(Callback):
    """The smallest checkpoint there can be: the state at the end of each sitting."""

    def on_restore(self, ctx: CallbackContext) -> None:
        place = ctx.run_dir / "state.pt" if ctx.resume == "auto" else Path(ctx.resume) / "state.pt"
        if ctx.resume != "never" and place.exists():
            ctx.load_state_dict(torch.load(place, weights_only=True))

    def on_run_end(self, ctx: CallbackContext) -> None:
        ctx.checkpoint_path = ctx.run_dir / "state.pt"
        torch.save(ctx.state_dict(), ctx.checkpoint_path)


@component
class Boom(Callback):
    """Fails."""

    step: int = option(default=3, help="when")
    says: str = option(default="the data went away", help="what")
    mistake: bool = option(default=False, help="whether it calls that the user's mistake")
    fails: bool = option(default=False, help="whether it calls that a failure of the run")

    def on_step_end(self, ctx: CallbackContext) -> None:
        if ctx.step == self.step:
            raise (DrivetrainError if self.mistake else RunError if self.fails else RuntimeError)(self.says)


@component
class Slow(Callback):
    """Takes its time."""

    seconds: float = option(default=0.02, help="for each step")

    def on_step_end(self, ctx: CallbackContext) -> None:
        print("step", ctx.step, flush=True)
        time.sleep(self.seconds)


@component
class Signal(Callback):
    """Sends its own process a signal after the third step."""

    number: int = option(help="which signal")

    def on_step_end(self, ctx: CallbackContext) -> None:
        if ctx.step == 3:
            signal.raise_signal(self.number)


class Greet:
    """Say hello."""

    help = "say hello"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("names", nargs="*")
        parser.add_argument("--loud", action="store_true")

    def run(self, arguments: argparse.Namespace) -> int:
        print("hello", *arguments.names, "!" if arguments.loud else "")
        return 3


class Incomplete:
    help = "cannot be run"


@component
class Warns(Callback):
    """Warns of the same thing twice, from two places, and of something else."""

    def on_step_end(self, ctx: CallbackContext) -> None:
        warnings.warn("the \x1b[2Jsame\n\x07thing", stacklevel=2)
        warnings.warn("the \x1b[2Jsame\n\x07thing", stacklevel=1)
        warnings.warn(f"another thing {ctx.step > 2}", FutureWarning, stacklevel=1)
