"""Lion against its formula: exactly in fractions, bit by bit in the types that models have, and in whole runs."""

from __future__ import annotations

from copy import deepcopy
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drivetrain import Callback, ConfigError, ModelError, Trainer, make_component
from drivetrain_lion import Lion, LionComponent
from drivetrain_testing import Check, Restore, conformance, state_after, tiny_trainer, weights


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def literal(p: Tensor, m: Tensor, g: Tensor, lr: float, b1: float, b2: float, decay: float) -> tuple[Tensor, Tensor]:
    """The paper's algorithm 2, line by line."""
    u = torch.sign(b1 * m + (1 - b1) * g)
    return p * (1 - lr * decay) - lr * u, b2 * m + (1 - b2) * g


# -- the formula


def test_exact_in_fractions() -> None:
    """With powers of two for all factors nothing rounds, so floats must equal fractions."""
    lr, b1, b2, decay = 2.0**-6, 0.75, 0.875, 0.5
    start, grads = [3, -2, 1], [[4, -1, 0], [-16, 3, 1], [1, 1, -1], [2, -8, 0]]
    p = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = Lion([p], lr=lr, betas=(b1, b2), weight_decay=decay)
    expected, m = [Fraction(x) for x in start], [Fraction(0)] * 3
    for row in grads:
        p.grad = torch.tensor(row, dtype=torch.float64)
        optimizer.step()
        u = [Fraction(b1) * a + (1 - Fraction(b1)) * g for a, g in zip(m, row, strict=True)]
        expected = [
            x * (1 - Fraction(lr) * Fraction(decay)) - Fraction(lr) * ((v > 0) - (v < 0))
            for x, v in zip(expected, u, strict=True)
        ]
        m = [Fraction(b2) * a + (1 - Fraction(b2)) * g for a, g in zip(m, row, strict=True)]
    assert [Fraction(x) for x in p.tolist()] == expected
    assert [Fraction(x) for x in optimizer.state[p]["exp_avg"].tolist()] == m


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_weights_are_bit_equal_to_the_formula(dtype: torch.dtype, decay: float) -> None:
    p = nn.Parameter(random(33, 7, dtype=dtype))
    optimizer = Lion([p], lr=1e-3, weight_decay=decay)
    expected, m = p.detach().clone(), torch.zeros_like(p)
    for step in range(50):
        p.grad = random(33, 7, seed=step + 1, dtype=dtype)
        optimizer.step()
        expected, m = literal(expected, m, p.grad, 1e-3, 0.9, 0.99, decay)
        assert torch.equal(p.detach(), expected), step
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], m, rtol=1e-5, atol=1e-7)


def test_bfloat16_weights_are_bit_equal_with_the_sign_of_the_exact_sum() -> None:
    """Products rounded to 8 bits would flip the sign of sums near zero, so the formula's sum is taken in float64 here."""
    p = nn.Parameter(random(33, 7, dtype=torch.bfloat16))
    optimizer = Lion([p], lr=1e-2, weight_decay=0.1)
    expected, m = p.detach().clone(), torch.zeros(33, 7, dtype=torch.float64)
    for step in range(50):
        p.grad = random(33, 7, seed=step + 1, dtype=torch.bfloat16)
        optimizer.step()
        sign = torch.sign(0.9 * m + (1 - 0.9) * p.grad.double()).to(torch.bfloat16)
        expected = expected * (1 - 1e-2 * 0.1) - 1e-2 * sign
        assert torch.equal(p.detach(), expected), step
        m = optimizer.state[p]["exp_avg"].double()


def test_the_bit_equality_would_notice_a_different_factor() -> None:
    first, second = nn.Parameter(random(33, 7)), nn.Parameter(random(33, 7))
    for p, betas in ((first, (0.9, 0.99)), (second, (0.9, 0.98))):
        optimizer = Lion([p], lr=1e-3, betas=betas)
        for step in range(50):
            p.grad = random(33, 7, seed=step + 1)
            optimizer.step()
    assert not torch.equal(first, second)


def test_a_half_precision_average_is_rounded_once() -> None:
    """β2·m + (1−β2)g in bfloat16 is the exact value to half a unit in the last place, not the sum of two rounded products."""
    p = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    optimizer = Lion([p])
    p.grad = random(1000, dtype=torch.bfloat16)
    optimizer.step()
    before = optimizer.state[p]["exp_avg"].double()
    p.grad = random(1000, seed=1, dtype=torch.bfloat16)
    optimizer.step()
    exact = 0.99 * before + 0.01 * p.grad.double()
    error = (optimizer.state[p]["exp_avg"].double() - exact).abs()
    assert (error <= exact.abs() * 2.0**-8).all()


def test_every_weight_moves_by_the_rate_in_the_first_step() -> None:
    p = nn.Parameter(random(50))
    before = p.detach().clone()
    p.grad = random(50, seed=1) * 1e-6
    Lion([p], lr=0.5).step()
    assert torch.equal(p.detach(), before - 0.5 * p.grad.sign())


