"""Fixtures, for `pytest_plugins = ["drivetrain_testing.fixtures"]`; nothing here is switched on by being installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from drivetrain_testing.harness import discovery_blocked


@pytest.fixture
def no_plugins() -> Iterator[None]:
    """A test in which no installed plugin can be found."""
    with discovery_blocked():
        yield
