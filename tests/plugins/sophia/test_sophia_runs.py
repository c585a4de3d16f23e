"""sophia and sophia_h by name in whole runs of the Trainer."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from drivetrain import (
    Callback,
    CallbackContext,
    ConfigError,
    Loss,
    ModelError,
    Precision,
    Trainer,
    TrainingConfig,
    component,
    make_component,
    option,
)
from drivetrain_sophia import Sophia, SophiaGComponent
from drivetrain_testing import Check, Restore, conformance, state_after, weights


class Language(nn.Module):
    """Predicts the next token; what it returns for a batch with labels is up to `style`."""

    def __init__(self, style: str = "loss") -> None:
        super().__init__()
        self.style = style
        self.embed, self.head = nn.Embedding(12, 16), nn.Linear(16, 12)
        self.hidden, self.dropout = nn.Linear(16, 16), nn.Dropout(0.05)
        self.calls: list[bool] = []

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        self.calls.append(labels is not None)
        logits = self.head(self.dropout(self.hidden(self.embed(input_ids)).tanh()))
        if labels is None:
            return {"logits": logits} if self.style == "nothing" else logits
        loss = Loss(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), (labels != -100).sum())
        if self.style == "logits":
            return SimpleNamespace(loss=loss, logits=logits)
        return loss


def token_data(rows: int = 48) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 12, (rows, 9), generator=torch.Generator().manual_seed(5))
    ids = torch.cat([ids[:, :1], (ids[:, :-1] * 5 + 1) % 12], dim=1)  # the first 8 are followed by what they determine
    labels = (ids[:, :-1] * 5 + 1) % 12
    labels[::3, 5:] = -100
    return [{"input_ids": x, "labels": y} for x, y in zip(ids[:, :-1], labels, strict=True)]


def class_data() -> TensorDataset:
    inputs = torch.randn(96, 6, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, inputs[:, :4].argmax(dim=1))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.05), nn.Linear(16, 4))


def make_trainer(
    spec: Any, *callbacks: Callback, model: Any = None, data: Any = None, steps: int = 60, **given: Any
) -> Trainer:
    if model is None:
        model = classifier()
        data, given = class_data(), {"loss": nn.CrossEntropyLoss()} | given
    config = TrainingConfig(
        max_duration=f"{steps}st",
        per_device_batch_size=8,
        gradient_accumulation_steps=2,
        log_interval="1st",
        standard_callbacks=False,
    )
    options: dict[str, Any] = {"scheduler": lambda position: 1 / (1 + 0.02 * position), "precision": Precision()}
    return Trainer(model, config, data, optimizer=spec, callbacks=callbacks, **(options | given))


SPECS: list[dict[str, Any]] = [
    {"use": "sophia", "lr": 2e-2, "update_interval": 4, "gamma": 2.0},
    {"use": "sophia_h", "lr": 2e-2, "update_interval": 4, "gamma": 2.0},
    {"use": "sophia_h", "lr": 2e-2, "update_interval": 4, "gamma": 2.0, "product": "double_backward"},
]


def label(spec: dict[str, Any]) -> str:
    return f"{spec['use']}-{spec.get('product', '')}"


@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_the_loss_of_a_classifier_falls_and_the_win_rate_is_logged(spec: dict[str, Any]) -> None:
    seen: dict[int, float] = {}

    @component
    class Watch(Callback):
        def on_log(self, ctx: CallbackContext) -> None:
            if "train/sophia_win_rate" in ctx.metrics:
                seen[ctx.step] = ctx.metrics["train/sophia_win_rate"]

    trainer = make_trainer(spec, Watch())
    losses = [loss for _, loss in trainer.train().losses]
    assert type(trainer.ctx.optimizer) is Sophia
    assert sum(losses[-6:]) < 0.4 * sum(losses[:6])
    assert list(seen) == [step + 1 for step in range(0, 60, 4)]
    assert 0 < sum(seen.values()) / len(seen) < 0.9


@pytest.mark.parametrize(("style", "calls"), [("loss", [True, False]), ("logits", [True])])
def test_a_language_model_trains_whatever_it_returns_with_labels(style: str, calls: list[bool]) -> None:
    model = Language(style)
    trainer = make_trainer(SPECS[0], model=model, data=token_data())
    losses = [loss for _, loss in trainer.train().losses]
    assert sum(losses[-6:]) < 0.5 * sum(losses[:6])
    assert model.calls[: 2 * len(calls)] == calls * 2  # the first estimate: once or twice for each of two microbatches


def test_sophia_h_trains_a_regression() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    inputs = class_data().tensors[0]
    data = TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
    losses = [loss for _, loss in make_trainer(SPECS[1], model=model, data=data, loss=F.mse_loss).train().losses]
    assert sum(losses[-6:]) < 0.3 * sum(losses[:6])


SAMPLED = {"two_ranks_equal_one": "each rank samples labels of its own"}


@conformance(
    make_component("optimizer", SPECS[0]), model=classifier, data=class_data, loss=F.cross_entropy, unsupported=SAMPLED
)
def test_conformance_of_sophia_g(check: Check) -> None:
    check()


@conformance(make_component("optimizer", SPECS[1]), model=classifier, data=class_data, loss=F.cross_entropy)
def test_conformance_of_sophia_h(check: Check) -> None:
    check()


# -- what the estimate may touch


@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_the_trainings_random_numbers_are_left_alone(spec: dict[str, Any]) -> None:
    """Whether the curvature is estimated in every step or once, the run ends in the same random state."""
    states = []

    @component
    class Watch(Callback):
        def on_step_end(self, ctx: CallbackContext) -> None:
            states.append(torch.get_rng_state())

    for interval in (1, 1000):
        make_trainer(spec | {"update_interval": interval}, Watch(), steps=5).train()
    assert all(torch.equal(a, b) for a, b in zip(states[:5], states[5:], strict=True))
    assert not torch.equal(states[0], states[1]), "control: dropout draws in each step"


class NoReads(TorchDispatchMode):
    """Refuses what would wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} reads a value from the device")
        return func(*args, **(kwargs or {}))


