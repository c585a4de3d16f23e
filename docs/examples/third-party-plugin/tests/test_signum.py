"""Signum keeps every promise of an optimizer, and is the formula of its paper."""

from __future__ import annotations

import torch
from signum_optimizer import Signum, SignumOptimizer
from torch import nn

from drivetrain_testing import Check, conformance


@conformance(SignumOptimizer(lr=1e-2))
def test_conformance(check: Check) -> None:
    check()


def test_two_steps_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Signum([weight], lr=0.25, momentum=0.5)
    for gradient in ([4.0, -1.0], [-8.0, -1.0]):  # averages (2, -0.5), then (-3, -0.75)
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    assert weight.tolist() == [1.0 - 0.25 + 0.25, -2.0 + 0.25 + 0.25]
