"""What a run reports is not changed by an interruption either; and for the rarer items of the state, controls of their own.

Each scenario is a run in two sittings. `forgotten` is an item that the second one loses: then the test must see it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable as Function
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.faults.test_exactness import Forget, Interrupt, Order
from torch import nn

from drivetrain import (
    Callback,
    CallbackContext,
    CheckpointCallback,
    DrivetrainError,
    EarlyStoppingCallback,
    LoggingCallback,
    RunError,
    Tracker,
    Trainer,
    TrainingConfig,
    component,
    hook,
    loop,
    option,
    state,
)
from drivetrain_checkpoint import find_checkpoints
from drivetrain_ema import EmaCallback

Part = tuple[Any, ...]


class Fell(Exception):
    """What stands for a crash: nothing is saved after it."""


class Inputs(nn.Module):
    """A line, behind an embedding where inputs are tokens."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(12, 1)) if tokens else nn.Linear(4, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.inner(rows)


def sitting(
    folder: Path, *callbacks: Callback, forgotten: Part = (), tokens: bool = False, **given: Any
) -> tuple[Trainer, Order]:
    """One process's part of a run, without what `forgotten` names."""
    torch.manual_seed(6)
    model, order = Inputs(tokens), Order()
    rows = [(torch.randint(9, (4,)) if tokens else torch.randn(4), torch.randn(1)) for _ in range(48)]
    settings: dict[str, Any] = {
        "max_duration": "12st",
        "per_device_batch_size": 4,
        "eval_interval": "5st",
        "log_interval": "4st",
        "max_grad_norm": 0.5,
        "output_dir": folder,
        "run_name": "a",
        "device": "cpu",
        "standard_callbacks": False,
    }
    config = TrainingConfig(**settings | given)
    saving = [] if any(isinstance(one, CheckpointCallback) for one in callbacks) else [CheckpointCallback(every="2st")]
    lost = [Forget(part=forgotten)] if forgotten else []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    everyone = [*callbacks, order, *saving, *lost]
    trainer = Trainer(
        model, config, rows, rows, loss=nn.MSELoss(), optimizer=optimizer, scheduler="constant", callbacks=everyone
    )
    trainer.train()
    return trainer, order


# -- the end of a run, in two sittings -----------------------------------------------------------------------------------------


@component
class Enough(Callback):
    """Ends the run after a step that nothing periodic but a save comes after."""

    at: int = option(default=6)
    had: bool = state(default=False)

    def on_run_start(self, ctx: CallbackContext) -> None:
        if self.had:
            ctx.stop("enough")

    def on_step_end(self, ctx: CallbackContext) -> None:
        if ctx.step == self.at:
            self.had = True
            ctx.stop("enough")


@component
class Crash(Callback):
    """Breaks the run off in its last log or evaluation, after everything that was to be saved has been."""

    where: str = option()

    @hook(tryfirst=True)
    def on_log(self, ctx: CallbackContext) -> None:
        if self.where == "log" and ctx.step == 6:
            raise Fell

    def on_evaluate_batch(self, ctx: CallbackContext) -> None:
        if self.where == "evaluation" and ctx.step == 6:
            raise Fell


@pytest.fixture(scope="module")
def ended(tmp_path_factory: Any) -> tuple[Trainer, Order]:
    """The uninterrupted run that stops after step 6, whose last checkpoint is from before its last log and evaluation."""
    return sitting(tmp_path_factory.mktemp("ended"), Enough())


def after_a_crash(folder: Path, where: str, forgotten: Part = ()) -> tuple[Trainer, Order]:
    with pytest.raises(Fell):
        sitting(folder, Enough(), Crash(where=where))
    assert find_checkpoints(folder / "a")[0].step == 6
    return sitting(folder, Enough(), forgotten=forgotten)


@pytest.mark.parametrize("where", ["log", "evaluation"])
def test_an_interrupted_end_is_made_up_for(tmp_path: Path, ended: Any, where: str) -> None:
    again, heard = after_a_crash(tmp_path, where)
    assert again.output.completed and again.ctx.step == 6
    for key in (("logged", 6), ("evaluated", 6)):
        assert heard.seen[key] == ended[1].seen[key]
    assert again.output.metrics == ended[0].output.metrics and again.output.metrics["train/grad_norm"] > 0


