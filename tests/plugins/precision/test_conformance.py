"""It keeps every promise of a precision; the kit's checks, each with an id of its own."""

from __future__ import annotations

import pytest

from drivetrain_precision import Auto, Bf16, Bf16True, Fp16, Fp32, Fp64, Tf32
from drivetrain_testing import Check, conformance


@conformance(Auto(), Bf16(), Fp32(), Fp64(), Tf32(), processes=pytest.mark.slow)
def test_conformance_of_most(check: Check) -> None:
    check()


@conformance(
    Bf16True(),
    unsupported={"overflows_are_skipped": "it rounds updates itself and scales no loss: bfloat16 has the range of float32"},
    processes=pytest.mark.slow,
)
def test_conformance_of_bf16_true(check: Check) -> None:
    check()


@conformance(
    Fp16(init_scale=64.0),  # with which no step overflows: which one does depends on the size of a microbatch
    unsupported={"steps_wait_for_no_device": "torch's GradScaler reads whether a gradient overflowed"},
    processes=pytest.mark.slow,
)
def test_conformance_of_fp16(check: Check) -> None:
    check()
