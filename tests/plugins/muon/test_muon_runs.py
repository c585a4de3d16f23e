"""Muon by name in whole runs of the Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drivetrain import Callback, Trainer, make_component
from drivetrain_muon import Muon
from drivetrain_testing import Check, Restore, conformance, state_after, tiny_trainer, weights

VARIANTS: list[dict[str, Any]] = [{}, {"normuon": True, "cautious": True}, {"coefficients": "newton_schulz"}]


def make_trainer(*callbacks: Callback, steps: int = 60, dtype: torch.dtype = torch.float32, **options: Any) -> Trainer:
    return tiny_trainer(*callbacks, optimizer={"use": "muon", "lr": 2e-2, **options}, steps=steps, dtype=dtype)


@conformance(*(make_component("optimizer", {"use": "muon", "lr": 2e-2, **options}) for options in VARIANTS[:2]))
def test_conformance(check: Check) -> None:
    check()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_loss_falls(options: dict[str, Any]) -> None:
    trainer = make_trainer(**options)
    losses = [loss for _, loss in trainer.train().losses]
    assert type(trainer.ctx.optimizer) is Muon
    assert sum(losses[-6:]) < 0.3 * sum(losses[:6])


def test_the_schedule_moves_every_group() -> None:
    trainer = make_trainer(steps=3, adamw_lr=1e-2)
    trainer.train()
    assert [g["lr"] for g in trainer.ctx.optimizer.param_groups] == pytest.approx([2e-2 / 1.04, 1e-2 / 1.04, 1e-2 / 1.04])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_restored_run_ends_bit_equal(options: dict[str, Any], dtype: torch.dtype) -> None:
    straight = make_trainer(steps=12, dtype=dtype, **options)
    straight.train()
    first = make_trainer(steps=12, dtype=dtype, **options)
    saved = state_after(first, 5)
    second = make_trainer(Restore(saved=saved), steps=12, dtype=dtype, **options)
    second.train()
    assert torch.equal(weights(second), weights(straight))
    assert not torch.equal(weights(first), weights(straight))
