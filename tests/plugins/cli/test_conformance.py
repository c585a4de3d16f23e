"""It keeps every promise of a command; the kit's checks, each with an id of its own."""

from __future__ import annotations

import pytest

from drivetrain_cli.config import Config
from drivetrain_cli.plugins import Plugins
from drivetrain_cli.train import Resume, Train
from drivetrain_testing import Check, conformance


@conformance(Config, Plugins, Resume, Train, kind="command", processes=pytest.mark.slow)
def test_conformance(check: Check) -> None:
    check()
