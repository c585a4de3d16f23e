"""The orthogonal factor of many matrices at once, by odd polynomials: matrix products only, no decomposition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Quintic = tuple[float, float, float]
Method = Literal["polar_express", "newton_schulz"]

# Jordan et al. 2024 (kellerjordan.github.io/posts/muon): steepest at zero, ends anywhere in about [0.68, 1.13].
NEWTON_SCHULZ: Quintic = (3.4445, -4.7750, 2.0315)

# Amsel et al. 2025 (arXiv:2505.16932, algorithm 1): each the best approximation of 1 on the interval that those before it make of
# [0.001, 1], whose lower end counts as at least 0.024 of the upper one, so that the first ones do not flatten what is large.
_POLAR_EXPRESS: tuple[Quintic, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_SAFETY = 1.01  # room for rounding: what comes out above an interval's end would grow
_TINY = 1e-12  # of a norm: zero stays zero


def quintics(method: Method, steps: int) -> list[Quintic]:
    """The polynomials ax + bx³ + cx⁵ of `steps` iterations, in order."""
    if method == "newton_schulz":
        return [NEWTON_SCHULZ] * steps
    safe = [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:-1]]
    return [*safe, *[_POLAR_EXPRESS[-1]] * steps][:steps]


def orthogonalize(matrices: Tensor, method: Method = "polar_express", steps: int = 5) -> Tensor:
    """Move every singular value of each matrix towards 1 and leave the singular vectors: UΣVᵀ becomes nearly UVᵀ.

    Args:
        matrices: [..., rows, columns]; computed in their own type.
        method: which polynomials: "polar_express" (Amsel et al. 2025) or "newton_schulz" (Jordan et al. 2024).
        steps: how many. With five, Polar Express brings what lies above a thousandth of the Frobenius norm close to 1.

    Returns:
        A new tensor of the same shape and type.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the smaller side's Gram matrix costs less
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    # squares of small numbers need float32's range and more than bfloat16's 8 bits
    norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = x / (norms * (_SAFETY if method == "polar_express" else 1.0)).clamp(min=_TINY).to(x.dtype)
    x = _iterate(x, quintics(method, steps)).reshape(shape)
    return x.mT if tall else x


def _iterate(x: Tensor, polynomials: Sequence[Quintic]) -> Tensor:
    """x ← ax + b(xxᵀ)x + c(xxᵀ)²x for each polynomial; x is [matrices, rows, columns]."""
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
