from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
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


def run(*callbacks: Any, fails: bool = False, steps: int = 12, log_interval: str = "4st") -> None:
    model = nn.Linear(2, 1)
    given: Any = {"standard_callbacks": False, "device": "cpu", "log_interval": log_interval}
    config = TrainingConfig(max_duration=f"{steps}st", per_device_batch_size=4, **given)
    data = TensorDataset(torch.ones(48, 2), torch.ones(48, 1))

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if fails:
            raise ArithmeticError("test")
        return (outputs - targets).square().mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Trainer(model, config, data, loss=loss, optimizer=optimizer, callbacks=callbacks).train()


def test_little_garbage_is_collected_at_logging_steps_and_at_no_others() -> None:
    littering = Littering()
    run(littering, GcCallback())
    assert littering.enabled == {False}
    assert [littering.left[step] for step in range(1, 13)] == [1, 2, 3, 4] * 3


def test_much_young_garbage_does_not_wait_for_a_log() -> None:
    """Enough of it for Python to have collected it every fourth step."""

    class Much(Littering):
        def on_step_end(self, ctx: CallbackContext) -> None:
            super().on_step_end(ctx)
            [Cycle() for _ in range(gc.get_threshold()[0] // 4)]

    much, little = Much(), Littering()
    run(much, GcCallback(), steps=200, log_interval="1000st")
    assert [step for step in range(2, 201) if much.left[step] <= much.left[step - 1]] == list(range(17, 201, 16))
    assert max(much.left.values()) <= 32 and much.enabled == {False}
    run(little, GcCallback(), steps=40, log_interval="1000st")
    assert little.left[40] == 40, "little may wait"


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
    ctx: Any = SimpleNamespace(device=torch.device("cpu"), step=0)
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


FAULTS = """
import resource, statistics, sys
import torch
from torch import nn
from drivetrain import Callback, Trainer, TrainingConfig
from drivetrain_gc import GcCallback

faults, huge, resident = [], [0], lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

ROWS = 20_000  # whose 41 MB of activations are above what glibc adapts its threshold to: without the plugin they are always handed back

class Count(Callback):
    def on_step_end(self, ctx):
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        lines = iter(open("/proc/self/smaps"))
        for line in lines:
            if line.endswith("[heap]\\n"):
                huge[0] = max(huge[0], int(next(line for line in lines if line.startswith("AnonHugePages")).split()[1]) >> 10)

def train(callbacks):
    faults.clear()
    model = nn.Sequential(nn.Linear(8, 512), nn.GELU(), nn.Linear(512, 1))
    data = torch.utils.data.TensorDataset(torch.ones(ROWS, 8), torch.ones(ROWS, 1))
    config = TrainingConfig(max_duration="16st", per_device_batch_size=ROWS, standard_callbacks=False, device="cpu", seed=0)
    optimizer = torch.optim.AdamW(model.parameters())
    Trainer(model, config, data, loss=nn.MSELoss(), optimizer=optimizer, callbacks=[Count(), *callbacks]).train()
    return statistics.median(after - before for before, after in zip(faults[6:], faults[7:]))  # the heap may still grow once

options = eval(sys.argv[1])
during = train([] if options is None else [GcCallback(**options)])
print(during, resident() >> 20, huge[0], train([]))
"""


def faults(options: dict[str, Any] | None, before: str = ":", **environment: str) -> list[float]:
    """Pages an ordinary step got anew from the system, MiB held after the run, MiB of huge pages in the heap while it lasted, and the
    pages of a later run without the plugin."""
    command = ["sh", "-c", f'{before}; exec "$@"', "sh", sys.executable, "-W", "ignore", "-c", FAULTS, repr(options)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, check=True
    )
    return [float(word) for word in done.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator of Linux")
def test_a_step_gets_no_memory_anew_and_free_memory_is_returned_in_the_end() -> None:
    plain, kept = faults(None), faults({})
    assert kept[0] < 20, "the next step has the last one's memory"
    assert plain[0] > 100 * max(kept[0], 1), "else nothing is tested here"
    assert kept[1] < plain[1] + 32, "what is free after a run is the system's"
    if "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():  # else all have them, or none
        assert plain[2] == 0 and kept[2] >= 32, "the heap lies in huge pages"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator of Linux")
def test_where_addresses_are_limited_none_are_taken_ahead() -> None:
    kept = faults({}, before="ulimit -v 20000000")
    assert kept[0] < 20
    if "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        assert kept[2] == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator of Linux")
@pytest.mark.parametrize(
    ("options", "environment"),
    [
        ({"keep_memory": False}, {}),
        ({}, {"MALLOC_TRIM_THRESHOLD_": "131072"}),
        ({}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}),
    ],
)
def test_memory_is_left_to_those_who_have_decided_otherwise(options: dict[str, Any], environment: dict[str, str]) -> None:
    assert faults(options, **environment)[0] > 100
