"""A distribution made of files in a temporary folder, so that these tests need the core and drivetrain-verify alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ENTRY_POINTS = """
[drivetrain.model]
line = toy_plugin:Line
[drivetrain.dataset]
points = toy_plugin:Points
[drivetrain.optimizer]
plain_adam = toy_plugin:PlainAdam
[drivetrain.callback]
checkpoint = toy_plugin:Checkpoint
counter = toy_plugin:Counter
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write a configuration of the toy plugins; returns its path."""
    site = tmp_path / "site"
    folder = site / "toy-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\nRequires-Dist: drivetrain-core>=0.1,<1\n")
    (folder / "entry_points.txt").write_text(ENTRY_POINTS)
    shutil.copy(Path(__file__).with_name("toy_plugin.py"), site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("DRIVETRAIN_PLUGINS", "toy")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def write(*callbacks: Any) -> str:
        table = {"model": "line", "data": "points", "optimizer": "plain_adam", "device": "cpu", "max_duration": "100ep"}
        path = tmp_path / "run.json"
        path.write_text(json.dumps(table | {"callbacks": list(callbacks)}))
        return str(path)

    return write
