"""The polynomials from first principles, and what they make of matrices against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drivetrain_muon import orthogonalize
from drivetrain_muon.orthogonal import _POLAR_EXPRESS, quintics

METHODS = ("polar_express", "newton_schulz")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def best_quintic(low: float, high: float) -> tuple[float, float, float]:
    """The odd quintic nearest to 1 on [low, high], by Remez' exchange on a grid."""
    x = low + (high - low) * (1 - torch.cos(torch.pi * torch.linspace(0, 1, 20001, dtype=torch.float64))) / 2
    points = x[[0, 5000, 15000, 20000]]
    for _ in range(60):
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        a, b, c, _ = torch.linalg.solve(torch.stack([points, points**3, points**5, signs], 1), torch.ones_like(points)).tolist()
        slope = (a * x + b * x**3 + c * x**5).diff()
        turns = x[1:-1][slope[1:] * slope[:-1] <= 0]
        new = torch.stack([x[0], turns[0], turns[-1], x[-1]])
        if (new - points).abs().max() < 1e-12:
            break
        points = new
    return a, b, c


def test_polar_express_is_the_greedy_minimax_composition() -> None:
    low, high, cushion = 1e-3, 1.0, 0.02407327424182761
    for expected in _POLAR_EXPRESS[:6]:  # beyond, the interval is so small that a grid has no turning points
        a, b, c = best_quintic(max(low, cushion * high), high)
        at_low, at_high = (a * x + b * x**3 + c * x**5 for x in (low, high))
        if cushion * high > low:  # centred on 1 again
            a, b, c = (2 / (at_low + at_high) * k for k in (a, b, c))
            at_low *= 2 / (at_low + at_high)
        assert (a, b, c) == pytest.approx(expected, rel=1e-6)
        low, high = at_low, 2 - at_low


def test_later_polynomials_are_safe_and_the_last_one_repeats() -> None:
    a, b, c = quintics("polar_express", 1)[0]
    assert (a * 1.01, b * 1.01**3, c * 1.01**5) == pytest.approx(_POLAR_EXPRESS[0])
    assert quintics("polar_express", 10)[7:] == [(1.875, -1.25, 0.375)] * 3
    assert quintics("newton_schulz", 2) == [(3.4445, -4.7750, 2.0315)] * 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (3, 6, 10), (2, 2, 10, 6), (1, 7)])
def test_singular_vectors_stay_and_values_follow_the_polynomials(method: str, shape: tuple[int, ...]) -> None:
    matrix = random(*shape)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    norm = s.square().sum(-1, keepdim=True).sqrt() * (1.01 if method == "polar_express" else 1.0)
    s = s / norm
    for a, b, c in quintics(method, 5):  # type: ignore[arg-type]
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonalize(matrix, method), u @ torch.diag_embed(s) @ vh, rtol=1e-9, atol=1e-9)  # type: ignore[arg-type]


@pytest.mark.parametrize(("method", "low", "high"), [("polar_express", 0.83, 1.13), ("newton_schulz", 0.47, 1.21)])
def test_five_steps_bring_singular_values_near_one(method: str, low: float, high: float) -> None:
    """From a thousandth of the norm on; measured ends are 0.840 and 1.124, and 0.471 and 1.202."""
    u, _, vh = torch.linalg.svd(random(40, 60), full_matrices=False)
    values = torch.logspace(-2.68, 0, 40, dtype=torch.float64)
    assert 1e-3 < values.min() / values.norm() < 1.5e-3
    found = torch.linalg.svdvals(orthogonalize(u @ torch.diag(values) @ vh, method))  # type: ignore[arg-type]
    assert low < found.min() < found.max() < high


def test_eight_steps_of_polar_express_give_the_orthogonal_factor() -> None:
    matrix = random(20, 31)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(orthogonalize(matrix, steps=8), u @ vh, rtol=1e-9, atol=1e-9)
    assert (orthogonalize(matrix, "newton_schulz", steps=8) - u @ vh).abs().max() > 1e-2, "control: Jordan's do not converge"


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_is_near_float64(method: str) -> None:
    matrix = random(24, 40)
    exact, rough = orthogonalize(matrix, method), orthogonalize(matrix.bfloat16(), method)  # type: ignore[arg-type]
    assert rough.dtype == torch.bfloat16
    assert (rough.double() - exact).norm() / exact.norm() < 0.05


def test_a_stack_is_what_its_matrices_are_one_by_one() -> None:
    stack = random(6, 9, 14) * torch.logspace(-6, 6, 6, dtype=torch.float64)[:, None, None]
    together = orthogonalize(stack)
    for matrix, found in zip(stack, together, strict=True):
        torch.testing.assert_close(found, orthogonalize(matrix), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_size_does_not_matter_and_zero_stays_zero(method: str) -> None:
    matrix = random(6, 9, dtype=torch.float32)
    expected = orthogonalize(matrix, method)  # type: ignore[arg-type]
    for factor in (1e-8, 1e12):
        torch.testing.assert_close(orthogonalize(matrix * factor, method), expected, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    assert orthogonalize(torch.zeros(3, 4), method).abs().max() == 0  # type: ignore[arg-type]


def test_the_argument_is_left_alone() -> None:
    matrix = random(4, 7)
    before = matrix.clone()
    orthogonalize(matrix)
    assert torch.equal(matrix, before)
