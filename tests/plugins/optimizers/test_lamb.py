"""LAMB against the paper's algorithm 2, and what it does with odd parameters."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drivetrain import ConfigError, ModelError, make_component
from drivetrain_optimizers import Lamb, LambOptimizer
from drivetrain_testing import Check, conformance


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradient(at: Tensor, step: int) -> Tensor:
    return torch.sin(3 * at + step) + 0.1 * at


def paper(x: Tensor, steps: int, o: dict[str, Any], adapted: bool) -> Tensor:
    """Algorithm 2 of arXiv:1904.00962 for one layer, with φ(z) = z."""
    m, v, (b1, b2) = torch.zeros_like(x), torch.zeros_like(x), o["betas"]
    for t in range(1, steps + 1):
        g = gradient(x, t)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        r = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + o["eps"])
        update = r + o["weight_decay"] * x
        ratio = x.norm() / update.norm() if adapted else 1.0
        x = x - o["lr"] * ratio * update
    return x


SETTINGS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}


def advance(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for t in steps:
        for p in params:
            p.grad = gradient(p.detach(), t)
        optimizer.step()


@pytest.mark.parametrize("adapt", ["matrices", "all"])
def test_twenty_steps_follow_the_paper(adapt: str) -> None:
    params = [nn.Parameter(random(5, 4)), nn.Parameter(random(3, seed=1)), nn.Parameter(random(2, 3, 4, seed=2) * 100)]
    expected = [paper(p.detach(), 20, SETTINGS, adapt == "all" or p.ndim >= 2) for p in params]
    advance(LambOptimizer(params, adapt=adapt, **SETTINGS), params, range(1, 21))  # type: ignore[arg-type]
    for p, x in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("change", [{"eps": 1.1e-3}, {"betas": (0.81, 0.95)}, {"betas": (0.8, 0.94)}, {"weight_decay": 0.11}])
def test_the_formula_test_would_notice_each_setting(change: dict[str, Any]) -> None:
    results = []
    for settings in (SETTINGS, SETTINGS | change):
        params = [nn.Parameter(random(5, 4))]
        advance(LambOptimizer(params, **settings), params, range(1, 21))  # type: ignore[arg-type]
        results.append(params[0].detach())
    assert (results[0] - results[1]).abs().max() > 1e-6


def test_a_step_is_in_proportion_to_the_matrix() -> None:
    for size in (1e-3, 1.0, 1e3):
        p = nn.Parameter(random(6, 6) * size)
        before = p.detach().clone()
        p.grad = random(6, 6, seed=1)
        LambOptimizer([p], lr=0.25, weight_decay=0.0).step()
        assert (p.detach() - before).norm().item() == pytest.approx(0.25 * before.norm().item())


@pytest.mark.parametrize(("weight", "grad"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_the_ratio_is_one_where_a_norm_is_zero(weight: float, grad: float) -> None:
    p = nn.Parameter(torch.full((2, 2), weight))
    p.grad = torch.full((2, 2), grad)
    LambOptimizer([p], lr=0.5, weight_decay=0.0, eps=0.0 if grad else 1e-6).step()
    assert torch.equal(p.detach(), torch.full((2, 2), weight - 0.5 * grad))


def test_groups_none_gradients_scalars_empty_tensors_and_bfloat16() -> None:
    scalar, empty, idle, half = (
        nn.Parameter(torch.tensor(1.0)),
        nn.Parameter(torch.empty(0, 3)),
        nn.Parameter(torch.ones(2, 2)),
        nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16)),
    )
    optimizer = LambOptimizer([{"params": [scalar, empty], "lr": 0.25}, {"params": [idle, half]}], weight_decay=0.0, lr=0.5)
    scalar.grad, empty.grad = torch.tensor(-2.0), torch.empty(0, 3)
    half.grad = torch.ones(2, 2, dtype=torch.bfloat16)
    optimizer.step()
    assert scalar.item() == pytest.approx(1.25)
    assert torch.equal(idle.detach(), torch.ones(2, 2))
    assert torch.equal(half.detach(), torch.full((2, 2), 0.5, dtype=torch.bfloat16))
    idle.grad = torch.ones(2, 2)  # joins later, with a bias correction of its own
    optimizer.step()
    assert idle.mean().item() == pytest.approx(0.5)


def test_a_sparse_gradient_is_refused_by_name_and_nothing_changes() -> None:
    table = nn.Embedding(6, 2, sparse=True)
    optimizer = LambOptimizer([{"params": list(table.parameters()), "param_names": ["table.weight"]}])
    before = table.weight.detach().clone()
    table(torch.tensor([1, 4])).sum().backward()
    with pytest.raises(ModelError, match=r"the gradient of 'table\.weight' is sparse, which LambOptimizer cannot use"):
        optimizer.step()
    assert torch.equal(table.weight.detach(), before)


@pytest.mark.parametrize("part", ["", "step", "exp_avg", "exp_avg_sq"])
def test_a_restored_optimizer_goes_on_bit_equal(part: str) -> None:
    straight, first = ([nn.Parameter(random(5, 4, dtype=torch.float32))] for _ in range(2))
    advance(LambOptimizer(straight), straight, range(9))
    optimizer = LambOptimizer(first)
    advance(optimizer, first, range(5))
    saved = deepcopy(optimizer.state_dict())
    if part:
        saved["state"][0][part] *= 2
    second = [nn.Parameter(first[0].detach().clone())]
    restored = LambOptimizer(second)
    restored.load_state_dict(saved)
    advance(restored, second, range(5, 9))
    assert torch.equal(second[0], straight[0]) == (not part)


def test_options_reach_the_optimizer_and_are_checked() -> None:
    spec = {"use": "lamb", "lr": 0.5, "betas": [0.7, 0.8], "eps": 1e-3, "weight_decay": 0.2, "adapt": "all"}
    made = make_component("optimizer", spec).make_optimizer(SimpleNamespace(model=nn.Linear(2, 2)))  # type: ignore[attr-defined]
    found = [(g["lr"], g["betas"], g["eps"], g["weight_decay"], g["adapt"]) for g in made.param_groups]
    assert found == [(0.5, (0.7, 0.8), 1e-3, 0.2, "all"), (0.5, (0.7, 0.8), 1e-3, 0.0, "all")]
    with pytest.raises(ConfigError, match=r"optimizer\.lamb\.adapt: expected one of 'matrices', 'all'"):
        make_component("optimizer", {"use": "lamb", "adapt": "matrix"}, "optimizer")
    assert "arXiv:1904.00962, algorithm 2" in (Lamb.__doc__ or "")


@conformance(Lamb(lr=1e-2))
def test_conformance(check: Check) -> None:
    check()
