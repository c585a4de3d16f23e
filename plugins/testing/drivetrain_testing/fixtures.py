"""Fixtures, for `pytest_plugins = ["drivetrain_testing.fixtures"]`; nothing here is switched on by being installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from drivetrain import Trainer
from drivetrain_testing.harness import discovery_blocked, tiny_trainer
from drivetrain_testing.processes import kill_and_resume, spawn_ranks


@pytest.fixture
def no_plugins() -> Iterator[None]:
    """A test in which no installed plugin can be found."""
    with discovery_blocked():
        yield


@pytest.fixture
def tiny_run(tmp_path: Path) -> Callable[..., Trainer]:
    """`tiny_run(*callbacks, **given)` trains as `tiny_trainer` has it, in the test's own folder; returns the trainer."""

    def train(*callbacks: Any, **given: Any) -> Trainer:
        trainer = tiny_trainer(*callbacks, **({"output_dir": str(tmp_path)} | given))
        trainer.train()
        return trainer

    return train


@pytest.fixture
def two_ranks() -> Callable[..., list[Any]]:
    """`two_ranks(function, *arguments)` calls a function on two ranks; returns both results. See `spawn_ranks`."""
    return partial(spawn_ranks, world_size=2)


@pytest.fixture
def killed_run() -> Callable[..., Any]:
    """`killed_run(build, *arguments)` kills a run and goes on, beside one that is not killed. See `kill_and_resume`."""
    return kill_and_resume
