"""It keeps every promise of a tracker; the kit's checks, each with an id of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from drivetrain_mlflow import MlflowTracker
from drivetrain_testing import Check, conformance

pytestmark = pytest.mark.slow  # its runs take long to begin and end


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")


@conformance(MlflowTracker(), processes=pytest.mark.slow)
def test_conformance(check: Check) -> None:
    check()
