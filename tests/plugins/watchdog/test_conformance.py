"""It keeps every promise of its kind; the kit's checks, each with an id of its own."""

from __future__ import annotations

import pytest

from drivetrain_testing import Check, conformance
from drivetrain_watchdog.callback import Watchdog
from drivetrain_watchdog.command import Hang


@conformance(Watchdog(), processes=pytest.mark.slow)
def test_conformance_of_the_callback(check: Check) -> None:
    check()


@conformance(Hang, kind="command", processes=pytest.mark.slow)
def test_conformance_of_the_command(check: Check) -> None:
    check()
