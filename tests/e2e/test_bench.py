"""`drivetrain bench` beside drivetrain-goodput and the standard callbacks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from drivetrain import Callback, CallbackContext, Component, TrainingConfig, component
from drivetrain_bench import bench
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


def _config(**more: Any) -> TrainingConfig:
    return TrainingConfig(model=_Model(), data=_Data(), max_duration="1ep", per_device_batch_size=2, device="cpu", **more)


@pytest.mark.parametrize("more", [[], ["goodput"], [GoodputCallback()]])
def test_where_the_time_goes_is_that_of_ordinary_steps(tmp_path: Path, more: list[Any]) -> None:
    """Not what callbacks do once; and the waiting for data is not thinned out by that."""
    parts = bench(_config(callbacks=[_Once(), *more]), steps=_STEPS, turns=_TURNS, advice=False).parts
    own = next(seconds for name, seconds in parts.items() if name.startswith("callback:") and "nce" in name)
    assert _STEPS * _TURNS * _EACH <= own < 0.15
    assert parts["data wait"] >= _STEPS * _TURNS * _EACH * 0.9
    assert "start" not in parts and parts.get("callback:gc", 0.0) < own