@component
class Guard(Callback):
    """Runs the optimizer's own events again under `NoReads`."""

    def on_step_start(self, ctx: CallbackContext) -> None:
        ctx.run.single["optimizer"].estimated_at = -1  # type: ignore[attr-defined]
        with NoReads():
            ctx.run.single["optimizer"].on_step_start(ctx)  # type: ignore[attr-defined]

    def on_optimizer_step(self, ctx: CallbackContext) -> None:
        with NoReads():
            ctx.run.single["optimizer"].on_optimizer_step(ctx)  # type: ignore[attr-defined]


@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_nothing_waits_for_the_device(spec: dict[str, Any]) -> None:
    make_trainer(spec | {"update_interval": 1}, Guard(), steps=2).train()
    with pytest.raises(AssertionError, match="reads a value"), NoReads():
        torch.ones(()).item()  # control


# -- resume


@component
class Keep(Callback):
    """Takes a copy of the state at the start of a step, where a checkpoint plugin saves what was best."""

    at: int = option()

    def on_step_start(self, ctx: CallbackContext) -> None:
        if ctx.step == self.at and not hasattr(self, "saved"):
            self.saved = deepcopy(ctx.state_dict())


@pytest.mark.parametrize("at", [3, 4, 6])
@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_a_restored_run_ends_bit_equal(spec: dict[str, Any], at: int) -> None:
    straight = make_trainer(spec, steps=14)
    straight.train()
    saved = state_after(make_trainer(spec, steps=14), at)
    rest = make_trainer(spec, Restore(saved=saved), steps=14)
    rest.train()
    assert torch.equal(weights(rest), weights(straight))
    for state in saved["optimizer"]["state"].values():
        state["hessian"].mul_(2)
    other = make_trainer(spec, Restore(saved=saved), steps=14)
    other.train()
    assert not torch.equal(weights(other), weights(straight)), "control: the curvature matters"


@pytest.mark.parametrize("at", [4, 5])
def test_a_state_saved_between_estimate_and_step_goes_on_bit_equal(at: int) -> None:
    """At step 4 the curvature has just been averaged in: doing it again would count it twice."""
    keep = Keep(at=at)
    straight = make_trainer(SPECS[0], keep, steps=14)
    straight.train()
    rest = make_trainer(SPECS[0], Restore(saved=keep.saved), steps=14)
    rest.train()
    assert torch.equal(weights(rest), weights(straight))
    forgetful = deepcopy(keep.saved)
    forgetful["components"]["optimizer:sophia"]["estimated_at"] = -1
    other = make_trainer(SPECS[0], Restore(saved=forgetful), steps=14)
    other.train()
    assert torch.equal(weights(other), weights(straight)) == (at == 5)


