"""The modes by name, alone with the core."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from drivetrain import (
    CallbackContext,
    Component,
    OptimizerComponent,
    Precision,
    Trainer,
    TrainingConfig,
    component,
    make_component,
)
from drivetrain_modes import FullFinetune, Pretraining
from drivetrain_testing import Check, conformance


@conformance(FullFinetune())
def test_conformance_of_full_finetune(check: Check) -> None:
    check()


@conformance(Pretraining())
def test_conformance_of_pretraining(check: Check) -> None:
    check()


def data() -> TensorDataset:
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x.sum(1, keepdim=True))


def trained(mode: Any, model: nn.Module | None) -> Trainer:
    settings: dict[str, Any] = {} if mode is None else {"training_mode": mode}
    config = TrainingConfig(max_duration="2st", standard_callbacks=False, **settings)
    if model is None:
        config.model = Reader()
    given = model if model is None else torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"optimizer": given or "sgd", "scheduler": lambda position: 1.0, "precision": Precision()}
    trainer = Trainer(model, config, data(), loss=nn.MSELoss(), **options)
    trainer.train()
    return trainer


@component
class Plain(OptimizerComponent):
    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        return torch.optim.SGD(ctx.model.parameters(), lr=self.lr)


@component
class Reader(Component):
    """Stands for a model plugin that reads weights, or makes new ones in a mode from scratch."""

    kind = "model"
    seen: bool | None = None

    def make_model(self, ctx: CallbackContext) -> nn.Module:
        self.seen = bool(getattr(ctx.mode, "from_scratch", False))
        return nn.Linear(3, 1)


@pytest.mark.parametrize(
    ("mode", "name", "scratch"),
    [
        (None, "full_finetune", False),
        ("FULL_FINETUNE", "full_finetune", False),
        ("pretraining", "pretraining", True),
        ({"use": "pretraining"}, "pretraining", True),
        (make_component("mode", "pretraining", "training_mode"), "pretraining", True),
    ],
)
def test_model_plugins_are_told_whether_weights_are_new(mode: Any, name: str, scratch: bool) -> None:
    reader, config = Reader(), TrainingConfig(max_duration="2st", standard_callbacks=False, precision=None)
    if mode is not None:
        config.training_mode = mode
    config.model = reader
    options: dict[str, Any] = {"scheduler": lambda position: 1.0, "precision": Precision()}
    Trainer(None, config, data(), loss=nn.MSELoss(), optimizer=Plain(), **options)
    assert config.mode_name == name
    assert reader.seen is scratch


@pytest.mark.parametrize("mode", ["FULL_FINETUNE", "PRETRAINING"])
def test_all_weights_that_require_a_gradient_are_trained_and_no_other(mode: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model[0].bias.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(mode, model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before) - {"0.bias"}


def test_options_are_refused() -> None:
    from drivetrain import ConfigError

    with pytest.raises(ConfigError, match=r"training_mode\.pretraining"):
        TrainingConfig(training_mode={"use": "pretraining", "r": 4}).components()
