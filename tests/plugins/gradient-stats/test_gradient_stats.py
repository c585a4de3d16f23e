"""The values of the log against numbers computed by hand from the same tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drivetrain import Callback, ConfigError, Trainer, TrainingConfig, component, hook, make_component
from drivetrain_gradient_stats import GradientStatsCallback


@component
class Witness(Callback):
    """Keeps gradients, weights before and after each update, and what was logged."""

    def __attrs_post_init__(self) -> None:
        self.gradients: dict[int, dict[str, Tensor]] = {}
        self.before: dict[int, dict[str, Tensor]] = {}
        self.after: dict[int, dict[str, Tensor]] = {}
        self.logs: dict[int, dict[str, float]] = {}
        self.shown: list[tuple[int, str]] = []

    def on_clipped(self, ctx: Any) -> None:
        named = dict(ctx.model.named_parameters())
        self.gradients[ctx.step + 1] = {name: p.grad.double().clone() for name, p in named.items() if p.grad is not None}
        self.before[ctx.step + 1] = {name: p.detach().double().clone() for name, p in named.items()}

    def on_step_end(self, ctx: Any) -> None:
        self.after[ctx.step] = {name: p.detach().double().clone() for name, p in ctx.model.named_parameters()}

    @hook(trylast=True)
    def on_log(self, ctx: Any) -> None:
        self.logs[ctx.step] = dict(ctx.metrics)
        self.shown += [(ctx.step, name) for kind, name, _ in ctx.shown if kind == "histogram"]


def trained(tmp_path: Path, *callbacks: Callback, bad: bool = False, **options: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    model[2].bias.requires_grad_(False)
    given = {"max_duration": "8st", "log_interval": "2st", "standard_callbacks": False, "device": "cpu", "max_grad_norm": 0.5}
    data = [(torch.randn(3), torch.randn(1)) for _ in range(32)]
    if bad:
        data = [(x * math.nan, y) for x, y in data]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    config = TrainingConfig(**{**given, "output_dir": tmp_path, "per_device_batch_size": 4, **options})
    Trainer(model, config, data, loss=nn.MSELoss(), optimizer=optimizer, callbacks=callbacks).train()


def whole(tensors: dict[str, Tensor], layer: str) -> Tensor:
    return torch.cat([value.flatten() for name, value in tensors.items() if name.startswith(layer) and name != "2.bias"])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_numbers(tmp_path: Path, accumulation: int) -> None:
    witness = Witness()
    trained(tmp_path, GradientStatsCallback(), witness, gradient_accumulation_steps=accumulation)
    assert sorted(witness.logs) == [2, 4, 6, 8]
    for step, log in witness.logs.items():
        for layer in ("0", "2"):
            gradient, before = whole(witness.gradients[step], layer), whole(witness.before[step], layer)
            change = whole(witness.after[step], layer) - before
            assert log[f"gradient_norm/{layer}"] == pytest.approx(float(gradient.norm()), rel=1e-5)
            assert log[f"gradient_max/{layer}"] == pytest.approx(float(gradient.abs().max()), rel=1e-5)
            assert log[f"weight_norm/{layer}"] == pytest.approx(float(before.norm()), rel=1e-5)
            assert log[f"update_ratio/{layer}"] == pytest.approx(float(change.norm() / before.norm()), rel=1e-3)


def test_sparse_gradients_are_those_of_the_rows_together(tmp_path: Path) -> None:
    logs = []
    for sparse in (False, True):
        torch.manual_seed(0)
        witness, model = Witness(), nn.Sequential(nn.EmbeddingBag(8, 4, sparse=sparse), nn.Linear(4, 1))
        given: Any = {"max_duration": "2st", "log_interval": "1st", "per_device_batch_size": 4, "standard_callbacks": False}
        config = TrainingConfig(**given, device="cpu", output_dir=tmp_path, max_grad_norm=0.1)
        data = [(torch.tensor([i % 3, 2]), torch.ones(1)) for i in range(8)]
        parts: Any = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "loss": nn.MSELoss()}
        Trainer(model, config, data, callbacks=[GradientStatsCallback(histograms=True), witness], **parts).train()
        logs.append({name: value for log in witness.logs.values() for name, value in log.items() if "/0" in name})
    assert len(logs[0]) == 4 and logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_training_is_the_same_and_only_the_chosen_steps_are_looked_at(tmp_path: Path) -> None:
    with_stats, without = Witness(), Witness()
    trained(tmp_path, GradientStatsCallback(steps=4, histograms=True), with_stats)
    trained(tmp_path, without)
    assert all(torch.equal(with_stats.after[8][name], without.after[8][name]) for name in without.after[8])
    assert [step for step, log in with_stats.logs.items() if "gradient_norm/0" in log] == [4, 8]
    assert with_stats.shown == [(step, f"gradients/{layer}") for step in (4, 8) for layer in ("0", "2")]


def test_nan_is_not_hidden(tmp_path: Path) -> None:
    witness = Witness()
    trained(tmp_path, GradientStatsCallback(), witness, bad=True)
    assert math.isnan(witness.logs[2]["gradient_norm/0"]) and math.isnan(witness.logs[2]["gradient_max/2"])


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        make_component("callback", {"use": "gradient_stats", "steps": 0})
