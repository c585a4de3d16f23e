"""It keeps every promise of its kind; the kit's checks, each with an id of its own."""

from __future__ import annotations

import pytest

from drivetrain_qlora import QLoRA
from drivetrain_qlora.export import Export
from drivetrain_qlora.preset import qlora
from drivetrain_testing import Check, conformance


@conformance(QLoRA(), processes=pytest.mark.slow)
def test_conformance_of_the_mode(check: Check) -> None:
    check()


@conformance(qlora, kind="preset", processes=pytest.mark.slow)
def test_conformance_of_the_preset(check: Check) -> None:
    check()


@conformance(Export, kind="command", processes=pytest.mark.slow)
def test_conformance_of_the_command(check: Check) -> None:
    check()
