"""A model, data, an optimizer and a checkpoint callback, so that these tests need the core and drivetrain-verify alone."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils.data import TensorDataset

from drivetrain import Callback, CallbackContext, Component, Duration, component, option, state


@component
class Line(Component):
    """A straight line behind a dropout."""

    kind = "model"

    def make_model(self, ctx: CallbackContext) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))

    def make_loss(self, ctx: CallbackContext) -> Any:
        return torch.nn.functional.mse_loss


@component
class Points(Component):
    """Points on a line."""

    kind = "dataset"

    def make_dataset(self, ctx: CallbackContext) -> TensorDataset:
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        return TensorDataset(x, x.sum(1, keepdim=True))


@component
class PlainAdam(Component):
    """Adam."""

    kind = "optimizer"
    lr: float = option(default=0.1, help="learning rate")

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        return torch.optim.Adam(ctx.model.parameters(), lr=self.lr)


@component
class Checkpoint(Callback):
    """The smallest checkpoint there can be; `forgets` is a part of the state that it loses."""

    every: Duration = option(default=Duration(1, "st"), help="how often")
    forgets: str = option(default="", help="what is lost: optimizer, rng, components, …")

    def on_restore(self, ctx: CallbackContext) -> None:
        place = ctx.run_dir / "state.pt"
        if place.exists() and self.forgets != "everything":
            saved = torch.load(place, weights_only=True)
            ctx.load_state_dict(saved | ({self.forgets: ctx.state_dict()[self.forgets]} if self.forgets else {}))

    def on_every(self, ctx: CallbackContext) -> None:
        torch.save(ctx.state_dict(), ctx.run_dir / "new.pt")
        os.replace(ctx.run_dir / "new.pt", ctx.run_dir / "state.pt")


@component
class Counter(Callback):
    """Changes the learning rate by what it has counted; `hides` keeps the count outside of the state."""

    hides: bool = option(default=False, help="whether it is forgotten")
    noise: bool = option(default=False, help="whether no two runs are alike")
    count: int = state(default=0)
    hidden = 0

    def on_step_start(self, ctx: CallbackContext) -> None:
        self.hidden += 1
        self.count += 0 if self.hides else 1
        for group in ctx.optimizer.param_groups:
            group["lr"] = 0.1 / (self.hidden if self.hides else self.count) + (os.getpid() * 1e-9 if self.noise else 0)
