"""Both optimizers against the paper's three sequences, and the two points that the weights can be at.

The package of the authors (schedulefree 1.4.1) gave the same numbers to the last bits when this was written.
"""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drivetrain import ModelError
from drivetrain_schedulefree import ScheduleFree, ScheduleFreeAdamW, ScheduleFreeSGD

STEPS = 40


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradient(at: Tensor, step: int) -> Tensor:
    return torch.sin(3 * at + step) + 0.1 * at


def paper(start: Tensor, rates: list[float], o: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and z in the paper's words, with x kept and y computed from it; Adam's bias correction as in the authors' package."""
    x, z, v, total = start.clone(), start.clone(), torch.zeros_like(start), 0.0
    beta = o["betas"][0] if "betas" in o else o["momentum"]
    for t, lr in enumerate(rates, start=1):
        y = (1 - beta) * z + beta * x
        d = gradient(y, t)
        if "betas" in o:
            v = o["betas"][1] * v + (1 - o["betas"][1]) * d**2
            d = d / ((v / (1 - o["betas"][1] ** t)).sqrt() + o["eps"])
        z = z - lr * d - lr * o["weight_decay"] * y
        total += lr**2
        c = lr**2 / total if total else 0.0
        x = (1 - c) * x + c * z
    return x, (1 - beta) * z + beta * x, z


ADAMW = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
SGD = {"lr": 0.5, "momentum": 0.7, "weight_decay": 0.1}
BOTH: list[tuple[type[ScheduleFree], dict[str, Any]]] = [(ScheduleFreeAdamW, ADAMW), (ScheduleFreeSGD, SGD)]


def advance(optimizer: ScheduleFree, p: nn.Parameter, rates: list[float], first: int = 1) -> None:
    for t, lr in enumerate(rates, start=first):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = gradient(p.detach(), t)
        before = p.grad.clone()
        optimizer.step()
        assert torch.equal(p.grad, before), "listeners may still want the gradient"


def warm(lr: float, steps: int = STEPS, warmup: int = 10) -> list[float]:
    """Rises from 0, as the engine's warm-up does."""
    return [lr * min(1.0, t / warmup) for t in range(steps)]


# -- the formula


@pytest.mark.parametrize(("cls", "settings"), BOTH)
@pytest.mark.parametrize("warmup", [1, 10])
def test_forty_steps_follow_the_paper(cls: type[ScheduleFree], settings: dict[str, Any], warmup: int) -> None:
    p, rates = nn.Parameter(random(6, 5)), warm(settings["lr"], warmup=warmup)
    optimizer = cls([p], **settings)
    x, y, z = paper(p.detach(), rates, settings)
    advance(optimizer, p, rates)
    torch.testing.assert_close(p.detach(), y, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(optimizer.state[p]["z"], z, rtol=1e-10, atol=1e-12)
    optimizer.eval()
    torch.testing.assert_close(p.detach(), x, rtol=1e-10, atol=1e-12)
    assert (x - y).abs().max() > 1e-3, "control: the points differ"


@pytest.mark.parametrize(("cls", "settings"), BOTH)
def test_the_formula_test_would_notice_each_setting(cls: type[ScheduleFree], settings: dict[str, Any]) -> None:
    changes = {"betas": (0.81, 0.95), "momentum": 0.71, "weight_decay": 0.11, "lr": settings["lr"] * 1.01}
    for key in changes.keys() & settings.keys():
        results = []
        for chosen in (settings, settings | {key: changes[key]}):
            p = nn.Parameter(random(6, 5))
            advance(cls([p], **chosen), p, warm(chosen["lr"]))
            results.append(p.detach())
        assert (results[0] - results[1]).abs().max() > 1e-6, key


def test_a_rate_of_zero_moves_nothing_and_weighs_nothing() -> None:
    p = nn.Parameter(random(5))
    optimizer = ScheduleFreeAdamW([p], weight_decay=0.5)
    advance(optimizer, p, [0.0, 0.0])
    optimizer.eval()
    assert torch.equal(p.detach(), random(5))
    assert optimizer.param_groups[0]["weight_sum"] == 0.0


def test_with_a_falling_rate_the_greatest_one_weighs() -> None:
    """As in the authors' package: the last steps of a decay do not lose their weight in the average."""
    p = nn.Parameter(random(5))
    optimizer = ScheduleFreeSGD([p], lr=1.0)
    advance(optimizer, p, [0.5, 0.25, 0.125])
    assert (optimizer.param_groups[0]["lr_max"], optimizer.param_groups[0]["weight_sum"]) == (0.5, 0.75)


# -- the two points


@pytest.mark.parametrize(("cls", "settings"), BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looking_at_the_average_does_not_change_the_training(
    cls: type[ScheduleFree], settings: dict[str, Any], dtype: torch.dtype
) -> None:
    results = []
    for look in (False, True):
        p = nn.Parameter(random(6, 5, dtype=dtype))
        optimizer = cls([p], **settings)
        for t in range(1, 20):
            advance(optimizer, p, [settings["lr"]], first=t)
            if look:
                optimizer.eval()
                optimizer.eval()
                optimizer.train()
                optimizer.train()
        results.append(p.detach())
    assert torch.equal(*results)


def test_no_step_is_taken_from_the_average() -> None:
    p = nn.Parameter(random(5))
    optimizer = ScheduleFreeAdamW([p])
    advance(optimizer, p, [0.1])
    optimizer.eval()
    assert optimizer.averaged
    before, p.grad = p.detach().clone(), torch.ones_like(p)
    with pytest.raises(ModelError, match=r"call the optimizer's train\(\) first"):
        optimizer.step()
    assert torch.equal(p.detach(), before)
    optimizer.train()
    optimizer.step()


@pytest.mark.parametrize(("cls", "settings"), BOTH)
@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("how", ["state_dict", "pickle"])
def test_a_state_of_either_point_goes_on_bit_equal(
    cls: type[ScheduleFree], settings: dict[str, Any], averaged: bool, how: str
) -> None:
    straight, first = nn.Parameter(random(20, dtype=torch.float32)), nn.Parameter(random(20, dtype=torch.float32))
    rates = warm(settings["lr"], 20)
    advance(cls([straight], **settings), straight, rates)
    optimizer = cls([first], **settings)
    advance(optimizer, first, rates[:9])
    if averaged:
        optimizer.eval()
    if how == "state_dict":
        second = nn.Parameter(first.detach().clone())
        restored = cls([second], **settings)
        restored.load_state_dict(deepcopy(optimizer.state_dict()))
    else:
        second, restored = pickle.loads(pickle.dumps((first, optimizer)))
    assert restored.averaged == averaged
    restored.train()
    advance(restored, second, rates[9:], first=10)
    assert torch.equal(second, straight)


@pytest.mark.parametrize("part", ["z", "exp_avg_sq", "weight_sum", "steps", "lr_max"])
def test_each_part_of_the_state_matters(part: str) -> None:
    results = []
    for forget in (False, True):
        p = nn.Parameter(random(20))
        optimizer = ScheduleFreeAdamW([p], **ADAMW)  # type: ignore[arg-type]
        advance(optimizer, p, warm(0.05, 8, warmup=3))
        if forget and part in optimizer.state[p]:
            optimizer.state[p][part].mul_(0.5)
        elif forget:
            optimizer.param_groups[0][part] *= 2
        advance(optimizer, p, [0.05] * 3, first=9)
        results.append(p.detach())
    assert not torch.equal(*results)


# -- what parameters may be like


def test_groups_none_gradients_scalars_and_empty_tensors() -> None:
    scalar, empty, idle = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.ones(2))
    optimizer = ScheduleFreeSGD([{"params": [scalar, empty], "lr": 0.25}, {"params": [idle]}], momentum=0.5)
    scalar.grad, empty.grad = torch.tensor(2.0), torch.empty(0, 3)
    optimizer.step()
    optimizer.eval()
    assert scalar.item() == 0.5
    assert torch.equal(idle.detach(), torch.ones(2))
    optimizer.train()
    idle.grad = torch.ones(2)  # joins later
    optimizer.step()
    assert (idle < 1).all()


def test_a_sparse_gradient_is_refused_by_name_and_nothing_changes() -> None:
    table = nn.Embedding(6, 2, sparse=True)
    optimizer = ScheduleFreeAdamW([{"params": list(table.parameters()), "param_names": ["table.weight"]}])
    before = table.weight.detach().clone()
    table(torch.tensor([1, 4])).sum().backward()
    with pytest.raises(ModelError, match=r"the gradient of 'table\.weight' is sparse"):
        optimizer.step()
    assert torch.equal(table.weight.detach(), before)
