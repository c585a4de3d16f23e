"""It keeps every promise of a scheduler; the kit's checks, each with an id of its own."""

from __future__ import annotations

import pytest

from drivetrain_schedulers import (
    Constant,
    Cosine,
    CosineWithRestarts,
    InverseSqrt,
    Linear,
    OneCycle,
    Polynomial,
    WarmupStableDecay,
)
from drivetrain_testing import Check, conformance


@conformance(
    Constant(),
    Cosine(),
    CosineWithRestarts(),
    InverseSqrt(),
    Linear(),
    OneCycle(),
    Polynomial(),
    WarmupStableDecay(),
    processes=pytest.mark.slow,
)
def test_conformance(check: Check) -> None:
    check()
