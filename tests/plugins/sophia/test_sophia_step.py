"""Sophia's step against the paper's equations, one number at a time in plain Python."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drivetrain import ModelError
from drivetrain_sophia import Sophia


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def paper(x: float, gradients: list[float], estimates: list[float | None], o: dict[str, Any]) -> float:
    """Algorithm 3 of arXiv:2305.14342 for one weight; an estimate of None means that none is made in that step."""
    m = h = 0.0
    (b1, b2), lr = o["betas"], o["lr"]
    for g, estimate in zip(gradients, estimates, strict=True):
        m = b1 * m + (1 - b1) * g
        if estimate is not None:
            h = b2 * h + (1 - b2) * estimate
        x = x - lr * o["weight_decay"] * x
        z = m / max(o["gamma"] * h, o["eps"])
        x = x - lr * math.copysign(min(abs(z), 1.0), z)
    return x


SETTINGS = {"lr": 0.1, "betas": (0.9, 0.8), "gamma": 0.5, "eps": 1e-12, "weight_decay": 0.2}


def test_thirty_steps_follow_the_paper() -> None:
    """Estimates every third step, of both signs (Hutchinson's may be negative) and of every size."""
    start, size = random(4, 5), 20
    p = nn.Parameter(start.clone())
    optimizer = Sophia([p], **SETTINGS)  # type: ignore[arg-type]
    gradients = [random(4, 5, seed=10 + t) for t in range(30)]
    estimates = [random(4, 5, seed=90 + t) * 10.0 ** (t % 5 - 1) if t % 3 == 0 else None for t in range(30)]
    for gradient, estimate in zip(gradients, estimates, strict=True):
        if estimate is not None:
            optimizer.update_hessian([estimate])
        p.grad = gradient.clone()
        optimizer.step()
    expected = [
        paper(
            start.view(-1)[i].item(),
            [g.view(-1)[i].item() for g in gradients],
            [None if e is None else e.view(-1)[i].item() for e in estimates],
            SETTINGS,
        )
        for i in range(size)
    ]
    torch.testing.assert_close(p.detach().view(-1), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change", [{"gamma": 0.51}, {"betas": (0.9, 0.81)}, {"weight_decay": 0.21}, {"betas": (0.91, 0.8)}])
def test_control_each_setting_changes_the_result(change: dict[str, Any]) -> None:
    results = []
    for settings in (SETTINGS, SETTINGS | change):
        p = nn.Parameter(random(50))
        optimizer = Sophia([p], **settings)
        for t in range(6):
            optimizer.update_hessian([random(50, seed=40 + t).abs() * 3])
            p.grad = random(50, seed=10 + t)
            optimizer.step()
        results.append(p.detach())
    assert (results[0] - results[1]).abs().max() > 1e-5


def test_without_curvature_every_weight_moves_by_the_rate() -> None:
    p = nn.Parameter(torch.zeros(50))
    optimizer = Sophia([p], lr=0.25)
    for step in range(3):
        before = p.detach().clone()
        p.grad = random(50, seed=step, dtype=torch.float32) * 1e-5
        optimizer.step()
        moved = p.detach() - before * (1 - 0.25 * 0.1)
        torch.testing.assert_close(moved.abs(), torch.full((50,), 0.25), rtol=1e-6, atol=1e-6)


def test_where_the_gradient_vanishes_nothing_moves() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.zeros(3)
    Sophia([p], weight_decay=0.0).step()
    assert torch.equal(p.detach(), torch.ones(3))


def test_entries_that_are_not_finite_leave_the_curvature_alone() -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = Sophia([p], betas=(0.9, 0.5))
    optimizer.update_hessian([torch.tensor([1.0, 1.0, 1.0, 1.0])])
    optimizer.update_hessian([torch.tensor([2.0, math.nan, math.inf, -math.inf])])
    optimizer.update_hessian([None])
    assert optimizer.state[p]["hessian"].tolist() == [1.25, 0.5, 0.5, 0.5]


def test_the_win_rate_counts_what_was_not_clipped() -> None:
    a, b, idle = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(7))
    optimizer = Sophia([{"params": [a, idle]}, {"params": [b], "gamma": 1.0}], lr=1.0, betas=(0.0, 0.0), gamma=0.5)
    assert optimizer.win_rate().item() == 0.0
    optimizer.update_hessian([torch.tensor([1.0, 1.0, -1.0]), None, torch.tensor([1.0])])
    a.grad, b.grad = torch.tensor([0.25, 0.75, 0.0]), torch.tensor([0.75])
    optimizer.step()
    assert optimizer.win_rate().item() == 0.75  # 0.25 < 0.5, 0 < ε, 0.75 < 1; 0.75 ≥ 0.5
    assert a.tolist() == [-0.5, -1.0, 0.0]
    assert b.tolist() == [-0.75]


# -- what parameters may be like


def test_groups_none_gradients_scalars_and_empty_tensors() -> None:
    scalar, empty, idle = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.ones(2))
    optimizer = Sophia([{"params": [scalar, empty], "lr": 0.25}, {"params": [idle]}], weight_decay=0.0)
    optimizer.update_hessian([torch.tensor(0.0), torch.empty(0, 3), torch.ones(2)])
    scalar.grad, empty.grad = torch.tensor(-2.0), torch.empty(0, 3)
    optimizer.step()
    assert scalar.item() == 1.25
    assert torch.equal(idle.detach(), torch.ones(2))
    assert 0.0 <= optimizer.win_rate().item() <= 1.0


