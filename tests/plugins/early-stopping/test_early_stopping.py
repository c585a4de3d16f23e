"""Early stopping, through real runs whose metric follows a script."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from drivetrain import Callback, ConfigError, DrivetrainError, Trainer, TrainingConfig, component, make_component
from drivetrain_early_stopping import EarlyStoppingCallback

NAN = math.nan


@component
class Script(Callback):
    """Give evaluation k the value `values[k]`, so that the right answer can be read off."""

    values: list[float]

    def on_evaluate_end(self, ctx: Any) -> None:
        ctx.eval_metrics["eval/score"] = self.values[ctx.step - 1]

    def on_step_end(self, ctx: Any) -> None:
        ctx.log({"train/score": self.values[ctx.step - 1]})


@component
class Restore(Callback):
    """Stands for a checkpoint plugin."""

    saved: dict[str, Any]

    def on_restore(self, ctx: Any) -> None:
        ctx.load_state_dict(self.saved)


def trainer(values: list[float], *callbacks: Callback, evaluated: bool = True, **options: Any) -> Trainer:
    """A step, a log and an evaluation for each value."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    data = [(torch.randn(2), torch.randn(1)) for _ in range(4)]
    given = {"max_duration": f"{len(values)}st", "eval_interval": "1st", "log_interval": "1st", "per_device_batch_size": 2}
    config = TrainingConfig(**{**given, "standard_callbacks": False, **options})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    chain = (Script(values=values), *callbacks)
    return Trainer(
        model, config, data, data if evaluated else None, loss=nn.functional.mse_loss, optimizer=optimizer, callbacks=chain
    )


def stopping(**options: Any) -> EarlyStoppingCallback:
    return EarlyStoppingCallback(**{"monitor": "eval/score", "patience": 2, **options})


@pytest.mark.parametrize(
    ("options", "values", "steps"),
    [
        ({}, [5, 4, 3, 3, 3, 2], 5),  # the same value is no improvement
        ({}, [5, 6, 4, 5, 3, 4, 2], 7),  # one miss at a time is within the patience
        ({"patience": 1}, [5, 4, 5, 1], 3),
        ({"mode": "max"}, [1, 2, 3, 2, 2, 9], 5),
        ({"mode": "max"}, [3, 2, 1, 9], 3),
        ({"min_delta": 0.5}, [5.0, 4.75, 4.5, 1.0], 3),  # 4.5 is better by 0.5, not by more than it
        ({"min_delta": 0.5}, [5.0, 4.75, 4.25, 4.0, 3.75, 1.0], 5),  # measured from the best, 5.0, and then 4.25
        ({"baseline": 3.0}, [5, 4, 2, 1], 2),
        ({"baseline": 3.0}, [5, 2, 2.5, 1.5], 4),
        ({"mode": "max", "baseline": 3.0}, [1, 2, 9], 2),
        ({}, [NAN, NAN, 1], 2),  # NaN is never an improvement, not even the first time
        ({}, [5, NAN, NAN, 1], 3),
        ({}, [NAN, 5, NAN, 4, NAN, 3], 6),  # and what follows is not compared with it
        ({"mode": "max"}, [1, NAN, NAN, 2], 3),
        ({}, [math.inf, 5, math.inf, 4], 4),
        ({}, [1, 2], 2),
    ],
)
def test_the_step_at_which_a_run_ends(options: dict[str, Any], values: list[float], steps: int) -> None:
    callback = stopping(**options)
    output = trainer(values, callback).train()
    assert output.steps == steps
    assert output.completed
    assert (callback.stopped is not None) == output.stop_reason.startswith("early stopping")


def test_the_reason_can_be_read() -> None:
    output = trainer([1.75, 1.5, 1.7, 1.6, 0], stopping(min_delta=0.01)).train()
    expected = (
        "early stopping: eval/score did not improve on its best 1.5 of step 2 by more than 0.01 the last 2 times (now 1.6)"
    )
    assert output.stop_reason == expected
    output = trainer([4, 1], stopping(baseline=3, patience=1)).train()
    assert output.stop_reason == "early stopping: eval/score did not improve on the baseline 3 the last time (now 4)"
    output = trainer([NAN, NAN, 1], stopping()).train()
    assert output.stop_reason == "early stopping: eval/score was NaN the last 2 times"


def test_a_metric_of_the_log_is_looked_at_when_it_is_logged() -> None:
    output = trainer([3, 2, 4, 5, 1], stopping(monitor="train/score"), eval_interval=False).train()
    assert output.steps == 4


def test_a_value_that_is_logged_now_and_then_is_counted_when_it_comes() -> None:
    @component
    class Sometimes(Callback):
        def on_step_end(self, ctx: Any) -> None:
            if ctx.step % 3 == 1:
                ctx.log({"train/rare": float(ctx.step)})

    output = trainer([0.0] * 12, Sometimes(), stopping(monitor="train/rare"), eval_interval=False).train()
    assert output.steps == 7  # best at 1, misses at 4 and 7


def test_the_same_weights_are_not_counted_twice() -> None:
    run = trainer([5, 6, 4, 1], stopping())
    steps = []
    for step in run.steps():
        run.evaluate()
        steps.append(step.number)
    assert steps == [1, 2, 3, 4], "a miss at step 2 is one miss"


