"""It keeps every promise of a strategy; the kit's checks, each with an id of its own."""

from __future__ import annotations

from drivetrain_ddp import Ddp
from drivetrain_testing import Check, conformance


@conformance(Ddp())
def test_conformance(check: Check) -> None:
    check()
