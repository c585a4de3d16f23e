"""RMSNorm under CPU autocast: against float64, and whether it is there where it should be."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from drivetrain import Precision
from drivetrain_precision import Bf16


@pytest.fixture
def precision() -> Iterator[Precision]:
    gc.collect()  # precisions of other tests, which may be in cycles
    made = Bf16().make_precision(SimpleNamespace(device=torch.device("cpu")))
    yield made
    del made
    gc.collect()


def inputs(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight, and the gradient of the result; rows of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1)) + 0.5
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=generator)
    return x.requires_grad_(), weight.requires_grad_(), torch.randn(shape, generator=generator)


def normed(x: Tensor, weight: Tensor | None, eps: float | None) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.rms_norm(x, x.shape[-1:], weight, eps)


def distance(got: Tensor | None, wanted: Tensor) -> float:
    assert got is not None
    wanted = wanted.detach()
    return float((got.detach().double() - wanted).norm() / wanted.norm())


def is_mine(result: Tensor) -> bool:
    return "_RmsNorm" in str(result.grad_fn)


def test_rows_of_no_numbers(precision: Precision) -> None:
    x, weight, grad = inputs(3, 0)
    mine = normed(x, weight, None)
    mine.backward(grad)
    assert mine.shape == (3, 0) and x.grad is not None and x.grad.shape == (3, 0)


@pytest.mark.parametrize("shape", [(6, 64), (3, 5, 24), (7,)])
@pytest.mark.parametrize("eps", [None, 1e-6, 0.1])
def test_values_and_gradients(precision: Precision, shape: tuple[int, ...], eps: float | None) -> None:
    x, weight, grad = inputs(*shape)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = F.rms_norm(wide[0], shape[-1:], wide[1], torch.finfo(torch.float32).eps if eps is None else eps)
    wanted = torch.autograd.grad(exact, wide, grad.double())
    mine = normed(x, weight, eps)
    assert is_mine(mine) and mine.dtype == torch.float32
    assert distance(mine, exact) < 2e-7
    for got, right in zip(torch.autograd.grad(mine, (x, weight), grad), wanted, strict=True):
        assert distance(got, right) < 2e-6


def test_what_is_laid_out_otherwise(precision: Precision) -> None:
    x, weight, grad = inputs(6, 64)
    turned = x.detach().T.contiguous().T.requires_grad_()
    wanted = torch.autograd.grad(normed(x, weight, 1e-6), (x, weight), grad)
    for got, right in zip(
        torch.autograd.grad(normed(turned, weight, 1e-6), (turned, weight), grad.T.contiguous().T), wanted, strict=True
    ):
        assert distance(got, right.double()) < 1e-6


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_one_of_the_two_is_trained(precision: Precision, frozen: int) -> None:
    x, weight, grad = inputs(6, 64)
    wanted = torch.autograd.grad(normed(x, weight, 1e-6), (x, weight), grad)
    (x, weight)[frozen].requires_grad_(False)
    normed(x, weight, 1e-6).backward(grad)
    assert (x, weight)[frozen].grad is None
    assert torch.equal((weight, x)[frozen].grad, wanted[1 - frozen])


def test_second_derivatives(precision: Precision) -> None:
    x, weight, grad = inputs(4, 16)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]

    def second(result: Tensor, of: list[Tensor], grad: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(result, of, grad, create_graph=True)
        return list(torch.autograd.grad(sum(part.square().sum() for part in first), of))

    wanted = second(F.rms_norm(wide[0], (16,), wide[1], 1e-6), wide, grad.double())
    result = normed(x, weight, 1e-6)
    assert is_mine(result)
    for got, right in zip(second(result, [x, weight], grad), wanted, strict=True):
        assert distance(got, right) < 1e-4


def plain(x: Tensor, weight: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """What torch does under autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result: Tensor = torch.ops.aten.rms_norm.default.decompose(x, shape, weight, 1e-6)
        return result


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda x, w: (x.double(), w.double()), (64,)),
        (lambda x, w: (x.bfloat16(), w), (64,)),
        (lambda x, w: (x, None), (64,)),
        (lambda x, w: (x.view(6, 8, 8), w.view(8, 8)), (8, 8)),
    ],
)
def test_everything_else_is_torch_s(precision: Precision, change: Any, shape: tuple[int, ...]) -> None:
    x, weight, _ = inputs(6, 64)
    x, weight = change(x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = F.rms_norm(x, shape, weight, 1e-6)
    expected = plain(x, weight, shape)
    assert not is_mine(mine)
    assert mine.dtype == expected.dtype
    assert torch.equal(mine, expected)


def test_torch_func(precision: Precision) -> None:
    x, weight, grad = inputs(6, 64)
    wanted = torch.autograd.grad(normed(x, weight, 1e-6), x, grad)[0]
    found = torch.func.grad(lambda x: (normed(x, weight.detach(), 1e-6) * grad).sum())(x.detach())
    assert distance(found, wanted.double()) < 1e-6


def test_without_autocast_or_precision_torch_is_as_before(precision: Precision) -> None:
    x, weight, _ = inputs(6, 64)
    assert not is_mine(F.rms_norm(x, (64,), weight, 1e-6))
    with torch.autocast("cpu", enabled=False):
        assert not is_mine(F.rms_norm(x, (64,), weight, 1e-6))


def test_gone_with_the_precision() -> None:
    gc.collect()
    x, weight, _ = inputs(6, 64)
    assert not is_mine(normed(x, weight, 1e-6))
