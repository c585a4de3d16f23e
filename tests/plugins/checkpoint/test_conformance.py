"""It keeps every promise of its kind; the kit's checks, each with an id of its own."""

from __future__ import annotations

import pytest

from drivetrain_checkpoint import CheckpointCallback
from drivetrain_checkpoint.command import CheckpointCommand
from drivetrain_testing import Check, conformance


@conformance(CheckpointCallback(), processes=pytest.mark.slow)
def test_conformance_of_the_callback(check: Check) -> None:
    check()


@conformance(CheckpointCommand, kind="command", processes=pytest.mark.slow)
def test_conformance_of_the_command(check: Check) -> None:
    check()
