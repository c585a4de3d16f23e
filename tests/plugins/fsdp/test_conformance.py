"""It keeps every promise of a strategy; the kit's checks, each with an id of its own."""

from __future__ import annotations

import pytest

from drivetrain_fsdp import Fsdp
from drivetrain_testing import Check, conformance


@conformance(Fsdp(), processes=pytest.mark.slow)
def test_conformance(check: Check) -> None:
    check()
