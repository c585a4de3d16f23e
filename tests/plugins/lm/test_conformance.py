"""It keeps every promise of its kind; the kit's checks, each with an id of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from drivetrain_lm import GPT, GPTComponent, SampleTextCallback, TextComponent, pretraining
from drivetrain_testing import Check, conformance


def small() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT(layers=1, heads=2, width=16, context=16)


def tokens() -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(0, 256, (96, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in rows]


@conformance(GPTComponent(layers=1, heads=2, width=16, context=16), data=tokens, processes=pytest.mark.slow)
def test_conformance_of_the_model(check: Check) -> None:
    check()


@conformance(TextComponent(path="stdlib", context=16, max_bytes=20_000), model=small, processes=pytest.mark.slow)
def test_conformance_of_the_data(check: Check) -> None:
    check()


@conformance(SampleTextCallback(length=4), model=small, data=tokens, processes=pytest.mark.slow)
def test_conformance_of_the_callback(check: Check) -> None:
    check()


@conformance(pretraining, kind="preset", processes=pytest.mark.slow)
def test_conformance_of_the_preset(check: Check) -> None:
    check()