@pytest.mark.parametrize("item", ["losses", "grad_norm"])
def test_control_of_what_the_last_log_tells(tmp_path: Path, ended: Any, item: str) -> None:
    _, heard = after_a_crash(tmp_path, "log", ("unlogged", 0, item))
    assert heard.seen.get(("logged", 6)) != ended[1].seen["logged", 6]


def test_the_end_at_max_duration_is_evaluated_before_its_checkpoint(tmp_path: Path) -> None:
    """Killed after the last checkpoint, there is nothing left to do; killed in the last evaluation, its step is made once more."""
    whole, _ = sitting(tmp_path / "whole", max_duration="6st")
    with pytest.raises(Fell):
        sitting(tmp_path, Crash(where="evaluation"), max_duration="6st")
    assert find_checkpoints(tmp_path / "a")[0].step == 4
    again, heard = sitting(tmp_path, max_duration="6st")
    assert ("evaluated", 6) in heard.seen and again.output.metrics == whole.output.metrics
    more, nothing = sitting(tmp_path, max_duration="6st")
    assert nothing.seen == {} and more.output.metrics == whole.output.metrics


@pytest.mark.parametrize("part", [("evaluated_at",), ("metrics", "logged"), ("metrics", "eval")], ids=".".join)
def test_control_of_a_complete_run_started_again(tmp_path: Path, part: Part) -> None:
    whole, _ = sitting(tmp_path, max_duration="6st")
    again, heard = sitting(tmp_path, max_duration="6st", forgotten=("progress", *part))
    assert heard.seen or again.output.metrics != whole.output.metrics


# -- other items of the state: (what must be equal in the end, the item, the callbacks and settings of a sitting) --------------


@component
class Once(Callback):
    """A metric that only the first evaluation has."""

    @hook(tryfirst=True)
    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        if ctx.step == 5:
            ctx.eval_metrics["eval/once"] = 1.0


@component
class Named(Tracker):
    """A tracker whose run at a server has an id."""

    number: int | None = state(default=None)

    def start(self, ctx: CallbackContext) -> None:
        self.number = self.number or len(MADE) + 1
        MADE.append(self.number)

    def log(self, values: Any, step: int) -> None:
        pass


MADE: list[int] = []


@component
class Take(Callback):
    """Restores a state that was kept in memory."""

    saved: Any

    def on_restore(self, ctx: CallbackContext) -> None:
        ctx.load_state_dict(self.saved)


def tokens(folder: Path, forgotten: Part) -> Any:
    """A run that is measured in tokens, 16 a step."""
    given: dict[str, Any] = {"tokens": True, "max_duration": "160tok", "log_interval": "1st"}
    sitting(folder, Interrupt(at=5), **given)
    return sitting(folder, **given, forgotten=forgotten)[0].ctx.step


def a_metric_seen_once(folder: Path, forgotten: Part) -> Any:
    def watchers() -> list[Callback]:
        return [Once(), EarlyStoppingCallback(monitor="eval/once"), CheckpointCallback(best="eval/once")]

    sitting(folder, Interrupt(at=7), *watchers())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the other evaluations do not give it
        return sitting(folder, *watchers(), forgotten=forgotten)[0].ctx.step


def stopped_early(folder: Path, forgotten: Part) -> Any:
    def stopping() -> Callback:
        return EarlyStoppingCallback(monitor="train/lr", patience=1)

    assert sitting(folder, stopping())[0].ctx.step == 8
    return sitting(folder, stopping(), forgotten=forgotten)[0].ctx.step


def begun_elsewhere(folder: Path, forgotten: Part) -> Any:
    sitting(folder, max_duration="4st", run_name="before")
    given: dict[str, Any] = {"resume": str(folder / "before")}
    with pytest.warns(UserWarning, match="max_duration"):
        sitting(folder, Interrupt(at=7), **given)
    return sitting(folder, **given, forgotten=forgotten)[0].ctx.step


