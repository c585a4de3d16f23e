"""Short attention under CPU autocast: against float64 and torch's kernel, and gone with the precision that brought it."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import drivetrain_precision.attention
from drivetrain import Precision
from drivetrain_precision import Bf16, Fp16

PLAIN: list[dict[str, Any]] = [{"is_causal": True}, {}, {"scale": 0.3, "is_causal": True}, {"scale": 1.0}]
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
    wanted = wanted.detach()
    return float((got.detach().double() - wanted).norm() / wanted.norm())


@pytest.fixture(params=[True, False], ids=["native", "not native"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU has instructions for bfloat16, as far as the plugin can tell: else it is float32 that is faster."""
    monkeypatch.setattr(drivetrain_precision.attention, "bf16_support", lambda device: (request.param, ""))
    return bool(request.param)


def is_by_products(mixed: Tensor) -> bool:
    """Whether the products have a part in the graph that leads here."""
    found, waiting = set(), [mixed.grad_fn]
    while waiting:
        if (node := waiting.pop()) is not None and node not in found:
            found.add(node)
            waiting += [before for before, _ in node.next_functions]
    return any("Products" in node.name() for node in found)


def test_heads_of_no_numbers(native: bool) -> None:
    kept = made()
    mixed, gradients = autocast(*projected(size=0))
    assert mixed.shape == gradients[0].shape == (2, 4, 12, 0) and kept is not None


@pytest.mark.parametrize("options", CASES)
def test_in_float32_it_is_as_exact_as_its_result_can_be_and_never_less_so_than_autocast(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drivetrain_precision.attention, "bf16_support", lambda device: (False, ""))
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


@pytest.mark.parametrize("spread", [1.0, 10.0])  # of the scores
@pytest.mark.parametrize("options", PLAIN[:2])
def test_as_products_it_is_as_exact_as_torch_s_kernel(native: bool, options: dict[str, Any], spread: float) -> None:
    q, k, v = projected(time=64, size=32)
    q, k = ((t.detach() * spread**0.5).bfloat16().requires_grad_() for t in (q, k))
    plain, wanted = autocast(q, k, v, **options), exact(q, k, v, **options)
    precision = made()
    mine = autocast(q, k, v, **options)
    assert is_by_products(mine[0]) == native
    assert distance(mine[0], wanted[0]) < distance(plain[0], wanted[0]) * 1.5
    for got, theirs, right in zip(mine[1], plain[1], wanted[1], strict=True):
        assert got.dtype == torch.bfloat16
        assert distance(got, right) < distance(theirs, right) * 2.2  # products on the way are rounded
    rounded = (q @ k.mT * 32**-0.5).masked_fill(
        torch.ones(64, 64, dtype=torch.bool).triu(1) & options.get("is_causal", False), -torch.inf
    )
    less = distance(rounded.softmax(-1) @ v, wanted[0])  # what scores in 16 bits would cost
    assert less > distance(plain[0], wanted[0]) * 1.5
    del precision


@pytest.mark.parametrize("options", PLAIN)
def test_lengths_and_sizes_that_differ(native: bool, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 3, 5, 8), (2, 3, 9, 8), (2, 3, 9, 4))
    q, k, v = (torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes)
    precision = made()
    mine, wanted = autocast(q, k, v, **options), exact(q, k, v, **options)
    assert mine[0].shape == (2, 3, 5, 4)
    assert is_by_products(mine[0]) == native
    for got, right in zip((mine[0], *mine[1]), (wanted[0], *wanted[1]), strict=True):
        assert got.shape == right.shape
        assert distance(got, right) < 2**-6
    del precision


@pytest.mark.parametrize("plain", [False, True])
def test_second_derivatives(native: bool, plain: bool) -> None:
    if not (native or plain):
        pytest.skip("torch's kernel has none")
    q, k, v = projected()
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]

    def second(mixed: Tensor, inputs: list[Tensor]) -> Tensor:
        firsts = torch.autograd.grad(mixed.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(first.square().sum() for first in firsts), inputs[0])[0]

    with sdpa_kernel(SDPBackend.MATH):
        wanted = second(F.scaled_dot_product_attention(*wide, is_causal=True), wide)
    precision = made()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        sdpa_kernel(SDPBackend.MATH) if plain else nullcontext(),
    ):
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert is_by_products(mixed) != plain  # whoever asks for plain operations gets them
    assert distance(second(mixed.float(), [q, k, v]), wanted) < 2**-5
    del precision


def test_second_derivatives_where_not_everything_is_trained() -> None:
    q, k, v = projected()
    precision = made()

    def second(k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = F.scaled_dot_product_attention(q, k, v)
        (first,) = torch.autograd.grad(mixed.float().square().sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), q)[0]

    assert torch.equal(second(k.detach(), v.detach()), second(k, v))
    del precision


def test_functions_of_torch_func(native: bool) -> None:
    q, k, v = (t.detach() for t in projected())
    precision = made()

    def total(q: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).float().square().sum()

    q.requires_grad_()
    (wanted,) = torch.autograd.grad(total(q), q)
    assert distance(torch.func.grad(total)(q.detach()), wanted) < 2**-6
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
