"""Each optimizer by name in whole runs of the Trainer."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from drivetrain import Callback, CallbackContext, ConfigError, Precision, Trainer, TrainingConfig, component, option
from drivetrain_optimizers import direct

RATES = {
    "adamw": 1e-2,
    "adam": 1e-2,
    "sgd": 0.1,
    "adafactor": 5e-2,
    "adagrad": 5e-2,
    "rmsprop": 3e-3,
    "nadam": 1e-2,
    "radam": 3e-2,
    "muon_torch": 1e-2,
    "lamb": 3e-2,
}
ROUTED = {
    "use": "routed",
    "routes": [{"match": "0.*", "use": "sgd", "lr": 0.05, "momentum": 0.9}, {"match": "2.weight", "use": "lamb", "lr": 0.03}],
    "default": {"use": "adam", "lr": 0.01},
}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(96, 6, generator=generator)
    return TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))


def trainer(model: nn.Module, optimizer: Any, *callbacks: Callback, steps: int = 60, factor: float = 1.0) -> Trainer:
    config = TrainingConfig(
        max_duration=f"{steps}st",
        per_device_batch_size=16,
        optimizer=optimizer,
        log_interval="1st",
        standard_callbacks=False,
        dataloader={"shuffle": False},
    )
    return Trainer(
        model,
        config,
        make_data(),
        loss=nn.functional.mse_loss,
        scheduler=lambda position: factor,
        precision=Precision(),
        callbacks=callbacks,
    )


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("spec", [*({"use": name, "lr": lr} for name, lr in RATES.items()), ROUTED], ids=lambda s: s["use"])
def test_the_loss_falls(spec: dict[str, Any]) -> None:
    losses = [loss for _, loss in trainer(make_model(), spec).train().losses]
    assert sum(losses[-6:]) < 0.5 * sum(losses[:6])


def test_the_default_optimizer_is_adamw() -> None:
    assert type(trainer(make_model(), None).ctx.optimizer) is direct.AdamW
    assert issubclass(direct.AdamW, torch.optim.AdamW)


def test_a_run_by_name_is_bit_equal_to_torchs_own_loop() -> None:
    model, expected = make_model(), make_model()
    trainer(model, {"use": "adamw", "lr": 1e-2, "weight_decay": 0.1}, steps=18).train()
    matrices = [p for p in expected.parameters() if p.ndim == 2]
    vectors = [p for p in expected.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    inputs, targets = (part.split(16) for part in make_data().tensors)
    for step in range(18):
        nn.functional.mse_loss(expected(inputs[step % 6]), targets[step % 6]).backward()
        nn.utils.clip_grad_norm_([*matrices, *vectors], 1.0)  # the order decides the last bits of the norm
        optimizer.step()
        optimizer.zero_grad()
    assert equal(model, expected)


@component
class Restore(Callback):
    """Hands a run the state of another."""

    saved: dict[str, Any] = option()

    def on_restore(self, ctx: CallbackContext) -> None:
        ctx.load_state_dict(self.saved)


@pytest.mark.parametrize("name", [*RATES, ROUTED], ids=lambda s: s if isinstance(s, str) else s["use"])
def test_a_restored_run_ends_bit_equal(name: str | dict[str, Any]) -> None:
    straight = trainer(make_model(), name, steps=16)
    straight.train()
    first = trainer(make_model(), name, steps=16)
    for step in first.steps():
        if step.number == 7:
            saved = deepcopy(first.state_dict())
            break
    second = trainer(make_model(), name, Restore(saved=saved), steps=16)
    second.train()
    assert equal(second.model, straight.model)
    assert not equal(first.model, straight.model)


@pytest.mark.parametrize("spec", [*({"use": name, "lr": lr} for name, lr in RATES.items()), ROUTED], ids=lambda s: s["use"])
def test_a_rehearsal_leaves_no_trace_in_any_optimizer(spec: dict[str, Any]) -> None:
    """Before the first step, when there is no state yet, and when there is."""

    @component
    class Rehearse(Callback):
        def on_run_start(self, ctx: CallbackContext) -> None:
            with ctx.rehearsal() as step:
                for _ in range(3):
                    step()

    def run(*callbacks: Callback) -> nn.Module:
        made = trainer(make_model(), spec, *callbacks, steps=6)
        for step in made.steps():
            if step.number == 3:
                break
        made.train()
        return made.model

    assert equal(run(Rehearse()), run())


def test_the_schedule_moves_every_group_of_muon_and_adamw() -> None:
    made = trainer(make_model(), {"use": "muon_torch", "lr": 0.02, "adamw_lr": 0.001}, steps=3, factor=0.5)
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    made.train()
    assert [group["lr"] for group in made.ctx.optimizer.param_groups] == [0.01, 0.0005, 0.0005]
    assert not any(torch.equal(before[name], p) for name, p in made.model.named_parameters())


def test_the_schedule_moves_every_route() -> None:
    made = trainer(make_model(), ROUTED, steps=3, factor=0.5)
    made.train()
    rates = {name: group["lr"] for group in made.ctx.optimizer.param_groups for name in group["param_names"]}
    assert (rates["0.weight"], rates["2.weight"], rates["4.bias"]) == (0.025, 0.015, 0.005)


def test_a_wrong_option_is_reported_before_the_run() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.adamw\.lr: must be at least 0"):
        trainer(make_model(), {"use": "adamw", "lr": -1.0})
    routes = [{"match": "0.*", "use": "sgd", "lr": -1.0}, {"match": "0.bias", "use": "sgdd"}]
    with pytest.raises(
        ConfigError, match=r"routed\.routes\[0\]\.sgd\.lr: must be at least 0(.|\n)*routes\[1\]: no plugin named"
    ):
        trainer(make_model(), {"use": "routed", "routes": routes})


@pytest.mark.parametrize(
    ("optimizer", "sparse", "why"),
    [
        ("adamw", False, "fused: one kernel for the whole update"),
        ({"use": "adamw", "fused": False}, False, "not fused: as configured"),
        ("adamw", True, "not fused: '0' gives sparse gradients"),
        ("muon_torch", False, ""),
    ],
)
def test_choices_say_how_the_optimizer_was_made(optimizer: Any, sparse: bool, why: str) -> None:
    model = nn.Sequential(nn.Embedding(8, 6, sparse=sparse), nn.Linear(6, 6, bias=False), nn.Linear(6, 1))
    config = TrainingConfig(optimizer=optimizer, standard_callbacks=False, global_batch_size=24, device="cpu")
    made = Trainer(model, config, make_data(), loss=nn.functional.mse_loss)
    found = {key: (value, reason) for key, value, reason in made.choices()}
    name = optimizer if isinstance(optimizer, str) else optimizer["use"]
    assert found["optimizer"] == (name, why)
    assert found["gradient_accumulation_steps"][0] == 3
    assert bool(made.ctx.optimizer.param_groups[0].get("fused")) == why.startswith("fused")
