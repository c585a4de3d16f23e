"""It keeps every promise of a command; the kit's checks, each with an id of its own."""

from __future__ import annotations

import pytest

from drivetrain_bench.command import Bench
from drivetrain_testing import Check, conformance


@conformance(Bench, kind="command", processes=pytest.mark.slow)
def test_conformance(check: Check) -> None:
    check()
