"""Where the time goes, on a clock of the tests: it moves only when something is made to take time."""

from __future__ import annotations

import copy
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drivetrain import Callback, Strategy, Trainer, TrainingConfig, component, hook
from drivetrain_goodput import GoodputCallback, read_sittings
from drivetrain_goodput.sittings import totals


class Clock:
    """Seconds that pass when somebody says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("drivetrain_goodput.callback.perf_counter", made)
    monkeypatch.setattr("drivetrain_goodput.callback.time.time", made)
    monkeypatch.setattr("drivetrain.loop.time.perf_counter", made)
    return made


class Rows:
    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.clock.takes(self.seconds)
        return torch.ones(2), torch.ones(1)


class Model(nn.Linear):
    clock: Any

    def forward(self, x: Tensor) -> Tensor:
        self.clock.takes(5.0)
        return super().forward(x)


class Slow(torch.optim.SGD):
    clock: Any

    def step(self, closure: Any = None) -> Any:
        self.clock.takes(3.0)
        return super().step(closure)


@component
class Busy(Callback):
    """Takes a second in every event, and saves as a checkpoint plugin does within one of them."""

    clock: Any

    def on_restore(self, ctx: Any) -> None:
        self.clock.takes(100.0)

    def on_epoch_start(self, ctx: Any) -> None:
        self.clock.takes(0.5)

    def on_batch(self, ctx: Any) -> None:
        self.clock.takes(0.25)

    @hook(tryfirst=True)
    def on_gradients(self, ctx: Any) -> None:
        self.clock.takes(0.125)

    def on_step_end(self, ctx: Any) -> None:
        self.clock.takes(1.0)
        if ctx.step == 2:
            ctx.checkpoint_saved(Path("nowhere"))


@component
class Saved(Callback):
    clock: Any

    def on_checkpoint_saved(self, ctx: Any) -> None:
        self.clock.takes(7.0)

    def on_log(self, ctx: Any) -> None:
        self.clock.takes(2.0)


def trainer(
    folder: Path, clock: Clock, *callbacks: Callback, steps: int = 4, strategy: Strategy | None = None, **options: Any
) -> Trainer:
    """Rows of one second, forwards of five, updates of three."""
    model = Model(2, 1)
    model.clock = clock
    optimizer = Slow(model.parameters(), lr=0.1)
    optimizer.clock = clock
    given = {"max_duration": f"{steps}st", "per_device_batch_size": 2, "log_interval": "2st", "eval_interval": False}
    config = TrainingConfig(
        **{**given, "output_dir": folder, "run_name": "a", "standard_callbacks": False, "device": "cpu", **options}
    )
    return Trainer(
        model,
        config,
        Rows(clock, 1.0),
        Rows(clock, 0.5),
        loss=nn.MSELoss(),
        optimizer=optimizer,
        callbacks=[GoodputCallback(), *callbacks],
        strategy=strategy,
    )


def parts(folder: Path) -> dict[str, float]:
    (sitting,) = read_sittings(folder / "a")
    assert sum(sitting.parts.values()) == pytest.approx(sitting.seconds, rel=1e-9), "the parts add up to the whole"
    return {name: seconds for name, seconds in sitting.parts.items() if seconds}


def test_each_second_is_in_its_part(tmp_path: Path, clock: Clock) -> None:
    trainer(tmp_path, clock, Busy(clock=clock), Saved(clock=clock)).train()
    assert parts(tmp_path) == {
        "data wait": 4 * 2 * 1.0,
        "forward and backward": 4 * 5.0,
        "optimizer": 4 * 3.0,
        "callback:Busy": 100.0 + 0.5 + 4 * (0.25 + 0.125 + 1.0),
        "callback:Saved": 7.0 + 2 * 2.0,
    }


@pytest.mark.parametrize("accumulation", [1, 2])
def test_accumulation_evaluation_and_the_callers_own_time(tmp_path: Path, clock: Clock, accumulation: int) -> None:
    run = trainer(tmp_path, clock, gradient_accumulation_steps=accumulation, eval_interval="2st")
    for _ in run.steps():
        clock.takes(10.0)
    assert parts(tmp_path) == {
        "data wait": 4 * 2 * accumulation * 1.0,
        "forward and backward": 4 * accumulation * 5.0,
        "optimizer": 4 * 3.0,
        "evaluation": 2 * (8 * 0.5 + 4 * 5.0),
        "rest": 4 * 10.0,
    }


def test_what_the_device_is_waited_for_is_logging(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Tensor.tolist

    def waits(self: Tensor) -> Any:
        if self.dim() == 1 and self.is_floating_point():
            clock.takes(4.0)
        return original(self)

    monkeypatch.setattr(Tensor, "tolist", waits)
    trainer(tmp_path, clock).train()
    assert parts(tmp_path)["logging"] == 2 * 4.0


def test_over_restarts(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    @component
    class Restore(Callback):
        saved: Any

        def on_restore(self, ctx: Any) -> None:
            ctx.load_state_dict(self.saved)

    first = trainer(tmp_path, clock, steps=8)
    for step in first.steps():
        if step.number == 3:
            saved = copy.deepcopy(first.state_dict())
        if step.number == 5:
            break
    clock.takes(60.0)  # nobody was there
    trainer(tmp_path, clock, Restore(saved=saved), steps=8).train()
    one, two = read_sittings(tmp_path / "a")
    assert (one.first_step, one.last_step, two.first_step, two.last_step) == (0, 5, 3, 8)
    assert two.parts["optimizer"] == 5 * 3.0
    shown = capsys.readouterr().err.splitlines()
    at = max(index for index, line in enumerate(shown) if line.startswith("where "))
    assert shown[at].endswith("1 restart, 2 steps (20.0 s) repeated")
    assert re.fullmatch(r"  down +60\.0 s +\d\d\.\d%  (━{24}|={24})", shown[at + 1]), (
        "the longest first, and with the longest bar"
    )
    assert all(line == line.rstrip() for line in shown)
    assert totals([one, two])["down"] == 60.0


def test_a_failed_run_is_accounted_for(tmp_path: Path, clock: Clock) -> None:
    @component
    class Fail(Callback):
        def on_loss(self, ctx: Any) -> None:
            clock.takes(9.0)
            if ctx.step == 2:
                raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, clock, Fail()).train()
    assert parts(tmp_path)["callback:Fail"] == 27.0


def test_errors_still_name_their_plugin(tmp_path: Path, clock: Clock) -> None:
    @component
    class Fail(Callback):
        def on_step_end(self, ctx: Any) -> None:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError) as raised:
        trainer(tmp_path, clock, Fail()).train()
    assert any("on_step_end of callback:Fail" in note for note in raised.value.__notes__)


def test_a_run_killed_before_its_first_checkpoint_has_a_past_and_one_begun_anew_has_none(tmp_path: Path, clock: Clock) -> None:
    for expected, resume in ((1, "auto"), (2, "auto"), (1, "never")):
        for step in trainer(tmp_path, clock, steps=8, resume=resume).steps():
            if step.number == 2:
                break
        assert len(read_sittings(tmp_path / "a")) == expected


def test_with_several_ranks_what_comes_after_backward_is_communication(tmp_path: Path, clock: Clock) -> None:
    class Two(Strategy):
        world_size = 2

        def gather(self, value: Any) -> list[Any]:
            return [value, value]

        def reduce_gradients(self, parameters: Any) -> None:
            clock.takes(0.75)

    made = trainer(tmp_path, clock, steps=2, strategy=Two())
    made.train()
    found = parts(tmp_path)
    assert (found["communication"], found["optimizer"]) == (2 * 0.75, 2 * 3.0)


WORKER = """
import os, signal, sys, time
began = time.time()
import torch
from torch import nn
from drivetrain import Callback, Trainer, TrainingConfig
from drivetrain_goodput import GoodputCallback

