"""It keeps every promise of its kind; the kit's checks, each with an id of its own."""

from __future__ import annotations

import pytest

from drivetrain_anomaly import AnomalyCallback
from drivetrain_testing import Check, conformance


@conformance(
    AnomalyCallback(),
    unsupported={
        "steps_wait_for_no_device": "an update that may be left out waits for the verdict, unless the optimizer is fused"
    },
    processes=pytest.mark.slow,
)
def test_conformance(check: Check) -> None:
    check()