# -- what parameters may be like


def test_groups_none_gradients_scalars_and_empty_tensors() -> None:
    scalar, empty, idle, matrix = (
        nn.Parameter(torch.tensor(1.0)),
        nn.Parameter(torch.empty(0, 3)),
        nn.Parameter(torch.ones(2)),
        nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16)),
    )
    optimizer = Lion([{"params": [scalar, empty], "lr": 0.25}, {"params": [idle, matrix], "weight_decay": 0.5}], lr=0.125)
    scalar.grad, empty.grad = torch.tensor(-2.0), torch.empty(0, 3)
    matrix.grad = torch.ones(2, 2, dtype=torch.bfloat16)
    optimizer.step()
    assert scalar.item() == 1.25
    assert torch.equal(idle.detach(), torch.ones(2))
    assert torch.equal(matrix.detach(), torch.full((2, 2), 1 - 0.0625 - 0.125, dtype=torch.bfloat16))
    assert idle not in optimizer.state


def test_a_sparse_gradient_is_refused_by_name_and_nothing_changes() -> None:
    model = nn.ModuleDict({"out": nn.Linear(2, 2), "table": nn.Embedding(6, 2, sparse=True)})
    optimizer = make("lion", model)
    before = deepcopy(model.state_dict())
    model["out"](model["table"](torch.tensor([1, 4]))).sum().backward()
    with pytest.raises(ModelError, match=r"the gradient of 'table\.weight' is sparse, which Lion cannot use"):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ModelError, match=r"a parameter of shape \(6, 2\)"):
        Lion(model.parameters()).step()


# -- the component


@conformance(LionComponent(lr=1e-2))
def test_conformance(check: Check) -> None:
    check()


def make(spec: Any, model: nn.Module) -> torch.optim.Optimizer:
    return make_component("optimizer", spec, "optimizer").make_optimizer(SimpleNamespace(model=model))  # type: ignore[attr-defined]


def test_options_reach_the_optimizer_and_vectors_do_not_decay() -> None:
    groups = make(
        {
            "use": "lion",
            "lr": 3e-4,
            "betas": [0.95, 0.98],
            "weight_decay": 0.5,
            "groups": [{"match": "2.*", "lr": 1.0, "weight_decay": 0.0}],
        },
        nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)),
    ).param_groups
    found = {name: (g["lr"], g["weight_decay"], g["betas"]) for g in groups for name in g["param_names"]}
    assert found == {
        "0.weight": (3e-4, 0.5, (0.95, 0.98)),
        "0.bias": (3e-4, 0.0, (0.95, 0.98)),
        "2.weight": (1.0, 0.0, (0.95, 0.98)),
        "2.bias": (1.0, 0.0, (0.95, 0.98)),
    }


@pytest.mark.parametrize(
    ("options", "path", "message"),
    [
        ({"lr": -1.0}, ".lr", "must be at least 0, got -1.0"),
        ({"lr": "1e-4"}, ".lr", "expected a number, got the text '1e-4' (remove the quotes)"),
        ({"betas": [0.9, 1.0]}, ".betas", "must be at least 0 and below 1, got 1.0"),
        ({"weight_decay": -0.1}, ".weight_decay", "must be at least 0, got -0.1"),
        ({"eps": 1e-8}, ".eps", "unknown key."),
    ],
)
def test_wrong_options_are_named_with_their_path(options: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make({"use": "lion", **options}, nn.Linear(1, 1))
    (problem,) = caught.value.problems
    assert problem.path == f"optimizer.lion{path}"
    assert problem.message.startswith(message)


# -- whole runs


def make_trainer(*callbacks: Callback, **given: Any) -> Trainer:
    return tiny_trainer(*callbacks, optimizer={"use": "lion", "lr": 1e-2}, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_falls_in_a_run_by_name(dtype: torch.dtype) -> None:
    trainer = make_trainer(dtype=dtype, steps=80)
    losses = [loss for _, loss in trainer.train().losses]
    assert type(trainer.ctx.optimizer) is Lion
    assert sum(losses[-6:]) < 0.3 * sum(losses[:6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_run_ends_bit_equal(dtype: torch.dtype) -> None:
    straight = make_trainer(dtype=dtype, steps=16)
    straight.train()
    saved = state_after(make_trainer(dtype=dtype, steps=16), 7)
    second = make_trainer(Restore(saved=saved), dtype=dtype, steps=16)
    second.train()
    assert torch.equal(weights(second), weights(straight))
    forgetful = deepcopy(saved)
    for state in forgetful["optimizer"]["state"].values():
        state["exp_avg"].zero_()
    third = make_trainer(Restore(saved=forgetful), dtype=dtype, steps=16)
    third.train()
    assert not torch.equal(weights(third), weights(straight)), "control: the state matters"


def test_the_docstring_cites_its_source() -> None:
    assert "arXiv:2302.06675, algorithm 2" in (LionComponent.__doc__ or "")