class Sleepy(nn.Linear):
    def forward(self, x):
        time.sleep(0.02)
        return super().forward(x)

class End(Callback):
    def on_step_end(self, ctx):
        if ctx.step == 60 and sys.argv[2] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)

data = torch.utils.data.TensorDataset(torch.ones(400, 2), torch.ones(400, 1))
model = Sleepy(2, 1)
config = TrainingConfig(max_duration="100st", per_device_batch_size=4, log_interval="10st", standard_callbacks=False,
                        output_dir=sys.argv[1], run_name="a", device="cpu", eval_interval=False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
began = time.time()
trainer = Trainer(model, config, data, loss=nn.MSELoss(), optimizer=optimizer, callbacks=[GoodputCallback(show=False), End()])
print(began, flush=True)
trainer.train()
print(time.time())
"""


def sit(folder: Path, end: str) -> list[float]:
    command = [sys.executable, "-c", WORKER, str(folder), end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == (0 if end == "whole" else -signal.SIGKILL), done.stderr
    return [float(line) for line in done.stdout.split()]


def test_the_parts_add_up_to_the_time_on_the_wall(tmp_path: Path) -> None:
    """A real process on a real clock, looked at from outside of the account."""
    began, ended = sit(tmp_path, "whole")
    accounted = totals(read_sittings(tmp_path / "a"))
    assert sum(accounted.values()) == pytest.approx(ended - began, rel=0.01)
    assert accounted["forward and backward"] >= 100 * 0.02
    assert "down" not in accounted


@pytest.mark.slow
def test_and_over_a_kill(tmp_path: Path) -> None:
    (began,) = sit(tmp_path, "kill")
    time.sleep(1.0)
    _, ended = sit(tmp_path, "whole")
    accounted = totals(read_sittings(tmp_path / "a"))
    assert sum(accounted.values()) == pytest.approx(ended - began, rel=0.01)
    assert accounted["down"] >= 1.0
