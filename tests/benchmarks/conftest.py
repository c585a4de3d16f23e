"""Importing the scripts as they import each other: by names that two folders share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """A function that imports "folder/name"; what it has imported is forgotten after the test."""
    kept = set(sys.modules)

    def load(path: str) -> Any:
        folder, _, name = path.rpartition("/")
        monkeypatch.syspath_prepend(str(HERE / folder))
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - kept:
        if str(HERE) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
