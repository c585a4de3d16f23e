"""The fixtures, asked for as the README says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tests.plugins.testing import broken

from drivetrain import Trainer, is_installed
from drivetrain_testing import difference, tiny_trainer

pytest_plugins = ["drivetrain_testing.fixtures"]


def test_no_plugin_is_found(no_plugins: None) -> None:
    assert not is_installed("command", "check")


def test_nothing_is_switched_on_unasked() -> None:
    assert is_installed("command", "check")


def test_a_tiny_run(tiny_run: Callable[..., Trainer], tmp_path: Path) -> None:
    counter = broken.Sound()
    trainer = tiny_run(counter, steps=5)
    assert (trainer.output.steps, counter.steps) == (5, 5)
    assert trainer.config.output_dir == tmp_path


def rank() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def test_two_ranks(two_ranks: Callable[..., list[Any]]) -> None:
    assert two_ranks(rank) == [(0, 2), (1, 2)]


def build(callbacks: tuple[Any, ...]) -> Trainer:
    return tiny_trainer(broken.Sound(), *callbacks, steps=8)


def forgetful(callbacks: tuple[Any, ...]) -> Trainer:
    return tiny_trainer(broken.ForgetsCount(), *callbacks, steps=8)


@pytest.mark.parametrize(("make", "equal"), [(build, True), (forgetful, False)])
def test_a_killed_run(killed_run: Callable[..., Any], make: Any, equal: bool) -> None:
    found = killed_run(make)
    assert (difference(found.resumed, found.straight) is None) == equal
