"""It keeps every promise of its kind; the kit's checks, each with an id of its own."""

from __future__ import annotations

import pytest

from drivetrain_early_stopping import EarlyStoppingCallback
from drivetrain_testing import Check, conformance


@conformance(EarlyStoppingCallback(), processes=pytest.mark.slow)
def test_conformance(check: Check) -> None:
    check()
