"""Short attention under CPU autocast: against float64, and gone with the precision that brought it."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from drivetrain import Precision
from drivetrain_precision import Bf16, Fp16

CASES: list[dict[str, Any]] = [
    {"is_causal": True},
    {},
    {"scale": 0.3, "is_causal": True},
    {"attn_mask": torch.ones(12, 12, dtype=torch.bool).tril()},
    {"attn_mask": torch.linspace(-2, 2, 144).view(12, 12)},
]


@pytest.fixture(autouse=True)
def nothing_left_over() -> None:
    gc.collect()  # precisions of other tests, which may be in cycles


def made(kind: Any = Bf16) -> Precision:
    precision = kind().make_precision(SimpleNamespace(device=torch.device("cpu")))
    assert isinstance(precision, Precision)
    return precision


def projected(time: int = 12, size: int = 16, heads: int = 4, shared: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """What three linear layers give under autocast; `shared` queries for each head of keys and values."""
    generator = torch.Generator().manual_seed(0)
    counts = (heads, heads // shared, heads // shared)
    q, k, v = (torch.randn(2, n, time, size, generator=generator).bfloat16().requires_grad_() for n in counts)
    return q, k, v


def autocast(
    q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    with torch.autocast("cpu", dtype):
        mixed = F.scaled_dot_product_attention(q, k, v, **options)
    return mixed, list(torch.autograd.grad(mixed.float().square().sum(), (q, k, v)))


def exact(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    options = {n: o.double() if isinstance(o, Tensor) and o.is_floating_point() else o for n, o in options.items()}
    mixed = F.scaled_dot_product_attention(*wide, **options)
    return mixed, list(torch.autograd.grad(mixed.square().sum(), wide))


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.detach().double() - wanted.detach()).norm() / wanted.norm())


@pytest.mark.parametrize("options", CASES)
def test_it_is_as_exact_as_its_result_can_be_and_never_less_so_than_autocast(options: dict[str, Any]) -> None:
    q, k, v = projected()
    plain, wanted = autocast(q, k, v, **options), exact(q, k, v, **options)
    precision = made()
    mine = autocast(q, k, v, **options)
    assert mine[0].dtype == plain[0].dtype == torch.bfloat16
    assert distance(mine[0], wanted[0]) < 2**-9  # half a unit in the last of bfloat16's 8 bits
    for got, theirs, right in zip(mine[1], plain[1], wanted[1], strict=True):
        assert got.dtype == torch.bfloat16
        assert distance(got, right) < 2**-7
        assert distance(got, right) < distance(theirs, right) * 1.1
    del precision


def test_grouped_heads() -> None:
    q, k, v = projected(shared=2)
    precision = made()
    mine, wanted = autocast(q, k, v, enable_gqa=True)[0], exact(q, k, v, enable_gqa=True)[0]
    assert distance(mine, wanted) < 2**-9
    del precision


def test_long_sequences_are_left_as_they_are() -> None:
    q, k, v = projected(time=2048, size=16, heads=1)
    plain, gradients = autocast(q, k, v, is_causal=True)
    precision = made()
    mine, mine_gradients = autocast(q, k, v, is_causal=True)
    assert torch.equal(mine, plain)
    assert all(torch.equal(a, b) for a, b in zip(mine_gradients, gradients, strict=True))
    del precision


def test_inputs_that_autocast_leaves_alone_are_left_alone() -> None:
    q, k, v = (t.detach().double().requires_grad_() for t in projected())
    plain, _ = autocast(q, k, v)
    precision = made()
    mine, _ = autocast(q, k, v)
    assert mine.dtype == plain.dtype == torch.float64
    assert torch.equal(mine, plain)
    del precision


@pytest.mark.parametrize("kind", [Bf16, Fp16])
def test_without_autocast_and_after_the_precision_is_dropped_torch_is_as_before(kind: Any) -> None:
    q, k, v = projected()
    before, outside = autocast(q, k, v)[0], F.scaled_dot_product_attention(q, k, v)
    precision = made(kind)
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), outside)
    another = made(kind)
    during = autocast(q, k, v)[0]
    assert not torch.equal(during, before)  # else nothing is tested here
    del precision
    gc.collect()
    assert torch.equal(autocast(q, k, v)[0], during)  # the other one is there
    del another
    gc.collect()
    assert torch.equal(autocast(q, k, v)[0], before)


def test_fp16_gives_fp16() -> None:
    q, k, v = (t.detach().half().requires_grad_() for t in projected())
    precision = made(Fp16)
    mine, _ = autocast(q, k, v, torch.float16)
    assert mine.dtype == torch.float16
    assert distance(mine, exact(q, k, v)[0]) < 2**-11
    del precision