def longer_after_all(folder: Path, forgotten: Part) -> Any:
    """A complete run has the averages in the place of the weights; more steps go on from the weights."""
    short, _ = sitting(folder / "short", EmaCallback(decay=0.9, use_at_end=True), max_duration="6st")
    take = Take(saved=copy.deepcopy(short.state_dict()))
    with pytest.warns(UserWarning, match="max_duration"):
        trainer, _ = sitting(folder, EmaCallback(decay=0.9), take, forgotten=forgotten)
    return [p.tolist() for p in trainer.model.parameters()]


def at_a_server(folder: Path, forgotten: Part) -> Any:
    MADE.clear()
    sitting(folder, Interrupt(at=7), LoggingCallback(trackers=[Named()]))
    sitting(folder, LoggingCallback(trackers=[Named()]), forgotten=forgotten)
    return MADE


SCENARIOS: dict[Part, tuple[Function[[Path, Part], Any], Any]] = {
    ("progress", "tokens"): (tokens, 10),
    ("components", "callback:EarlyStoppingCallback", "looked_at"): (a_metric_seen_once, 12),
    ("components", "callback:CheckpointCallback", "metric_seen"): (a_metric_seen_once, 12),
    ("components", "callback:EarlyStoppingCallback", "stopped"): (stopped_early, 8),
    ("components", "callback:CheckpointCallback", "started_from"): (begun_elsewhere, 12),
    ("components", "callback:EmaCallback", "weights"): (longer_after_all, None),
    ("components", "callback:LoggingCallback", "trackers"): (at_a_server, [1, 1]),
}


@pytest.mark.parametrize("part", SCENARIOS, ids=".".join)
def test_with_and_without_an_item(tmp_path: Path, part: Part) -> None:
    scenario, expected = SCENARIOS[part]
    if expected is None:  # the weights of the uninterrupted run
        whole, _ = sitting(tmp_path / "whole", EmaCallback(decay=0.9))
        expected = [p.tolist() for p in whole.model.parameters()]
    assert scenario(tmp_path / "with", ()) == expected
    try:
        found = scenario(tmp_path / "without", part)
    except DrivetrainError as error:  # noticed, which is as good
        found = str(error)
    assert found != expected


# -- the loss's meter ----------------------------------------------------------------------------------------------------------


@component
class Each(Callback):
    """Reads the loss of each step."""

    def __attrs_post_init__(self) -> None:
        self.losses: list[float] = []

    def on_step_end(self, ctx: CallbackContext) -> None:
        self.losses.append(ctx.loss)


@pytest.mark.parametrize("forgotten", [(), ("unlogged", 0, "folded")], ids=str)
def test_a_log_after_many_steps_is_the_mean_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: Part) -> None:
    """Also where most of them are kept as a sum; the expected mean is Python's."""
    monkeypatch.setattr(loop, "_MOST_LOSSES", 5)
    each, given = [Each(), Each()], {"log_interval": "100st", "eval_interval": None, "max_duration": "12st"}
    sitting(tmp_path, Interrupt(at=8), each[0], **given)
    _, heard = sitting(tmp_path, each[1], forgotten=forgotten, **given)
    mean = sum(each[0].losses + each[1].losses) / 12
    assert (heard.seen["logged", 12]["train/loss"] == pytest.approx(mean, rel=1e-6)) is (forgotten == ())


@component
class Overflow(Callback):
    """Gradients without a number after some steps; interrupts the run after so many of them."""

    interrupt: int = option(default=0)
    count: int = 0

    def on_loss(self, ctx: CallbackContext) -> None:
        if ctx.step == 2:
            self.count += 1
            ctx.microbatch_loss = ctx.microbatch_loss * float("nan")
            if self.count == self.interrupt:
                ctx.trainer.stop("interrupted")


@pytest.mark.parametrize("forgotten", [(), ("unlogged", 0, "consecutive_skips")], ids=str)
def test_overflows_in_a_row_are_counted_over_an_interruption(tmp_path: Path, forgotten: Part) -> None:
    given: dict[str, Any] = {"precision": "fp16", "max_duration": "50ep"}
    sitting(tmp_path, Overflow(interrupt=60), **given)
    second = Overflow()
    with pytest.raises(RunError, match="100 steps in a row"):
        sitting(tmp_path, second, forgotten=forgotten, **given)
    assert (second.count == 40) is (forgotten == ())