@pytest.mark.parametrize(
    ("monitor", "options", "said"),
    [
        (
            "eval/scor",
            {},
            r"'eval/scor' to monitor; the evaluation gives eval/loss, eval/score\. Did you mean 'eval/score'",
        ),
        ("train/los", {}, r"'train/los' to monitor; the log has .*train/loss, .*Did you mean 'train/loss'"),
        ("eval/score", {"eval_interval": False}, "eval_interval is false"),
    ],
)
def test_a_metric_that_does_not_exist_is_an_error_at_the_first_chance(monitor: str, options: dict[str, Any], said: str) -> None:
    run = trainer([1, 2, 3, 4], stopping(monitor=monitor), **options)
    with pytest.raises(DrivetrainError, match=said):
        run.train()
    assert run.ctx.step <= 1


def test_a_run_without_evaluation_data_is_refused_at_its_start() -> None:
    run = trainer([1, 2, 3], stopping(), evaluated=False)
    with pytest.raises(DrivetrainError, match="watches eval/score, but the run has no evaluation data"):
        run.train()
    assert run.ctx.step == 0, "not when it has gone on for days"


@component
class Later(Callback):
    """A callback after the early stopping that adds what it watches."""

    def on_evaluate_end(self, ctx: Any) -> None:
        ctx.eval_metrics["eval/later"] = 1.0

    def on_log(self, ctx: Any) -> None:
        ctx.metrics["train/later"] = 1.0


@pytest.mark.parametrize("monitor", ["eval/later", "train/later"])
def test_what_a_later_callback_adds_can_be_watched(monitor: str) -> None:
    run = trainer([1, 2, 3, 4], stopping(monitor=monitor), Later())
    run.train()
    assert "early stopping: " + monitor in str(run.ctx.stop_reason)


def test_the_count_goes_on_after_a_resume() -> None:
    """One miss before the break and one after it make two."""
    values = [5, 3, 4, 4, 1, 1]
    whole = trainer(values, stopping())
    whole.train()
    first = trainer(values, stopping())
    for step in first.steps():
        if step.number == 3:
            break
    callback = stopping()
    again = trainer(values, callback, Restore(saved=first.ctx.state_dict()))
    output = again.train()
    assert output.steps == whole.ctx.step == 4
    assert (callback.best, callback.best_step, callback.misses) == (3, 2, 2)
    assert output.stop_reason == whole.output.stop_reason


def test_a_run_that_stopped_stays_stopped_when_it_is_resumed() -> None:
    values = [5, 6, 6, 1, 1, 1]
    first = trainer(values, stopping())
    first.train()
    again = trainer(values, stopping(), Restore(saved=first.ctx.state_dict()))
    output = again.train()
    assert first.ctx.step == output.steps == 3, "not one step more"
    assert output.stop_reason == first.output.stop_reason


def test_more_patience_lets_a_stopped_run_go_on() -> None:
    values = [5, 6, 6, 1, 2, 2, 2, 2]
    first = trainer(values, stopping())
    first.train()
    callback = stopping(patience=4)
    output = trainer(values, callback, Restore(saved=first.ctx.state_dict())).train()
    assert output.steps == 8 and callback.best == 1


def test_all_ranks_decide_by_the_same_value() -> None:
    """A value of the log is this rank's own. The strategy here stands for two ranks, the other of which sees 10 each time."""
    run = trainer([3, 2, 1, 0, 0], stopping(monitor="train/score"), eval_interval=False)
    run.ctx.strategy.world_size = 2
    summed: list[float] = []

    def both(value: torch.Tensor) -> torch.Tensor:
        if value.numel() != 2:  # what the engine itself agrees on
            return value
        summed.append(float(value[0]))
        return value + torch.tensor([10.0, 1.0])

    run.ctx.strategy.sum = both  # type: ignore[method-assign]
    run.train()
    assert [value for value in summed if value in (0, 1, 2, 3)] == [3, 2, 1, 0, 0]
    assert next(c for c in run._run.components if isinstance(c, EarlyStoppingCallback)).best == 5


def test_a_rank_that_has_not_logged_the_value_asks_for_it_all_the_same() -> None:
    """Or the others would wait for it for ever. Here another rank has it, as 4 each time, and this one has not."""
    run = trainer([1, 2, 3, 4, 5], stopping(monitor="train/other"), eval_interval=False)
    run.ctx.strategy.world_size = 2
    run.ctx.strategy.sum = lambda value: value + torch.tensor([4.0, 1.0]) if value.numel() == 2 else value  # type: ignore[method-assign]
    run.train()
    watcher = next(c for c in run._run.components if isinstance(c, EarlyStoppingCallback))
    assert (watcher.best, watcher.best_step) == (4, 1) and run.ctx.stop_reason is not None


@pytest.mark.parametrize(
    ("option", "said"),
    [({"patience": 0}, "at least 1"), ({"min_delta": -0.1}, "at least 0"), ({"mode": "mim"}, "Did you mean 'min'")],
)
def test_options_are_checked(option: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        make_component("callback", {"use": "early_stopping", **option}, "callbacks[0]")
    assert raised.value.problems[0].path.startswith("callbacks[0].early_stopping")


def test_it_is_the_name_in_the_documented_interface() -> None:
    import drivetrain

    assert drivetrain.EarlyStoppingCallback is EarlyStoppingCallback
