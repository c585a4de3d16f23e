"""schedulefree_adamw and schedulefree_sgd by name in whole runs of the Trainer: which weights are where, and when."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drivetrain import (
    Callback,
    CallbackContext,
    ConfigError,
    Trainer,
    component,
    hook,
    make_component,
    option,
)
from drivetrain_schedulefree import ScheduleFree, ScheduleFreeAdamW, ScheduleFreeSGD
from drivetrain_testing import Check, Restore, conformance, tiny_data, tiny_trainer, weights

SPECS: list[dict[str, Any]] = [{"use": "schedulefree_adamw", "lr": 2e-2}, {"use": "schedulefree_sgd", "lr": 0.3}]


def make_trainer(spec: Any, *callbacks: Callback, steps: int = 60, evaluate: str | None = None, **given: Any) -> Trainer:
    given = {"scheduler": lambda position: min(1.0, (position + 1) / 5), "eval_dataset": held_out()} | given
    return tiny_trainer(*callbacks, optimizer=spec, steps=steps, eval_interval=evaluate or False, **given)


def held_out() -> TensorDataset:
    return tiny_data(seed=2, rows=32)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def average(optimizer: Any) -> Tensor:
    """x from the y in the parameters and the z in the state."""
    pairs = [(p, optimizer.state[p]["z"], g) for g in optimizer.param_groups for p in g["params"]]
    beta = [g["betas"][0] if "betas" in g else g["momentum"] for _, _, g in pairs]
    found = {id(p): ((p.detach() - (1 - b) * z) / b).reshape(-1) for (p, z, _), b in zip(pairs, beta, strict=True)}
    return found  # type: ignore[return-value]


@conformance(*(make_component("optimizer", spec) for spec in SPECS))
def test_conformance(check: Check) -> None:
    check()


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s["use"])
def test_the_loss_falls(spec: dict[str, Any]) -> None:
    trainer = make_trainer(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = [loss for _, loss in trainer.train().losses]
    assert type(trainer.ctx.optimizer) in (ScheduleFreeAdamW, ScheduleFreeSGD)
    assert sum(losses[-6:]) < 0.3 * sum(losses[:6])


@component
class Watch(Callback):
    """Keeps the weights as others see them, and the averages computed from the optimizer's state."""

    def __attrs_post_init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def _keep(self, name: str, ctx: CallbackContext) -> None:
        self.seen[name] = flat(ctx.model)

    def on_step_end(self, ctx: CallbackContext) -> None:
        self._keep(f"step {ctx.step}", ctx)
        found = average(ctx.optimizer)
        self.seen[f"x {ctx.step}"] = torch.cat([found[id(p)] for p in ctx.model.parameters()])  # type: ignore[call-overload]

    def on_evaluate_start(self, ctx: CallbackContext) -> None:
        self._keep(f"evaluate {ctx.step}", ctx)

    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        self._keep(f"evaluated {ctx.step}", ctx)

    def on_step_start(self, ctx: CallbackContext) -> None:
        self._keep(f"next {ctx.step}", ctx)

    @hook(tryfirst=True)
    def on_run_end(self, ctx: CallbackContext) -> None:
        self._keep("end", ctx)
        self.saved = deepcopy(ctx.state_dict())


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s["use"])
def test_evaluation_and_the_result_are_the_average_and_training_goes_on_from_y(spec: dict[str, Any]) -> None:
    watch = Watch()
    trainer = make_trainer(spec, watch, steps=12, evaluate="5st")
    trainer.train()
    seen = watch.seen
    for name in ("evaluate 5", "evaluated 5"):
        torch.testing.assert_close(seen[name], seen["x 5"], rtol=1e-4, atol=1e-5)
    assert torch.equal(seen["next 5"], seen["step 5"]), "back to y, bit by bit"
    torch.testing.assert_close(seen["end"], seen["x 12"], rtol=1e-4, atol=1e-5)
    assert torch.equal(weights(trainer), seen["end"])
    assert (seen["step 5"] - seen["x 5"]).abs().max() > 1e-3, "control: the points differ"
    plain = make_trainer(spec, steps=12)
    plain.train()
    assert torch.equal(weights(plain), weights(trainer)), "evaluation leaves no trace"


def test_evaluation_before_and_after_the_run_is_of_what_the_model_holds() -> None:
    trainer = make_trainer(SPECS[0], steps=6)
    before = weights(trainer)
    trainer.evaluate()
    assert torch.equal(weights(trainer), before)
    trainer.train()
    result = weights(trainer)
    metrics = trainer.evaluate()
    assert torch.equal(weights(trainer), result)
    inputs, targets = held_out().tensors
    expected = nn.functional.mse_loss(trainer.model.eval()(inputs), targets).item()
    assert metrics["eval/loss"] == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_that_fails_leaves_the_average_as_the_result() -> None:
    @component
    class Fail(Callback):
        def on_evaluate_batch(self, ctx: CallbackContext) -> None:
            raise ZeroDivisionError

    trainer = make_trainer(SPECS[0], Fail(), steps=6, evaluate="5st")
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    optimizer = trainer.ctx.optimizer
    assert isinstance(optimizer, ScheduleFree)
    assert optimizer.averaged


