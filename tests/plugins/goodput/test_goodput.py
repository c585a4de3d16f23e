"""Where the time goes, on a clock of the tests: it moves only when something is made to take time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drivetrain import Callback, Trainer, TrainingConfig, component, hook
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


def trainer(folder: Path, clock: Clock, *callbacks: Callback, steps: int = 4, **options: Any) -> Trainer:
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
    *_, head = [line for line in capsys.readouterr().err.splitlines() if line.startswith("where ")]
    assert head.endswith("1 restart, 2 steps repeated")
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
