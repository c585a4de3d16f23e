"""Distributions for the tests of the kit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

METADATA = "Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{more}"
GOOD = "License-Expression: MIT\nRequires-Dist: drivetrain-core>=0.1,<1\n"
COMPONENT = '''
from drivetrain import Callback, component
@component
class Thing(Callback):
    """Does nothing."""
'''


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Install a distribution of one package from texts; gives the package's folder."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made: list[str] = []

    def add(
        name: str, more: str = GOOD, code: str = COMPONENT, typed: bool = True, target: str = "Thing", kind: str = "callback"
    ) -> Path:
        package, info = tmp_path / name, tmp_path / f"{name}-1.0.dist-info"
        package.mkdir()
        info.mkdir()
        (package / "__init__.py").write_text(code)
        if typed:
            (package / "py.typed").touch()
        (info / "METADATA").write_text(METADATA.format(name=name, more=more))
        (info / "entry_points.txt").write_text(f"[drivetrain.{kind}]\nthing = {name}:{target}\n")
        made.append(name)
        return package

    yield add
    for name in made:
        sys.modules.pop(name, None)
