"""What an ordinary step and an import may cost, in counts: they do not depend on what else the machine does."""

from __future__ import annotations

import cProfile
import gc
import pstats
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from drivetrain import Callback, CallbackContext, Trainer, TrainingConfig

DATA = TensorDataset(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), torch.ones(64, 1))


class Idle(Callback):
    """Takes part in no step."""


class Listening(Callback):
    def on_step_end(self, ctx: CallbackContext) -> None:
        pass


def trainer(steps: int, *callbacks: Any, log_interval: str = "100000st") -> Trainer:
    torch.manual_seed(0)  # whether a norm comes near its limit decides a call
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    config = TrainingConfig(
        max_duration=f"{steps}st", per_device_batch_size=4, standard_callbacks=False, device="cpu", log_interval=log_interval
    )
    return Trainer(model, config, DATA, loss=nn.MSELoss(), optimizer=optimizer, callbacks=callbacks)


def calls_per_step(*callbacks: Any) -> float:
    def calls(steps: int) -> int:
        made, profiler = trainer(steps, *callbacks), cProfile.Profile(builtins=False)
        gc.collect()  # what other tests have left calls functions when it is freed
        gc.disable()
        profiler.enable()
        made.train()
        profiler.disable()
        gc.enable()
        return sum(entry[0] for entry in pstats.Stats(profiler).stats.values())  # type: ignore[attr-defined]

    calls(20)
    return (calls(260) - calls(100)) / 160  # ten epochs between them


def test_plugins_that_listen_to_nothing_cost_nothing() -> None:
    assert calls_per_step(*(Idle() for _ in range(50))) == calls_per_step()


def test_a_listener_costs_its_own_call_and_the_first_of_an_event_one_more() -> None:
    bare = calls_per_step()
    costs = {count: calls_per_step(*(Listening() for _ in range(count))) - bare for count in (1, 5, 50)}
    assert costs == {1: 2, 5: 6, 50: 51}


def test_steps_leave_nothing_behind() -> None:
    """Python's memory blocks and the collector's objects do not grow from one logging step to a later one; nor do tensors."""
    counted: list[tuple[int, int, int]] = []

    class Counting(Callback):
        def on_log(self, ctx: CallbackContext) -> None:
            if ctx.step % 80 == 0:
                gc.collect()
                objects = gc.get_objects()
                tensors = sum(isinstance(thing, torch.Tensor) for thing in objects)
                counted.append((sys.getallocatedblocks(), len(objects), tensors))
                del objects

    trainer(400, Counting(), log_interval="20st").train()
    blocks, objects, tensors = zip(*counted[1:], strict=True)  # the first interval fills caches
    assert len(blocks) == 4
    assert len(set(tensors)) == 1
    # a logged loss is kept for the result: a pair for each of four logs
    assert max(objects) - min(objects) <= 40
    assert max(blocks) - min(blocks) <= 150, f"320 steps left {max(blocks) - min(blocks)} blocks"


def test_steps_that_leave_something_behind_would_be_noticed() -> None:
    """The control: a list with an entry for each step."""
    kept: list[Any] = []

    class Hoarding(Callback):
        def on_step_end(self, ctx: CallbackContext) -> None:
            kept.append([ctx.step + 1_000_000])

    before = sys.getallocatedblocks()
    trainer(320, Hoarding(), log_interval="20st").train()
    assert sys.getallocatedblocks() - before > 320


@pytest.mark.parametrize(
    ("code", "most"), [("import drivetrain", 60), ("from drivetrain import Trainer, TrainingConfig, Callback", 130)]
)
def test_modules_that_importing_adds_to_those_of_torch(code: str, most: int) -> None:
    check = f"import sys, torch; before = len(sys.modules); {code}; print(len(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= most


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_ordinary_steps_do_not_synchronise() -> None:
    """Under `torch.cuda.set_sync_debug_mode("error")` a wait is an error."""

    class Strict(Callback):
        def on_step_start(self, ctx: CallbackContext) -> None:
            torch.cuda.set_sync_debug_mode("error" if ctx.step > 3 else "default")

        def on_log(self, ctx: CallbackContext) -> None:
            torch.cuda.set_sync_debug_mode("default")

    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    config = TrainingConfig(max_duration="40st", per_device_batch_size=4, standard_callbacks=False, log_interval="1000st")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    try:
        Trainer(model, config, DATA, loss=nn.MSELoss(), optimizer=optimizer, callbacks=[Strict()]).train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
