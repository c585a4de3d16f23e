"""Auxiliary gradients: a second forward and backward beside the training's own, for optimizers that need more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drivetrain import Callback, CallbackContext, Loss, ModelError, Precision, Trainer, TrainingConfig, component


@pytest.fixture(autouse=True)
def core_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVETRAIN_PLUGINS", "off")


@component
class Auxiliary(Callback):
    """Calls a function in every `on_step_start` and keeps what it returns."""

    function: Any

    def on_step_start(self, ctx: CallbackContext) -> None:
        self.found = [*getattr(self, "found", []), self.function(ctx)]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2))


def make_data(size: int = 7) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(size, 3, generator=generator), torch.randint(0, 2, (size,), generator=generator))


def run(
    function: Callable[[CallbackContext], Any] | None, model: nn.Module | None = None, **given: Any
) -> tuple[nn.Module, Any]:
    """Train one epoch of seven samples in windows of 2 + 2 + 2 + 1; returns the model and what `function` gave."""
    model = make_model() if model is None else model
    config = TrainingConfig(
        max_duration="1ep",
        per_device_batch_size=2,
        gradient_accumulation_steps=4,
        dataloader={"shuffle": False},
        standard_callbacks=False,
        max_grad_norm=None,
    )
    callbacks = [] if function is None else [Auxiliary(function=function)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"loss": nn.CrossEntropyLoss(), "optimizer": optimizer, "callbacks": callbacks} | given
    Trainer(model, config, make_data(), **options).train()
    return model, callbacks[0].found if callbacks else None


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def test_a_step_function_gets_model_and_batch_and_its_loss_is_weighted() -> None:
    seen: list[Any] = []

    def squares(model: nn.Module, batch: Any) -> Loss:
        seen.append(batch[0].shape[0])
        outputs = model.eval()(batch[0])
        model.train()
        return Loss((outputs**2).sum(), 3.0 * len(batch[0]))

    model = make_model()
    expected = make_model().eval()
    ((expected(make_data().tensors[0]) ** 2).sum() / 21).backward()
    _, found = run(lambda ctx: ctx.gradients_of(step=squares), model)
    (gradients, weight) = found[0]
    assert seen == [2, 2, 2, 1]
    assert weight.item() == 21.0
    torch.testing.assert_close(flat(gradients), flat(p.grad for p in expected.parameters()))


def test_a_mean_is_weighted_by_samples() -> None:
    def mean(model: nn.Module, batch: Any) -> Tensor:
        outputs = model.eval()(batch[0])
        model.train()
        return (outputs**2).sum(dim=1).mean()

    expected = make_model().eval()
    (expected(make_data().tensors[0]) ** 2).sum(dim=1).mean().backward()
    _, found = run(lambda ctx: ctx.gradients_of(step=mean))
    assert found[0][1].item() == 7.0
    torch.testing.assert_close(flat(found[0][0]), flat(p.grad for p in expected.parameters()))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_loss_of_is_the_runs_own_loss(dropout: float) -> None:
    model = make_model()
    model[2].p = dropout  # type: ignore[union-attr, assignment]

    def both(ctx: CallbackContext) -> Any:
        return ctx.gradients_of()[0], ctx.gradients_of(step=lambda _, batch: ctx.loss_of(batch))[0]

    _, found = run(both, model)
    assert torch.equal(flat(found[0][0]), flat(found[0][1])), "same masks, same numbers"


def test_neither_weights_gradients_nor_random_numbers_of_the_training_change() -> None:
    plain, _ = run(None)
    beside, found = run(lambda ctx: [ctx.gradients_of()[0] for _ in range(2)])
    assert torch.equal(flat(plain.parameters()), flat(beside.parameters()))
    first, second = found[0]
    assert torch.equal(flat(first), flat(second)), "calls in a row draw the same dropout masks"


def test_negative_control_a_forward_of_ones_own_does_change_them() -> None:
    plain, _ = run(None)
    beside, _ = run(lambda ctx: ctx.model(torch.zeros(2, 3)))
    assert not torch.equal(flat(plain.parameters()), flat(beside.parameters()))


def test_gradients_and_random_state_are_put_back_when_the_function_fails() -> None:
    def check(ctx: CallbackContext) -> None:
        ctx.optimizer.param_groups[0]["params"][0].grad = mark = torch.ones(4, 3)
        state = torch.get_rng_state()
        with pytest.raises(ZeroDivisionError):
            ctx.gradients_of(step=lambda model, batch: 1 / (0 * len(model(batch[0]))))
        assert ctx.optimizer.param_groups[0]["params"][0].grad is mark
        assert torch.equal(torch.get_rng_state(), state)
        mark.zero_()

    plain, _ = run(None)
    beside, _ = run(check)
    assert torch.equal(flat(plain.parameters()), flat(beside.parameters()))


def test_results_are_not_overwritten_by_the_next_call() -> None:
    def twice(ctx: CallbackContext) -> Any:
        first = ctx.gradients_of()[0]
        before = [g.clone() for g in first]
        ctx.gradients_of(lambda outputs, batch: 100 * outputs.sum())
        return all(torch.equal(a, b) for a, b in zip(first, before, strict=True))

    assert run(twice)[1] == [True]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda model, batch: model(batch[0]), "the function given to gradients_of returned a tensor of shape (2, 2)"),
        (lambda model, batch: model(batch[0]).detach().sum(), "does not depend on any trainable parameter"),
    ],
)
def test_what_is_no_loss_is_refused(step: Any, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        run(lambda ctx: ctx.gradients_of(step=step))
    assert message in str(caught.value)


def test_the_precisions_autocast_surrounds_the_step_function_and_can_be_left() -> None:
    class Half(Precision):
        def forward(self) -> Any:
            return torch.autocast("cpu", torch.bfloat16)

    types = []

    def step(model: nn.Module, batch: Any) -> Tensor:
        types.append(model(batch[0]).dtype)
        with torch.autocast("cpu", enabled=False):
            outputs = model(batch[0])
        types.append(outputs.dtype)
        return outputs.sum()

    run(lambda ctx: ctx.gradients_of(step=step), precision=Half())
    assert types == [torch.bfloat16, torch.float32] * 4
