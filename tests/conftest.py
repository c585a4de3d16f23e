"""Guards for the suite as a whole; what tests share lies beside them, so that each distribution's can run alone."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_configure() -> None:
    """Keep what tests compile out of the user's cache."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), "drivetrain-tests-compiled")))


@pytest.fixture(autouse=True)
def surroundings_stay_as_they_were() -> Iterator[None]:
    """A test that leaves one of our variables, another working directory or a process group behind fails itself, not one after it."""
    before = surroundings()
    yield
    assert surroundings() == before


THOROUGH = [line for line in Path(__file__).with_name("thorough.txt").read_text().splitlines() if line and line[0] != "#"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what thorough.txt lists, before `-m` chooses; not what `nox -s trials` runs, which may lie in the same file."""
    whole, beginnings = set(THOROUGH), tuple(line[:-1] for line in THOROUGH if line.endswith("*"))
    for item in items:
        listed = item.nodeid in whole or item.nodeid.startswith(beginnings)
        if listed and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.thorough)


def surroundings() -> tuple[dict[str, str], Path, bool]:
    distributed: Any = sys.modules.get("torch.distributed")
    ours = {name: value for name, value in os.environ.items() if name.startswith("DRIVETRAIN")}
    return ours, Path.cwd(), distributed is not None and distributed.is_initialized()
