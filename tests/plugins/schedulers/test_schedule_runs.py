"""Each schedule by name in whole runs of the Trainer: the learning rate of every step."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

from drivetrain import (
    Callback,
    CallbackContext,
    ConfigError,
    Precision,
    Trainer,
    TrainingConfig,
    component,
    make_component,
    option,
)

NAMES = ["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "wsd", "inverse_sqrt", "one_cycle"]
LR = 0.01


@component
class Rates(Callback):
    """The learning rate that each step used, and where the run was before it."""

    def __attrs_post_init__(self) -> None:
        self.rates: list[float] = []

    def on_step_end(self, ctx: CallbackContext) -> None:
        self.rates.append(ctx.lr)


@component
class Restore(Callback):
    """Hands a run the state of another."""

    saved: dict[str, Any] = option()

    def on_restore(self, ctx: CallbackContext) -> None:
        ctx.load_state_dict(self.saved)


def trainer(scheduler: Any, *callbacks: Callback, duration: str = "30st", data: Any = None) -> Trainer:
    model = nn.Linear(2, 1)
    config = TrainingConfig(
        max_duration=duration,
        per_device_batch_size=4,
        scheduler=scheduler,
        standard_callbacks=False,
    )
    return Trainer(
        model,
        config,
        TensorDataset(torch.arange(80.0).reshape(40, 2) / 80, torch.ones(40, 1)) if data is None else data,
        loss=nn.functional.mse_loss,
        optimizer=torch.optim.SGD(model.parameters(), lr=LR),
        precision=Precision(),
        callbacks=callbacks,
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_step_of_a_run_has_the_rate_of_its_schedule(name: str) -> None:
    rates = Rates()
    made = trainer({"use": name, "warmup": "20%"}, rates, duration="3ep")
    factor = make_component("scheduler", {"use": name, "warmup": "6st"}).make_schedule(made.ctx)
    made.train()
    assert rates.rates == pytest.approx([LR * factor(step) for step in range(30)])
    if name != "constant":
        assert len(set(rates.rates)) > 5


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_run_goes_on_with_the_same_rates(name: str) -> None:
    straight, first, second = Rates(), Rates(), Rates()
    trainer(name, straight).train()
    begun = trainer(name, first)
    for step in begun.steps():
        if step.number == 11:
            saved = deepcopy(begun.state_dict())
            break
    trainer(name, second, Restore(saved=saved)).train()
    assert first.rates + second.rates == straight.rates


def test_epochs_and_percentages_are_lengths_too() -> None:
    by_epoch, by_share, by_steps = Rates(), Rates(), Rates()
    trainer({"use": "wsd", "warmup": "1ep", "decay": "1ep"}, by_epoch, duration="4ep").train()
    trainer({"use": "wsd", "warmup": 0.25, "decay": "25%"}, by_share, duration="4ep").train()
    trainer({"use": "wsd", "warmup": "10st", "decay": "10st"}, by_steps, duration="4ep").train()
    assert by_epoch.rates == by_share.rates == by_steps.rates
    assert by_steps.rates[10:31] == [LR] * 21


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Data without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(40):
            yield torch.randn(2), torch.randn(1)


def test_epochs_of_unknown_length_are_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"max_duration: .*must know how many steps"):
        trainer("cosine", data=Stream(), duration="3ep")
    rates = Rates()
    trainer("linear", rates, data=Stream(), duration="20st").train()
    assert rates.rates == pytest.approx([LR * (1 - step / 20) for step in range(20)])
    trainer("constant", data=Stream(), duration="2ep").train()


def test_a_run_in_samples_follows_the_curve() -> None:
    rates = Rates()
    trainer("linear", rates, duration="80sp").train()
    assert rates.rates == pytest.approx([LR * (1 - step * 4 / 80) for step in range(20)])


def test_a_warm_up_in_another_unit_is_reported_with_its_path() -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.cosine\.warmup: .*1000tok cannot be placed"):
        trainer({"use": "cosine", "warmup": "1000tok"})
    with pytest.raises(ConfigError, match=r"scheduler\.cosine\.warmup: 31st is longer than the run of 30st"):
        trainer({"use": "cosine", "warmup": "31st"})