def test_a_step_left_out_for_overflow_estimates_once() -> None:
    class Overflow(Precision):
        scales, left = True, 2

        def step(self, optimizer: torch.optim.Optimizer) -> bool:
            self.left -= 1
            if self.left >= 0:
                return False
            optimizer.step()
            return True

    calls = []

    @component
    class Counting(SophiaGComponent):
        def estimate(self, ctx: CallbackContext) -> list[Tensor | None]:
            calls.append(ctx.step)
            return super().estimate(ctx)

    make_trainer(Counting(update_interval=2), steps=3, precision=Overflow()).train()
    assert calls == [0, 2]


# -- errors


@pytest.mark.parametrize(
    ("model", "data", "given", "message"),
    [
        (nn.Linear(3, 1), [torch.ones(3)] * 8, {"loss": lambda y, x: y.mean()}, "the model gives one number"),
        (nn.Linear(3, 2), [(torch.ones(3), torch.ones(2))] * 8, {"loss": F.mse_loss}, "labels are not integers.*use sophia_h"),
        (
            nn.Linear(3, 2),
            [{"a": torch.ones(3)}] * 8,
            {"step": lambda model, batch: model(batch["a"]).mean()},
            None,
        ),
    ],
)
def test_what_sophia_g_cannot_use_is_said_before_the_first_step(model: Any, data: Any, given: Any, message: str | None) -> None:
    trainer = make_trainer("sophia", model=model, data=data, **given)
    with pytest.raises((ModelError, TypeError), match=message):
        trainer.train()
    assert trainer.ctx.step == 0


def test_a_model_without_logits_is_told_what_is_needed() -> None:
    class OnlyLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            return (x * self.weight).sum()

    data = [{"x": torch.ones(3), "labels": torch.tensor(1)}] * 8
    with pytest.raises(ModelError, match=r"the model returns none\. It must return logits .* override logits_and_labels"):
        make_trainer("sophia", model=OnlyLoss(), data=data).train()
    make_trainer("sophia_h", model=OnlyLoss(), data=data, steps=2).train()


def test_a_subclass_may_say_where_logits_are() -> None:
    @component
    class Own(SophiaGComponent):
        def logits_and_labels(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
            return model(batch["a"]), batch["class"]

    data = [{"a": x, "class": y} for x, y in zip(*class_data().tensors, strict=True)]
    model = nn.Linear(6, 4)
    losses = make_trainer(
        Own(lr=0.05), model=model, data=data, step=lambda model, batch: F.cross_entropy(model(batch["a"]), batch["class"])
    ).train()
    assert losses.losses[-1][1] < 0.6 * losses.losses[0][1]


def test_coarse_weights_cannot_be_differentiated_by_differences() -> None:
    model, data = nn.Linear(6, 4).bfloat16(), class_data()
    with pytest.raises(ConfigError, match=r"optimizer\.sophia_h\.product: 'difference' needs weights in float32"):
        make_trainer("sophia_h", model=model, data=data, loss=nn.CrossEntropyLoss())


@pytest.mark.parametrize(
    ("options", "path", "message"),
    [
        ({"lr": -1.0}, ".lr", "must be at least 0, got -1.0"),
        ({"betas": [0.9, 1.0]}, ".betas", "must be at least 0 and below 1, got 1.0"),
        ({"update_interval": 0}, ".update_interval", "must be at least 1, got 0"),
        ({"update_interval": 2.5}, ".update_interval", "expected a whole number"),
        ({"rho": 0.05}, ".rho", "unknown key."),
        ({"product": "exact"}, ".product", "expected one of 'difference', 'double_backward'"),
    ],
)
def test_wrong_options_are_named_with_their_path(options: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_component("optimizer", {"use": "sophia_h", **options}, "optimizer")
    (problem,) = caught.value.problems
    assert problem.path == f"optimizer.sophia_h{path}"
    assert problem.message.startswith(message)


def test_the_docstrings_cite_their_source() -> None:
    for name in ("sophia", "sophia_h"):
        text = type(make_component("optimizer", name)).__doc__ or ""
        assert "arXiv:2305.14342, algorithms" in text
