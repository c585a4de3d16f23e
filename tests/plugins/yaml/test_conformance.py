"""It keeps every promise of a format; the kit's checks, each with an id of its own."""

from __future__ import annotations

import pytest

from drivetrain_testing import Check, conformance
from drivetrain_yaml import Yaml


@conformance(Yaml, kind="config_format", processes=pytest.mark.slow)
def test_conformance(check: Check) -> None:
    check()