# -- resume


@component
class Keep(Callback):
    """Takes a copy of the state in some event of step `at`."""

    event: str = option()
    at: int = option(default=5)

    def _keep(self, event: str, ctx: CallbackContext) -> None:
        if event == self.event and ctx.step == self.at:
            self.saved = deepcopy(ctx.state_dict())

    def on_step_start(self, ctx: CallbackContext) -> None:
        self._keep("step_start", ctx)

    def on_step_end(self, ctx: CallbackContext) -> None:
        self._keep("step_end", ctx)

    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        self._keep("evaluate_end", ctx)


@pytest.mark.parametrize("event", ["step_start", "step_end", "evaluate_end"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s["use"])
def test_a_state_of_any_moment_goes_on_bit_equal(spec: dict[str, Any], event: str) -> None:
    """In `on_evaluate_end` the model holds the average, and the optimizer's part the rest."""
    keep = Keep(event=event)
    straight = make_trainer(spec, keep, steps=14, evaluate="5st")
    straight.train()
    rest = make_trainer(spec, Restore(saved=keep.saved), steps=14, evaluate="5st")
    rest.train()
    assert torch.equal(weights(rest), weights(straight))
    for state in keep.saved["optimizer"]["state"].values():
        state["z"].mul_(0.9)
    other = make_trainer(spec, Restore(saved=keep.saved), steps=14, evaluate="5st")
    other.train()
    assert not torch.equal(weights(other), weights(straight)), "control: z matters"


@pytest.mark.filterwarnings("ignore:the run goes on with changes")  # a longer max_duration
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s["use"])
def test_the_state_of_a_runs_end_holds_the_result_and_a_longer_run_goes_on_from_it(spec: dict[str, Any]) -> None:
    watch, straight = Watch(), make_trainer(spec, steps=14)
    straight.train()
    short = make_trainer(spec, watch, steps=7)
    short.train()
    assert torch.equal(torch.cat([t.reshape(-1) for t in watch.saved["model"].values()]), weights(short))
    longer = make_trainer(spec, Restore(saved=watch.saved), steps=14)
    longer.train()
    assert torch.equal(weights(longer), weights(straight))


def test_a_second_sitting_goes_on_from_y() -> None:
    straight = make_trainer(SPECS[0], steps=14)
    straight.train()
    trainer = make_trainer(SPECS[0], steps=14)
    for step in trainer.steps():
        if step.number == 7:
            break
    trainer.train()
    assert torch.equal(weights(trainer), weights(straight))


# -- schedules and options


def test_a_falling_rate_gives_one_warning() -> None:
    with pytest.warns(
        UserWarning, match=r"schedulefree_adamw: the learning rate falls at step 4.* set scheduler = 'constant'"
    ) as said:
        make_trainer(SPECS[0], steps=8, scheduler=lambda position: 1.0 if position < 3 else 1 / position).train()
    assert len(said) == 1


def test_options_reach_the_optimizer() -> None:
    adamw = make_trainer({"use": "schedulefree_adamw", "lr": 0.5, "betas": [0.7, 0.8], "eps": 1e-3, "weight_decay": 0.2})
    found = [(g["lr"], g["betas"], g["eps"], g["weight_decay"]) for g in adamw.ctx.optimizer.param_groups]
    assert found == [(0.5, (0.7, 0.8), 1e-3, 0.2), (0.5, (0.7, 0.8), 1e-3, 0.0)]
    sgd = make_trainer({"use": "schedulefree_sgd", "momentum": 0.5, "groups": [{"match": "*", "lr": 2.0}]})
    assert [(g["lr"], g["momentum"]) for g in sgd.ctx.optimizer.param_groups] == [(2.0, 0.5)]


@pytest.mark.parametrize(
    ("spec", "path", "message"),
    [
        ({"use": "schedulefree_adamw", "lr": -1.0}, ".lr", "must be at least 0, got -1.0"),
        ({"use": "schedulefree_adamw", "betas": [0.0, 0.9]}, ".betas", "the first must be above 0, got 0.0"),
        ({"use": "schedulefree_adamw", "betas": [0.9, 1.0]}, ".betas", "must be at least 0 and below 1, got 1.0"),
        ({"use": "schedulefree_adamw", "warmup": 10}, ".warmup", "unknown key."),
        ({"use": "schedulefree_sgd", "momentum": 0.0}, ".momentum", "must be above 0 and below 1, got 0.0"),
    ],
)
def test_wrong_options_are_named_with_their_path(spec: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_component("optimizer", spec, "optimizer")
    (problem,) = caught.value.problems
    assert problem.path == f"optimizer.{spec['use']}{path}"
    assert problem.message.startswith(message)


def test_the_docstrings_cite_their_source() -> None:
    for spec in SPECS:
        assert "arXiv:2405.15682" in (type(make_component("optimizer", spec)).__doc__ or "")
