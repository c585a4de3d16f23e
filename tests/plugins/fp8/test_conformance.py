"""It keeps every promise of a precision; the kit's checks, each with an id of its own."""

from __future__ import annotations

import pytest
import torch

from drivetrain_fp8 import Fp8
from drivetrain_testing import Check, conformance

NONE_HERE = (
    None
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    else "needs a GPU with 8-bit matrix products"
)


@conformance(Fp8(), device="cuda", unavailable=NONE_HERE, processes=pytest.mark.slow)
def test_conformance(check: Check) -> None:
    check()
