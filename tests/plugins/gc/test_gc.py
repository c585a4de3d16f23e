from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from drivetrain import Callback, CallbackContext, Trainer, TrainingConfig
from drivetrain_gc import GcCallback
from drivetrain_testing import conformance


@conformance(GcCallback())
def test_conformance(check: Any) -> None:
    check()


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    before = gc.isenabled(), gc.get_freeze_count()
    yield
    assert (gc.isenabled(), gc.get_freeze_count()) == before, "everything is as it was"


class Cycle:
    """Only the collector can free it."""

    def __init__(self) -> None:
        self.itself = self


class Littering(Callback):
    """Leaves a cycle at each step and sees which are still there; counts the collections by Python's own hand."""

    def __init__(self) -> None:
        self.litter: list[weakref.ref[Cycle]] = []
        self.left: dict[int, int] = {}
        self.enabled: set[bool] = set()

    def on_step_end(self, ctx: CallbackContext) -> None:
        self.litter.append(weakref.ref(Cycle()))
        self.enabled.add(gc.isenabled())
        [[] for _ in range(3000)]  # lets Python's own collection come up when it is on
        self.left[ctx.step] = sum(found() is not None for found in self.litter)


def run(*callbacks: Any, fails: bool = False) -> None:
    model = nn.Linear(2, 1)
    config = TrainingConfig(
        max_duration="12st", per_device_batch_size=4, standard_callbacks=False, device="cpu", log_interval="4st"
    )
    data = TensorDataset(torch.ones(48, 2), torch.ones(48, 1))

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if fails:
            raise ArithmeticError("test")
        return (outputs - targets).square().mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Trainer(model, config, data, loss=loss, optimizer=optimizer, callbacks=callbacks).train()


def test_garbage_is_collected_at_logging_steps_and_at_no_others() -> None:
    littering = Littering()
    run(littering, GcCallback())
    assert littering.enabled == {False}
    assert [littering.left[step] for step in range(1, 13)] == [1, 2, 3, 4] * 3


def test_without_it_python_collects_when_it_likes() -> None:
    littering = Littering()
    run(littering)
    assert littering.enabled == {True}
    assert [littering.left[step] for step in range(1, 13)] != [1, 2, 3, 4] * 3


def test_a_run_that_fails_puts_it_back() -> None:
    with pytest.raises(ArithmeticError):
        run(GcCallback(), fails=True)
    assert gc.isenabled()


def test_what_the_program_has_switched_off_stays_off() -> None:
    gc.disable()
    try:
        run(GcCallback())
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_of_several_runs_the_last_one_puts_it_back() -> None:
    first, second = GcCallback(), GcCallback()
    ctx: Any = None
    first.on_run_start(ctx)
    other = threading.Thread(target=lambda: second.on_run_start(ctx))
    other.start()
    other.join()
    first.on_run_end(ctx)
    assert not gc.isenabled()
    first.on_run_end(ctx)  # a run that ends twice, or never began, has no say
    assert not gc.isenabled()
    second.on_run_end(ctx)
    assert gc.isenabled()
