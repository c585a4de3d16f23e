"""It keeps every promise of its kind; the kit's checks, each with an id of its own."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from drivetrain_testing import Check, conformance
from drivetrain_xla import Xla, tpu_device, xla_device

NONE_HERE = None if find_spec("torch_xla") else "needs torch_xla, and a TPU"


@conformance(Xla(), unavailable=NONE_HERE, processes=pytest.mark.slow)
def test_conformance_of_the_strategy(check: Check) -> None:
    check()


@conformance(tpu_device, xla_device, kind="device", unavailable=NONE_HERE, processes=pytest.mark.slow)
def test_conformance_of_devices(check: Check) -> None:
    check()