def test_an_estimate_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        Sophia([nn.Parameter(torch.ones(2))]).update_hessian([])


def test_bfloat16_weights_have_their_curvature_in_float32() -> None:
    p = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    optimizer = Sophia([p], betas=(0.9, 0.99))
    estimates = [random(1000, dtype=torch.bfloat16).abs()] * 300
    expected = torch.zeros(1000, dtype=torch.float64)
    for estimate in estimates:
        optimizer.update_hessian([estimate])
        expected = 0.99 * expected + 0.01 * estimate.double()
    p.grad = torch.ones(1000, dtype=torch.bfloat16)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16
    torch.testing.assert_close(optimizer.state[p]["hessian"].double(), expected, rtol=1e-5, atol=0)
    rounded = torch.zeros(1000, dtype=torch.bfloat16)
    for estimate in estimates:
        rounded.lerp_(estimate, 0.01)
    assert rounded.double().mean() < 0.9 * expected.mean(), "control: in bfloat16 it would get stuck"


def test_a_sparse_gradient_is_refused_by_name_and_nothing_changes() -> None:
    table = nn.Embedding(6, 2, sparse=True)
    optimizer = Sophia([{"params": list(table.parameters()), "param_names": ["table.weight"]}])
    before = table.weight.detach().clone()
    table(torch.tensor([1, 4])).sum().backward()
    with pytest.raises(ModelError, match=r"the gradient of 'table\.weight' is sparse, which Sophia cannot use"):
        optimizer.step()
    assert torch.equal(table.weight.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", ["", "hessian", "exp_avg"])
def test_a_restored_optimizer_goes_on_bit_equal(dtype: torch.dtype, part: str) -> None:
    def advance(p: nn.Parameter, optimizer: Sophia, steps: range) -> None:
        for t in steps:
            if t % 3 == 0:
                optimizer.update_hessian([p.grad.square() * 50 if p.grad is not None else random(60, dtype=dtype) ** 2])
            p.grad = torch.sin(5 * p.detach() + t)
            optimizer.step()

    straight, first = nn.Parameter(random(60, dtype=dtype)), nn.Parameter(random(60, dtype=dtype))
    advance(straight, Sophia([straight], lr=0.05), range(9))
    optimizer = Sophia([first], lr=0.05)
    advance(first, optimizer, range(5))
    saved = deepcopy(optimizer.state_dict())
    if part:
        saved["state"][0][part].zero_()
    second = nn.Parameter(first.detach().clone())
    second.grad = first.grad
    restored = Sophia([second])
    restored.load_state_dict(saved)
    advance(second, restored, range(5, 9))
    assert torch.equal(second, straight) == (not part)
    assert restored.state[second]["hessian"].data_ptr() != saved["state"][0]["hessian"].data_ptr()
