"""`drivetrain bench` beside drivetrain-goodput and the standard callbacks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.data import Dataset

from drivetrain import Callback, CallbackContext, Component, TrainingConfig, component
from drivetrain_bench import bench
from drivetrain_bench.advice import Change
from drivetrain_goodput import GoodputCallback

_STEPS, _TURNS, _EACH = 4, 2, 0.004  # the last in seconds


class _Slow(Dataset[Any]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        time.sleep(_EACH / 2)
        return torch.ones(4), torch.ones(1)


@component
class _Data(Component):
    kind: ClassVar[str] = "dataset"

    def make_dataset(self, ctx: CallbackContext) -> Any:
        return _Slow()


@component
class _Model(Component):
    kind: ClassVar[str] = "model"

    def make_model(self, ctx: CallbackContext) -> nn.Module:
        return nn.Linear(4, 1)

    def make_loss(self, ctx: CallbackContext) -> Any:
        return nn.functional.mse_loss


@component
class _Once(Callback):
    """Takes its time when a run begins and ends, and a little in each step."""

    def on_run_start(self, ctx: CallbackContext) -> None:
        time.sleep(0.2)

    def on_step_end(self, ctx: CallbackContext) -> None:
        time.sleep(0.2 if ctx.step == 1 else _EACH)

    def on_run_end(self, ctx: CallbackContext) -> None:
        time.sleep(0.2)


class _Looks(nn.Linear):
    """Counts the forwards in which somebody listens to torch's calls."""

    counted: ClassVar[int] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _Looks.counted += _get_current_dispatch_mode() is not None
        return super().forward(x)


@component
class _LookingModel(_Model):
    def make_model(self, ctx: CallbackContext) -> nn.Module:
        return _Looks(4, 1)


def _config(**more: Any) -> TrainingConfig:
    given = {"model": _Model(), "data": _Data(), "max_duration": "1ep", "per_device_batch_size": 2, "device": "cpu"} | more
    return TrainingConfig(**given)


@pytest.mark.parametrize("more", [[], ["goodput"], [GoodputCallback()]])
def test_where_the_time_goes_is_that_of_ordinary_steps(tmp_path: Path, more: list[Any]) -> None:
    """Not what callbacks do once; and the waiting for data is not thinned out by that."""
    parts = bench(_config(callbacks=[_Once(), *more]), steps=_STEPS, turns=_TURNS, advice=False).parts
    own = next(seconds for name, seconds in parts.items() if name.startswith("callback:") and "nce" in name)
    assert _STEPS * _TURNS * _EACH <= own < 0.15
    assert parts["data wait"] >= _STEPS * _TURNS * _EACH * 0.9
    assert "start" not in parts and parts.get("callback:gc", 0.0) < own


def test_what_a_callback_counts_in_a_step_is_not_that_of_another_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """drivetrain-throughput counts the second step of each that has callbacks; torch.compile gives up meanwhile."""
    monkeypatch.setattr("drivetrain_bench.measure.changes", lambda *_: iter([Change("seed", {"seed": 1})]))
    _Looks.counted = 0
    bench(_config(model=_LookingModel()), steps=2, turns=1)
    assert _Looks.counted == 4, "with your callbacks, where the time goes, as it is, changed"
