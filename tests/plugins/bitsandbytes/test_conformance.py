"""It keeps every promise of an optimizer; the kit's checks, each with an id of its own."""

from __future__ import annotations

import pytest
import torch

from drivetrain_bitsandbytes import (
    Adam8bit,
    AdamW8bit,
    AdEMAMix8bit,
    Lion8bit,
    PagedAdamW8bit,
    PagedAdEMAMix8bit,
    PagedLion8bit,
    RMSprop8bit,
    SGD8bit,
)
from drivetrain_testing import Check, conformance

NO_GPU = None if torch.cuda.is_available() else "paged state needs a CUDA GPU"


@conformance(
    Adam8bit(),
    AdamW8bit(),
    AdEMAMix8bit(),
    Lion8bit(),
    RMSprop8bit(),
    SGD8bit(),
    processes=pytest.mark.slow,
)
def test_conformance_of_those_that_run_anywhere(check: Check) -> None:
    check()


@conformance(
    PagedAdamW8bit(),
    PagedAdEMAMix8bit(),
    PagedLion8bit(),
    device="cuda",
    unavailable=NO_GPU,
    processes=pytest.mark.slow,
)
def test_conformance_of_paged_state(check: Check) -> None:
    check()
