"""Tiny trainings for tests: a model, data, a run without any other plugin, and what is left of it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drivetrain import (
    Callback,
    CallbackContext,
    Component,
    OptimizerComponent,
    Precision,
    Trainer,
    TrainingConfig,
    component,
    option,
)
from drivetrain.registry import SWITCH

FEATURES, WIDTH, ROWS = 6, 16, 96


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """A regression [*, 6] -> [*, 1] with a hidden matrix, vectors and dropout; the same weights for the same seed."""
    with torch.device("meta"):  # no number of the global generator's, which a run of another thread may have
        layers = [
            nn.Linear(FEATURES, WIDTH),
            nn.Tanh(),
            nn.Linear(WIDTH, WIDTH),
            nn.Tanh(),
            nn.Dropout(0.05),
            nn.Linear(WIDTH, 1),
        ]
    model, generator = nn.Sequential(*layers).to_empty(device="cpu"), torch.Generator().manual_seed(seed)
    for layer in (layer for layer in layers if isinstance(layer, nn.Linear)):
        nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)  # as `nn.Linear` does
        nn.init.uniform_(layer.bias, -1 / math.sqrt(layer.in_features), 1 / math.sqrt(layer.in_features), generator=generator)
    return model.to(dtype)


def tiny_data(dtype: torch.dtype = torch.float32, seed: int = 1, rows: int = ROWS) -> TensorDataset:
    """Inputs [rows, 6] and their sums [rows, 1]."""
    inputs = torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))


@component
class PlainSgd(OptimizerComponent):
    """SGD with momentum: the optimizer of tests that are about something else."""

    lr: float = option(default=0.05, help="learning rate")

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameter_groups(ctx.model), lr=self.lr, momentum=0.9)


@component
class Restore(Callback):
    """Hands a run the state of another; stands for a checkpoint plugin."""

    saved: dict[str, Any] = option(help="what `Trainer.state_dict` gave")

    def on_restore(self, ctx: CallbackContext) -> None:
        ctx.load_state_dict(deepcopy(self.saved))  # loading shares tensors, which training changes


def tiny_trainer(*callbacks: Any, steps: int = 60, dtype: torch.dtype = torch.float32, **given: Any) -> Trainer:
    """A trainer of the tiny model on the tiny data, in full precision, that logs each step and writes nothing.

    Args:
        callbacks: callbacks; the kit adds none.
        steps: the length of the run.
        dtype: the type of the weights and the data.
        given: other arguments of `Trainer` and keys of the configuration, in place of the tiny ones.
    """
    arguments: dict[str, Any] = {"optimizer": PlainSgd(), "scheduler": lambda position: 1 / (1 + 0.02 * position)}
    arguments |= {"precision": Precision()} | {key: value for key, value in given.items() if value is not None}
    config: dict[str, Any] = {"max_duration": f"{steps}st", "per_device_batch_size": 16, "log_interval": "1st"}
    config |= {"eval_interval": False, "standard_callbacks": False, "device": "cpu", "distributed": "none"}
    for key in TrainingConfig.__annotations__.keys() & arguments.keys():
        if key not in ("model", "optimizer", "scheduler", "precision") or isinstance(arguments[key], (Component, str, dict)):
            config[key] = arguments.pop(key)
    if "model" not in config and "model" not in arguments:
        arguments |= {"model": tiny_model(dtype)}
        arguments.setdefault("loss", nn.functional.mse_loss)
    if "data" not in config and "train_dataset" not in arguments:
        arguments["train_dataset"] = tiny_data(dtype)
        arguments.setdefault("loss", nn.functional.mse_loss)
    return Trainer(arguments.pop("model", None), TrainingConfig(**config), callbacks=callbacks, **arguments)


def weights(trainer: Trainer) -> Tensor:
    """All of a trainer's parameters in one row, copied."""
    parameters = [p.detach() for p in trainer.model.parameters()]
    return torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).reshape(-1).clone() for p in parameters])


def state_after(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Train for some steps, leave, and return a copy of the state; the trainer's own run is over then."""
    for step in trainer.steps():
        if step.number == steps:
            return deepcopy(trainer.state_dict())
    raise AssertionError(f"the run ended after {trainer.ctx.step} steps, before step {steps}")


def final_state(trainer: Trainer) -> dict[str, Any]:
    """The state without what is never the same twice: clocks, and what describes the run."""
    state = {key: value for key, value in deepcopy(trainer.state_dict()).items() if key not in ("manifest", "rng")}
    del state["progress"]["seconds"]
    return state


def difference(one: Any, other: Any, path: str = "") -> str | None:
    """Where two trees of plain data and tensors first differ, bit by bit; None when they are equal."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if missing := one.keys() ^ other.keys():
            return f"{path}/{sorted(map(str, missing))[0]} exists in one of them only"
        return next((found for key in one if (found := difference(one[key], other[key], f"{path}/{key}"))), None)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return f"{path} has {len(one)} items in one and {len(other)} in the other"
        pairs = enumerate(zip(one, other, strict=True))
        return next((found for index, (a, b) in pairs if (found := difference(a, b, f"{path}/{index}"))), None)
    if same(one, other):
        return None
    return f"{path.lstrip('/') or 'the value'} is {_short(one)} in one and {_short(other)} in the other"


def same(one: Any, other: Any) -> bool:
    """Whether two leaves are equal bit by bit; NaN equals NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        raw = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) if t.numel() else t for t in (one, other)]
        return torch.equal(*raw)
    if isinstance(one, float) and isinstance(other, float) and one != one:
        return other != other
    return type(one) is type(other) and bool(one == other)


def _short(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) and value.numel() > 4 else f"{value!r:.60}"


@contextmanager
def discovery_blocked(*allowed: str) -> Iterator[None]:
    """Hide every installed plugin but those of the distributions (or names) allowed, from this process and those it starts."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = ",".join(allowed) or "off"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before
