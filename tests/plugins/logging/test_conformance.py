"""It keeps every promise of its kind; the kit's checks, each with an id of its own."""

from __future__ import annotations

import pytest

from drivetrain_logging import CsvTracker, JsonlTracker, LoggingCallback
from drivetrain_testing import Check, conformance


@conformance(LoggingCallback(), processes=pytest.mark.slow)
def test_conformance_of_the_callback(check: Check) -> None:
    check()


@conformance(CsvTracker(), JsonlTracker(), processes=pytest.mark.slow)
def test_conformance_of_trackers(check: Check) -> None:
    check()
