"""It keeps every promise of a tracker; the kit's checks, each with an id of its own."""

from __future__ import annotations

import pytest

from drivetrain_testing import Check, conformance
from drivetrain_wandb import WandbTracker

pytestmark = pytest.mark.slow  # its runs take long to begin and end


@conformance(WandbTracker(mode="offline"), processes=pytest.mark.slow)
def test_conformance(check: Check) -> None:
    check()
