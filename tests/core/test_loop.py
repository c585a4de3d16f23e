"""The loop against plain PyTorch: same numbers, same order of events, nothing hidden."""

from __future__ import annotations

import copy
import cProfile
import dataclasses
import errno
import math
import multiprocessing
import pstats
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pluggy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from drivetrain import (
    Callback,
    CallbackContext,
    ConfigError,
    DataError,
    DrivetrainError,
    Loss,
    ModelError,
    Precision,
    Strategy,
    Trainer,
    TrainingConfig,
    at_hand,
    rng,
)
from drivetrain.data import Split, make_source


def config(**given: Any) -> TrainingConfig:
    return TrainingConfig(**{"max_duration": "2ep", "standard_callbacks": False, "precision": None} | given)


def mlp(seed: int = 0, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))


def regression(n: int = 20, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 4, generator=generator), torch.randn(n, 1, generator=generator))


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.fixture(autouse=True)
def core_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about the core: no installed plugin takes part."""
    monkeypatch.setenv("DRIVETRAIN_PLUGINS", "off")


def test_weights_are_bit_equal_to_a_raw_loop() -> None:
    data, steps = regression(40), 25
    ours, raw = mlp(), mlp()
    cfg = config(max_duration=f"{steps}st", per_device_batch_size=4, max_grad_norm=0.5, seed=3)
    Trainer(ours, cfg, data, loss=nn.MSELoss(), optimizer=torch.optim.AdamW(ours.parameters(), lr=1e-2)).train()

    optimizer, source, done, epoch = torch.optim.AdamW(raw.parameters(), lr=1e-2), make_source(data, Split(4), seed=3), 0, 0
    while done < steps:
        for ((inputs, targets),), _, _ in source.open(epoch):
            if done < steps:
                nn.functional.mse_loss(raw(inputs), targets).backward()
                nn.utils.clip_grad_norm_(raw.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                done += 1
        epoch += 1
    assert torch.equal(weights(ours), weights(raw))


@pytest.mark.parametrize("accumulation", [2, 3, 4])
def test_accumulation_of_means_is_bit_equal_to_dividing_each_loss(accumulation: int) -> None:
    data = regression(4 * accumulation)
    ours, raw = mlp(), mlp()
    cfg = config(max_duration="1st", per_device_batch_size=4, gradient_accumulation_steps=accumulation, max_grad_norm=False)
    Trainer(ours, cfg, data, loss=nn.MSELoss(), optimizer=torch.optim.SGD(ours.parameters(), lr=0.1)).train()
    (window,) = make_source(data, Split(4, accumulation)).open(0)
    for inputs, targets in window.batches:
        (nn.functional.mse_loss(raw(inputs), targets) / accumulation).backward()
    torch.optim.SGD(raw.parameters(), lr=0.1).step()
    assert torch.equal(weights(ours), weights(raw))


class TokenModel(nn.Module):
    """A model whose samples have unequal numbers of targets; returns the summed loss with their number."""

    def __init__(self, weighted: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.weighted = nn.Linear(4, 5), weighted

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Loss | torch.Tensor:
        logits = self.head(x).flatten(0, 1)
        total = nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
        count = (labels != -100).sum()
        return Loss(total, count) if self.weighted else total / count


def token_data(n: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 5, (n, 6), generator=generator)
    for row in range(n):
        labels[row, 1 + row % 5 :] = -100
    return [{"x": torch.randn(6, 4, generator=generator), "labels": labels[row]} for row in range(n)]


def gradient_of_last_step(model: nn.Module, data: Any, batch_size: int, accumulation: int, **given: Any) -> torch.Tensor:
    """The averaged gradient that the optimizer would see in the last step of one epoch, weights unchanged throughout."""
    seen: list[torch.Tensor] = []

    class Look(Callback):
        def on_gradients(self, ctx: CallbackContext) -> None:
            seen.append(torch.cat([p.grad.reshape(-1).clone() for p in ctx.model.parameters()]))

    cfg = config(
        max_duration="1ep",
        per_device_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        dataloader={"shuffle": False},
        max_grad_norm=False,
        **given,
    )
    Trainer(model, cfg, data, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), callbacks=[Look()]).train()
    return seen[-1]


def test_a_partial_window_with_unequal_tokens_gives_the_gradient_of_one_big_batch() -> None:
    data = token_data(17)  # windows of 4 × 2: the last holds one microbatch of 1; the one before is full
    whole = gradient_of_last_step(TokenModel(), data[8:16], batch_size=8, accumulation=1)
    parts = gradient_of_last_step(TokenModel(), data[8:16], batch_size=2, accumulation=4)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)
    whole = gradient_of_last_step(TokenModel(), data[:7], batch_size=7, accumulation=1)
    parts = gradient_of_last_step(TokenModel(), data[:7], batch_size=2, accumulation=4)  # 2 + 2 + 2 + 1
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)
    whole = gradient_of_last_step(TokenModel(), data[8:17], batch_size=9, accumulation=1)
    parts = gradient_of_last_step(TokenModel(), data, batch_size=2, accumulation=4)  # last window: 17 = 8 + 8 + 1
    torch.testing.assert_close(
        parts, gradient_of_last_step(TokenModel(), data[16:], batch_size=1, accumulation=1), rtol=1e-6, atol=1e-7
    )


def test_negative_control_the_mean_of_means_is_not_that_gradient() -> None:
    data = token_data(7)
    whole = gradient_of_last_step(TokenModel(), data, batch_size=7, accumulation=1)
    means = gradient_of_last_step(TokenModel(weighted=False), data, batch_size=2, accumulation=4)
    assert (means - whole).abs().max() > 1e-3


def test_clipping_with_accumulated_weights_equals_clipping_the_big_batch() -> None:
    data = token_data(7)
    results = []
    for batch_size, accumulation in ((7, 1), (2, 4)):
        model = TokenModel()
        cfg = config(
            max_duration="1ep",
            per_device_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            dataloader={"shuffle": False},
            max_grad_norm=0.1,
        )
        Trainer(model, cfg, data, optimizer=torch.optim.SGD(model.parameters(), lr=1.0)).train()
        results.append(weights(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("limit", [0.1, 1e3])
@pytest.mark.parametrize("value", [0.5, math.nan, math.inf])
@pytest.mark.parametrize("known", [True, False])
def test_clipping_is_torchs_and_leaves_gradients_below_the_limit_alone_where_that_is_known(
    limit: float, value: float, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parameters() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
        made[0].grad, made[1].grad = torch.tensor([value, -0.0, 1e-40]), torch.full((2, 2), 0.25)
        return made

    if not known:
        monkeypatch.setattr(at_hand, "__code__", (lambda value: None).__code__)
    mine, raw = parameters(), parameters()
    versions = [p.grad._version for p in mine if p.grad is not None]
    norm = Strategy().clip(mine, limit, None)
    expected = nn.utils.clip_grad_norm_(raw, limit)
    torch.testing.assert_close(norm, expected, rtol=0, atol=0, equal_nan=True)
    for one, other in zip(mine, raw, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0, equal_nan=True)
    written = [p.grad._version for p in mine if p.grad is not None] != versions
    assert written == (not known or not float(expected) < limit)


@pytest.mark.parametrize("limit", [0.1, 1e3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_sparse_gradients_are_clipped_as_dense_ones(limit: float, accumulation: int) -> None:
    """Rows that occur several times count with their sum."""
    data = [(torch.tensor([i % 5, i % 3, 7]), torch.tensor([float(i % 4)])) for i in range(24)]
    found, norms = [], []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.EmbeddingBag(8, 4, sparse=sparse), nn.Linear(4, 1))
        cfg = config(max_duration="4st", per_device_batch_size=3, gradient_accumulation_steps=accumulation, max_grad_norm=limit)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        norms.append(Trainer(model, cfg, data, loss=nn.MSELoss(), optimizer=optimizer).train().metrics["train/grad_norm"])
        found.append(weights(model))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_window_without_any_target_leaves_the_weights_alone() -> None:
    data = token_data(4)
    for row in data:
        row["labels"] = torch.full_like(row["labels"], -100)
    for accumulation in (1, 2):
        model = TokenModel()
        before = weights(model)
        cfg = config(max_duration="2st", per_device_batch_size=2, gradient_accumulation_steps=accumulation)
        Trainer(model, cfg, data, optimizer=torch.optim.SGD(model.parameters(), lr=1.0)).train()
        assert torch.equal(weights(model), before)


class Weighted(nn.Module):
    """Squared errors with a weight of each sample, of any type."""

    def __init__(self, dtype: torch.dtype = torch.float32, weight: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.dtype, self.weight = nn.Linear(4, 1), dtype, nn.Parameter(torch.tensor(weight))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Loss:
        count = (self.weight * len(x)).to(self.dtype)
        return Loss((self.weight.detach() * (self.head(x) - y).square()).sum(), count)


def rows(n: int) -> list[dict[str, torch.Tensor]]:
    return [{"x": x, "y": y} for x, y in regression(n)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_evaluation_adds_weights_up_exactly_whatever_their_type(dtype: torch.dtype) -> None:
    """In bf16 nothing can be added to 256."""
    expected, found = (
        Trainer(
            model := Weighted(kind), config(), rows(8), rows(2600), optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
        ).evaluate()
        for kind in (torch.float32, dtype)
    )
    assert found == expected


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_a_step_of_no_weight_leaves_the_weights_alone_whatever_its_type(dtype: torch.dtype, accumulation: int) -> None:
    model = Weighted(dtype, weight=0.0)
    before, cfg = weights(model).clone(), config(max_duration="1st", gradient_accumulation_steps=accumulation)
    Trainer(model, cfg, rows(32), optimizer=torch.optim.SGD(model.parameters(), lr=0.1)).train()
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_gradient_goes_through_a_weight(accumulation: int) -> None:
    model = Weighted()
    cfg = config(max_duration="2st", gradient_accumulation_steps=accumulation)
    trainer = Trainer(model, cfg, rows(32), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.train()
    assert model.weight.item() == 1.0 and not trainer.ctx.loss_tensor.requires_grad


def test_reported_loss_is_the_weighted_mean() -> None:
    data, seen = token_data(8), []
    model = TokenModel()
    cfg = config(max_duration="1st", per_device_batch_size=2, gradient_accumulation_steps=4, dataloader={"shuffle": False})
    for step in Trainer(model, cfg, data, optimizer=torch.optim.SGD(model.parameters(), lr=0.0)).steps():
        seen.append(step.loss)
    batch = {k: torch.stack([row[k] for row in data]) for k in ("x", "labels")}
    assert seen == [pytest.approx(model(**batch).mean().item(), rel=1e-6)]


def test_events_come_in_the_documented_order() -> None:
    heard: list[str] = []

    def listen(name: str) -> Callable[[Any, Any], None]:
        def method(self: Any, ctx: CallbackContext) -> None:
            heard.append(name)

        return method

    from drivetrain.hookspecs import EVENTS

    everything = type("Everything", (Callback,), {e: listen(e) for e in EVENTS} | {"every": "2st"})()
    model, data = mlp(), regression(6)
    cfg = config(
        max_duration="1ep", per_device_batch_size=2, gradient_accumulation_steps=2, log_interval="2st", eval_interval="2st"
    )
    Trainer(
        model, cfg, data, data, loss=nn.MSELoss(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), callbacks=[everything]
    ).train()
    micro = ["on_batch", "on_forward", "on_loss", "on_backward"]
    end = ["on_gradients", "on_clipped", "on_optimizer_step", "on_step_end"]
    assert heard == [
        *("on_restore", "on_run_start", "on_epoch_start"),
        *("on_step_start", *micro, *micro, *end),
        *("on_step_start", *micro, *end),
        *("on_log", "on_evaluate_start", *["on_evaluate_batch"] * 3, "on_evaluate_end", "on_every"),
        *("on_epoch_end", "on_run_end"),
    ]


def test_batch_outputs_and_loss_can_be_replaced() -> None:
    class Replace(Callback):
        def on_batch(self, ctx: CallbackContext) -> None:
            ctx.batch = (ctx.batch[0] * 0, ctx.batch[1])

        def on_forward(self, ctx: CallbackContext) -> None:
            assert ctx.batch[0].abs().sum() == 0
            ctx.outputs = ctx.outputs + 2

        def on_loss(self, ctx: CallbackContext) -> None:
            ctx.microbatch_loss = ctx.microbatch_loss * 3

    model, data = nn.Linear(4, 1), regression(4)
    bias = model.bias.detach().clone()
    cfg = config(max_duration="1st", per_device_batch_size=4)
    (step,) = Trainer(
        model, cfg, data, loss=nn.MSELoss(), optimizer=torch.optim.SGD(model.parameters(), lr=0.0), callbacks=[Replace()]
    ).steps()
    assert step.loss == pytest.approx(3 * (bias + 2 - data.tensors[1]).square().mean().item(), rel=1e-6)


def test_train_and_steps_are_the_same_engine() -> None:
    results = []
    for run in (lambda t: t.train(), lambda t: list(t.steps())):
        model = mlp()
        run(Trainer(model, config(), regression(), loss=nn.MSELoss(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1)))
        results.append(weights(model))
    assert torch.equal(*results)


def test_a_loop_that_is_left_and_kept_ends_with_the_process_in_good_order(tmp_path: Path) -> None:
    script = tmp_path / "left.py"
    script.write_text(
        "from drivetrain_testing import tiny_trainer\n"
        "from drivetrain import Callback\n"
        "class Ends(Callback):\n"
        "    def on_run_end(self, ctx):\n"
        "        print(ctx.step, ctx.stop_reason)\n"
        "steps = tiny_trainer(Ends(), steps=9).steps()\n"
        "next(steps), next(steps)\n"
    )
    without_numpy = "ignore:Failed to initialize NumPy:UserWarning"  # torch's own words where the core is alone
    done = subprocess.run([sys.executable, "-W", without_numpy, str(script)], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("2 the caller left the loop", "", 0)


def test_leaving_the_loop_ends_the_run_in_good_order_and_it_can_go_on() -> None:
    ends: list[str | None] = []

    class End(Callback):
        def on_run_end(self, ctx: CallbackContext) -> None:
            ends.append(ctx.stop_reason)

    def fresh() -> Trainer:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        return Trainer(
            model,
            config(per_device_batch_size=4),
            regression(),
            loss=nn.MSELoss(),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            callbacks=[End()],
        )

    trainer = fresh()
    for step in trainer.steps():
        if step.number == 3:
            break
    assert ends == ["the caller left the loop"]
    assert not trainer.output.completed
    output = trainer.train()
    assert output.completed
    assert output.steps == 10
    whole = fresh()
    whole.train()
    assert torch.equal(weights(trainer.model), weights(whole.model))


class FailsOnce(Callback):
    """Raises in the second step, once, in the second microbatch or when its gradients have been clipped."""

    def __init__(self, event: str) -> None:
        self.event, self.failed = event, False

    def on_gradients(self, ctx: CallbackContext) -> None:
        if self.event == "veto" and ctx.step == 1 and not self.failed:
            ctx.veto = True

    def on_loss(self, ctx: CallbackContext) -> None:
        self._fail(ctx, self.event == "loss" and ctx.microbatch == 1)

    def on_clipped(self, ctx: CallbackContext) -> None:
        self._fail(ctx, self.event in ("clipped", "veto"))

    def _fail(self, ctx: CallbackContext, here: bool) -> None:
        if here and ctx.step == 1 and not self.failed:
            self.failed = True
            raise ValueError("once")


class Scaled(Precision):
    """Scales losses by a GradScaler, which insists on its order of calls."""

    scales = True

    def __init__(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        self.scaler.step(optimizer)
        self.scaler.update()
        return True

    def skip(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.update()

    def break_off(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler._per_optimizer_states.clear()

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.scaler.load_state_dict(dict(saved))


@pytest.mark.parametrize("precision", [Precision, Scaled])
@pytest.mark.parametrize("event", ["", "loss", "clipped", "veto"])
def test_a_step_that_was_broken_off_leaves_nothing_to_the_next_sitting(event: str, precision: type[Precision]) -> None:
    """Neither gradients, those that were there before the first sitting included, nor a veto, nor a scaler in the middle of a step."""

    def run(event: str, before: float) -> tuple[torch.Tensor, Any]:
        model = mlp()
        if before:
            (model(torch.ones(2, 4)) * before).sum().backward()
        cfg = config(max_duration="6st", per_device_batch_size=4, gradient_accumulation_steps=2, max_grad_norm=False)
        options = {"loss": nn.MSELoss(), "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "precision": precision()}
        trainer = Trainer(model, cfg, regression(), callbacks=[FailsOnce(event)], **options)
        if event:
            with pytest.raises(ValueError, match="once"):
                trainer.train()
        trainer.train()
        return weights(model), trainer.ctx.precision.state_dict()

    (expected, scale), (found, found_scale) = run("", 0.0), run(event, 100.0)
    assert torch.equal(found, expected) and found_scale == scale


def test_the_callers_random_state_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    Trainer(model, config(), regression(), loss=nn.MSELoss(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1)).train()
    assert torch.equal(torch.rand(3), expected)


def test_schedule_is_a_function_of_the_position() -> None:
    seen: list[float] = []

    class Look(Callback):
        def on_step_end(self, ctx: CallbackContext) -> None:
            seen.append(ctx.lr)

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    cfg = config(max_duration="4st", per_device_batch_size=4)
    Trainer(
        model, cfg, regression(), loss=nn.MSELoss(), optimizer=optimizer, scheduler=lambda s: 1 - s / 4, callbacks=[Look()]
    ).train()
    assert seen == [0.5, 0.375, 0.25, 0.125]


def test_torch_schedulers_are_accepted() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    cfg = config(max_duration="5st", per_device_batch_size=4)
    Trainer(model, cfg, regression(), loss=nn.MSELoss(), optimizer=optimizer, scheduler=scheduler).train()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def another(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(mlp().parameters(), lr=1.0)


def own(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1.0)


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "remedy"),
    [
        (another, lambda o: None, "no parameter of this model"),
        (own, lambda o: torch.optim.lr_scheduler.StepLR(another(mlp()), 2), "changes another optimizer"),
        (own, torch.optim.lr_scheduler.ReduceLROnPlateau, "eval_interval: ReduceLROnPlateau looks at eval/loss"),
    ],
)
def test_an_optimizer_or_a_scheduler_that_would_change_nothing_is_refused(optimizer: Any, scheduler: Any, remedy: str) -> None:
    model = mlp()
    made = optimizer(model)
    with pytest.raises(DrivetrainError, match=remedy):
        Trainer(model, config(), regression(), loss=nn.MSELoss(), optimizer=made, scheduler=scheduler(made))


def test_a_run_in_tokens_over_data_that_has_none_ends_with_an_error() -> None:
    model = mlp()
    with pytest.raises(DataError, match="max_duration counts tokens, and the batches have none"):
        Trainer(model, config(max_duration="35tok"), regression(), loss=nn.MSELoss(), optimizer=own(model)).train()


@pytest.mark.parametrize(
    ("length", "expected"), [("1ep", 5), ("7st", 7), ("12sp", 3), ("1.5ep", 8), ("3ep", 15)], ids=lambda v: str(v)
)
def test_durations_end_the_run(length: str, expected: int) -> None:
    model = mlp()
    cfg = config(max_duration=length, per_device_batch_size=4)
    output = Trainer(model, cfg, regression(), loss=nn.MSELoss(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1)).train()
    assert output.steps == expected
    assert output.stop_reason == f"max_duration {cfg.max_duration} reached"


class Skips(Precision):
    """Some windows make no step, as if their gradients had overflowed."""

    scales = True

    def __init__(self, windows: set[int]) -> None:
        self.windows, self.done = windows, 0

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        self.done += 1
        return self.done - 1 not in self.windows and super().step(optimizer)


class Periodic(Callback):
    """Remembers when it is called, in passes."""

    def __init__(self, every: str, left_out: set[tuple[int, int]]) -> None:
        self.every, self.leave, self.at = every, left_out, []

    def on_run_start(self, ctx: CallbackContext) -> None:
        ctx.left_out |= self.leave

    def on_every(self, ctx: CallbackContext) -> None:
        self.at.append(round(ctx.position_in("ep"), 6))


def test_a_plateau_scheduler_follows_planned_evaluations_and_no_others() -> None:
    """Whatever a caller's own loop evaluates: a test set must not change the training."""

    def rates(asked: bool, eval_interval: str) -> list[float]:
        model, found = mlp(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=0, factor=0.5, threshold=1e9, threshold_mode="abs"
        )
        cfg = config(max_duration="6st", eval_interval=eval_interval)
        trainer = Trainer(model, cfg, regression(), regression(8), loss=nn.MSELoss(), optimizer=optimizer, scheduler=plateau)
        for step in trainer.steps():
            if asked and step.number % 2:
                trainer.evaluate(regression(12))
                trainer.evaluate()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    assert rates(True, "2st") == rates(False, "2st") == [1.0, 1.0, 1.0, 0.5, 0.5, 0.25]
    assert rates(True, "100st") == [1.0] * 6


@pytest.mark.parametrize(
    ("every", "expected"), [("1ep", [1, 2, 3]), ("0.5ep", [0.6, 1, 1.6, 2, 2.6, 3]), ("100%", [3]), ("2st", None)]
)
@pytest.mark.parametrize("skipped", [set(), {0}, {4}, {3, 4, 14}, {9, 14}, set(range(5, 13))])
@pytest.mark.parametrize("how", ["overflow", "left out"])
def test_passes_are_over_when_their_data_is_whatever_was_skipped(
    every: str, expected: list[float] | None, skipped: set[int], how: str
) -> None:
    """Five windows in each. With windows left out there may be no step at which something is due: then it is at the next one."""
    callback = Periodic(every, {divmod(index, 5) for index in skipped if how == "left out"})
    model = mlp()
    options = {"loss": nn.MSELoss(), "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "callbacks": [callback]}
    precision = Skips(skipped if how == "overflow" else set())
    trainer = Trainer(model, config(max_duration="3ep", per_device_batch_size=4), regression(), precision=precision, **options)
    trainer.train()
    assert trainer.ctx.step == 15 - len(skipped)
    if expected is None:
        assert len(callback.at) == trainer.ctx.step // 2
    elif how == "overflow" or not skipped & {2, 7, 12, 5}:
        assert callback.at == expected
    else:
        assert {1.0, 2.0, 3.0} & set(expected) <= set(callback.at)


def test_tokens_and_wall_time_end_the_run() -> None:
    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 1)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.table(input_ids).square().mean()

    data = [{"input_ids": torch.arange(5)} for _ in range(12)]
    model = Embed()
    output = Trainer(
        model,
        config(max_duration="35tok", per_device_batch_size=2),
        data,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    ).train()
    assert output.steps == 4  # 10 tokens a step
    output = Trainer(
        model,
        config(max_duration="0.05s", per_device_batch_size=2),
        data,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    ).train()
    assert 0.05 <= output.seconds < 5


def profile(run: Callable[[], Any]) -> int:
    profiler = cProfile.Profile(builtins=False)
    profiler.enable()
    run()
    profiler.disable()
    return sum(entry[0] for entry in pstats.Stats(profiler).stats.values())  # type: ignore[attr-defined]


def test_python_calls_per_step_above_a_raw_loop() -> None:
    """A gate on counts, which are free of noise: the difference between 100 and 300 steps of each loop."""
    data = regression(4 * 400)

    def raw(steps: int) -> None:
        model, loss = mlp(), nn.MSELoss()
        optimizer, parameters = torch.optim.SGD(model.parameters(), lr=0.01), list(model.parameters())
        for index in range(steps):
            inputs, targets = data.tensors[0][4 * index : 4 * index + 4], data.tensors[1][4 * index : 4 * index + 4]
            loss(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            del parameters[len(parameters) :]

    def ours(steps: int) -> None:
        model = mlp()
        cfg = config(max_duration=f"{steps}st", per_device_batch_size=4, max_grad_norm=False, log_interval="1000st")
        Trainer(model, cfg, data, loss=nn.MSELoss(), optimizer=torch.optim.SGD(model.parameters(), lr=0.01)).train()

    def per_step(loop: Callable[[int], None]) -> float:
        loop(10)
        return (profile(lambda: loop(300)) - profile(lambda: loop(100))) / 200

    above = per_step(ours) - per_step(raw)
    assert above <= 30, f"{above} Python calls per step above the raw loop"


def test_events_without_listeners_never_reach_pluggy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle(Callback):
        def on_run_start(self, ctx: CallbackContext) -> None:
            calls.clear()

    calls: list[str] = []
    original = pluggy.PluginManager._hookexec

    def counted(self: Any, name: str, *rest: Any) -> Any:
        calls.append(name)
        return original(self, name, *rest)

    monkeypatch.setattr(pluggy.PluginManager, "_hookexec", counted)
    model = mlp()
    trainer = Trainer(
        model,
        config(),
        regression(),
        loss=nn.MSELoss(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=[Idle()],
    )
    trainer.train()
    assert calls == []
    assert trainer.listeners() == {"on_run_start": ["callback:Idle"]}
    assert trainer.ctx.run.events.step_end is None


def test_ordinary_steps_read_nothing_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_hand, "__code__", (lambda value: None).__code__)  # a CPU's numbers are, a device's are not
    reads: list[int] = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "__index__"):
        original = getattr(torch.Tensor, name)

        def spy(self: torch.Tensor, *args: Any, _original: Any = original) -> Any:
            reads.append(trainer.ctx.step)
            return _original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, spy)
    model = mlp()
    cfg = config(max_duration="12st", per_device_batch_size=4, log_interval="6st", gradient_accumulation_steps=2)
    trainer = Trainer(model, cfg, regression(64), loss=nn.MSELoss(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.train()
    assert {step for step in reads if step not in (6, 12)} <= {0}  # the logging steps, and opening the first epoch
    assert {6, 12} <= set(reads), "the spy must see the reads of logging steps"


class LogsTwoDevices(Callback):
    def on_step_end(self, ctx: CallbackContext) -> None:
        ctx.log({"here": torch.tensor(float(ctx.step)), "there": torch.ones((), device="meta")})


def test_values_of_several_devices_can_be_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a tensor on the host in a run on a GPU. The meta device stands in for one: what is read from it is 7."""
    original = torch.stack

    def stack(tensors: Sequence[torch.Tensor], *args: Any) -> torch.Tensor:
        assert len({tensor.device for tensor in tensors}) == 1
        return torch.full((len(tensors),), 7.0) if tensors[0].device.type == "meta" else original(tensors, *args)

    monkeypatch.setattr(torch, "stack", stack)
    model = mlp()
    options = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "callbacks": [LogsTwoDevices()]}
    trainer = Trainer(model, config(max_duration="3st"), regression(), loss=nn.MSELoss(), **options)
    trainer.train()
    metrics = trainer.ctx.last_logged
    assert (metrics["here"], metrics["there"]) == (3.0, 7.0) and math.isfinite(metrics["train/loss"])


def test_plugin_errors_name_the_plugin_and_the_event() -> None:
    class Bad(Callback):
        def on_step_end(self, ctx: CallbackContext) -> None:
            raise ZeroDivisionError("oh")

    class Witness(Callback):
        def on_exception(self, ctx: CallbackContext) -> None:
            seen.append(ctx.exception)

        def on_run_end(self, ctx: CallbackContext) -> None:
            seen.append("end")
            raise RuntimeError("teardown fails as well")

    seen: list[Any] = []
    model = mlp()
    trainer = Trainer(
        model,
        config(),
        regression(),
        loss=nn.MSELoss(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=[Bad(), Witness()],
    )
    with pytest.raises(ZeroDivisionError) as caught:
        trainer.train()
    assert any("on_step_end of callback:Bad" in note for note in caught.value.__notes__)
    assert any("teardown fails as well" in note for note in caught.value.__notes__)
    assert seen == [caught.value, "end"]


def test_a_callback_can_stop_the_run() -> None:
    class Stop(Callback):
        def on_step_end(self, ctx: CallbackContext) -> None:
            if ctx.step == 3:
                ctx.stop("enough")

    model = mlp()
    output = Trainer(
        model,
        config(),
        regression(),
        loss=nn.MSELoss(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=[Stop()],
    ).train()
    assert (output.steps, output.stop_reason, output.completed) == (3, "enough", True)


class Returns(nn.Module):
    def __init__(self, what: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.what = nn.Linear(4, 1), what

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
        return self.what(self.layer(x).square().mean())


class HasLoss:
    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


@pytest.mark.parametrize(
    "what",
    [lambda v: v, lambda v: {"loss": v, "logits": v}, HasLoss, lambda v: Loss(v * 4, 4)],
    ids=["tensor", "mapping", "object", "Loss"],
)
def test_every_form_of_returned_loss_trains_the_same(what: Callable[[torch.Tensor], Any]) -> None:
    def train(form: Callable[[torch.Tensor], Any]) -> torch.Tensor:
        torch.manual_seed(0)
        model = Returns(form)
        data = [{"x": row} for row in regression(8).tensors[0]]
        Trainer(model, config(per_device_batch_size=4), data, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)).train()
        return weights(model)

    torch.testing.assert_close(train(what), train(lambda v: v), rtol=1e-6, atol=0)


def test_a_step_function_takes_batches_of_any_form() -> None:
    data = [(torch.ones(4), torch.ones(1), index) for index in range(8)]

    def step(model: nn.Module, batch: Any) -> Loss:
        inputs, targets, _ = batch
        return Loss((model(inputs) - targets).square().sum(), len(inputs))

    model = mlp()
    output = Trainer(
        model, config(max_duration="20ep"), data, step=step, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    ).train()
    assert output.loss < 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (nn.Linear(4, 1), regression(), {}), "shape (8, 1), which is not a loss"),
        (
            lambda: (nn.Linear(4, 2), regression(), {"loss": lambda o, t: o}),
            "the loss function returned a tensor of shape (8, 2)",
        ),
        (lambda: (nn.Linear(4, 1), [(torch.ones(4), 1, 2)] * 8, {}), "a list of 3"),
        (lambda: (nn.Linear(4, 1), regression(), {"loss": lambda o, t: torch.tensor(1.0)}), "does not depend on any trainable"),
    ],
    ids=["no loss", "loss of wrong shape", "batch of three", "constant loss"],
)
def test_models_without_a_loss_are_refused_before_any_update(make: Callable[[], Any], message: str) -> None:
    model, data, given = make()
    before = weights(model)
    with pytest.raises(ModelError, match=message.replace("(", r"\(").replace(")", r"\)")):
        Trainer(model, config(), data, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **given).train()
    assert torch.equal(weights(model), before)


def test_an_iterator_that_is_used_up_is_named() -> None:
    model = mlp()
    pairs = ((x, y) for x, y in zip(*regression(8).tensors, strict=True))
    with pytest.raises(DataError, match="no batch in epoch 1"):
        Trainer(model, config(), pairs, loss=nn.MSELoss(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1)).train()


def test_a_stream_without_samples_is_named_before_any_update() -> None:
    class Nothing(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    model = mlp()
    with pytest.raises(DataError, match="train data: the stream gave no batch, so nothing can be trained on"):
        Trainer(model, config(), Nothing(), loss=nn.MSELoss(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1)).train()


@pytest.mark.parametrize("exists", [False, True])
def test_a_run_directory_that_cannot_be_written_is_named_with_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    class Write(Callback):
        def on_run_start(self, ctx: CallbackContext) -> None:
            (ctx.run_dir / "metrics.jsonl").open("a")

    def refuse(path: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    model = mlp()
    cfg, optimizer = config(output_dir=tmp_path / "runs", run_name="a"), torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, cfg, regression(), loss=nn.MSELoss(), optimizer=optimizer, callbacks=[Write()])
    monkeypatch.setattr(Path, "open" if exists else "mkdir", refuse)  # not by their modes: root may write anywhere
    what = "written to (metrics.jsonl)" if exists else "made"
    said = f"output_dir: the run directory .*runs/a cannot be {re.escape(what)}: Permission denied. Choose another output_dir"
    with pytest.raises(ConfigError, match=said):
        trainer.train()
    assert trainer.ctx.step == 0


def test_evaluation_weighs_every_sample_once_and_disturbs_nothing() -> None:
    data = regression(10)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    frozen = model[1].eval()

    def metrics(outputs: torch.Tensor, batch: Any) -> dict[str, Any]:
        return {"mae": (outputs - batch[1]).abs().mean(), "big": Loss((batch[1] > 0).sum(), len(batch[1]))}

    trainer = Trainer(
        model,
        config(per_device_batch_size=4),  # 4 + 4 + 2: the mean of means would be wrong
        data,
        data,
        loss=nn.MSELoss(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        compute_metrics=metrics,
    )
    state = torch.get_rng_state()
    found = trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), state)
    assert model[0].training
    assert not frozen.training
    with torch.no_grad():
        outputs = copy.deepcopy(model).eval()(data.tensors[0])
    assert found["eval/loss"] == pytest.approx((outputs - data.tensors[1]).square().mean().item(), rel=1e-6)
    assert found["eval/mae"] == pytest.approx((outputs - data.tensors[1]).abs().mean().item(), rel=1e-6)
    assert found["eval/big"] == pytest.approx((data.tensors[1] > 0).double().mean().item())


def test_evaluation_puts_the_devices_random_state_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device that stands in for one with a generator of its own: a model may sample in eval mode."""
    generator = {"state": 7}

    class Device:
        @staticmethod
        def get_rng_state(device: torch.device) -> int:
            return generator["state"]

        @staticmethod
        def set_rng_state(state: int, device: torch.device) -> None:
            generator["state"] = state

    class Samples(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            generator["state"] += 1
            return super().forward(x)

    monkeypatch.setattr(rng, "_device_module", lambda device: Device)
    model = Samples(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, config(), regression(), regression(), loss=nn.MSELoss(), optimizer=optimizer)
    monkeypatch.setattr(trainer.ctx, "device", torch.device("meta"))
    trainer.evaluate()
    assert generator == {"state": 7}


class Half(Precision):
    """Autocast, with one context that is entered again for every microbatch."""

    def __init__(self) -> None:
        self.context = torch.autocast("cpu", torch.bfloat16)

    def forward(self) -> Any:
        return self.context


class EvaluatesInForward(Callback):
    def on_forward(self, ctx: CallbackContext) -> None:
        if ctx.model.training:
            ctx.trainer.evaluate()


def test_an_evaluation_in_the_middle_of_a_forward_does_not_leave_autocast_on() -> None:
    model = mlp()
    options = {"loss": nn.MSELoss(), "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "precision": Half()}
    trainer = Trainer(
        model, config(max_duration="2st"), regression(), regression(), callbacks=[EvaluatesInForward()], **options
    )
    trainer.train()
    assert not torch.is_autocast_enabled("cpu")


class InWorkers(Callback):
    """Evaluates on data of its own in the loop; remembers how many worker processes there are before and afterwards."""

    def on_step_end(self, ctx: CallbackContext) -> None:
        before = len(multiprocessing.active_children())
        ctx.trainer.evaluate(list(regression(8)))
        self.counts = before, len(multiprocessing.active_children())


def test_an_evaluation_leaves_no_worker_process_behind() -> None:
    model, callback = mlp(), InWorkers()
    cfg = config(max_duration="1st", dataloader={"num_workers": 1})
    options = {"loss": nn.MSELoss(), "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "callbacks": [callback]}
    trainer = Trainer(model, cfg, regression(), regression(8), **options)
    trainer.train()
    assert callback.counts == (1, 1), "the training's own goes on"
    for data in (list(regression(8)), None, iter(regression(8))):
        trainer.evaluate(data)
        assert multiprocessing.active_children() == []


def test_evaluating_never_changes_training() -> None:
    results = []
    for interval in (False, "1st"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        data = DataLoader(regression(), batch_size=4, shuffle=True)
        Trainer(
            model,
            config(eval_interval=interval),
            data,
            regression(),
            loss=nn.MSELoss(),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ).train()
        results.append(weights(model))
    assert torch.equal(*results)


def test_evaluation_before_the_first_step() -> None:
    class Heard(Callback):
        def on_evaluate_end(self, ctx: CallbackContext) -> None:
            heard.append((ctx.step, ctx.eval_metrics["eval/loss"]))

    results = []
    for at_start, steps in ((False, [5, 10]), (True, [0, 5, 10])):
        heard: list[tuple[int, float]] = []
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        given: Any = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "callbacks": [Heard()]}
        trainer = Trainer(
            model,
            config(eval_at_start=at_start, per_device_batch_size=4),
            regression(),
            regression(),
            loss=nn.MSELoss(),
            **given,
        )
        untrained = trainer.evaluate()["eval/loss"]
        heard.clear()
        trainer.train()
        assert [step for step, _ in heard] == steps
        assert (heard[0][1] == untrained) is at_start
        results.append(weights(model))
    assert torch.equal(*results)


class CtrlC(Callback):
    """What a terminal does: the default handler raises at the line that happens to run."""

    def __init__(self, place: str) -> None:
        self.places, self.heard = place.split(), []

    def at(self, place: str, ctx: CallbackContext) -> None:
        if place in self.places and ctx.step >= 6:
            self.places.remove(place)
            signal.raise_signal(signal.SIGINT)

    def on_forward(self, ctx: CallbackContext) -> None:
        self.at("step", ctx)

    def on_log(self, ctx: CallbackContext) -> None:
        self.at("log", ctx)

    def on_evaluate_batch(self, ctx: CallbackContext) -> None:
        self.at("evaluation", ctx)

    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        self.heard.append("evaluated")

    def on_preempt(self, ctx: CallbackContext) -> None:
        self.heard.append("preempt")

    def on_exception(self, ctx: CallbackContext) -> None:
        self.heard.append("exception")

    def on_run_end(self, ctx: CallbackContext) -> None:
        self.heard.append("end")
        self.at("end", ctx)


@pytest.fixture
def terminal() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def interrupted(place: str, folder: Path, *more: Callback) -> tuple[Trainer, CtrlC]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    cfg = config(per_device_batch_size=4, log_interval="2st", max_duration="10st", output_dir=folder, run_name="a")
    cfg.eval_interval = "100st"
    press, data = CtrlC(place), regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, cfg, data, data, loss=nn.MSELoss(), optimizer=optimizer, callbacks=[press, *more]), press


@pytest.mark.parametrize(("place", "heard"), [("step", ["exception", "end"]), ("log", ["preempt", "end"])])
@pytest.mark.usefixtures("terminal")
def test_ctrl_c_ends_a_run_in_good_order(tmp_path: Path, place: str, heard: list[str]) -> None:
    trainer, press = interrupted(place, tmp_path)
    output = trainer.train()
    assert press.heard == heard
    assert (output.steps, output.completed, output.stop_reason) == (6, False, "interrupted by Ctrl-C")
    assert all(parameter.grad is None for parameter in trainer.model.parameters())

    trainer, press = interrupted(place, tmp_path)
    seen = []
    with pytest.raises(KeyboardInterrupt):
        for step in trainer.steps():
            seen.append(step.number)
    assert (seen, press.heard) == ([1, 2, 3, 4, 5, 6][: len(seen)], heard)


@pytest.mark.usefixtures("terminal")
def test_a_second_ctrl_c_is_raised(tmp_path: Path) -> None:
    trainer, press = interrupted("log end", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert press.heard == ["preempt", "end"]


@pytest.mark.parametrize(("place", "saved"), [("step", 4), ("log", 6), ("evaluation", 10)])
@pytest.mark.usefixtures("terminal")
def test_after_ctrl_c_a_run_goes_on_exactly(tmp_path: Path, place: str, saved: int) -> None:
    """From the end of the last step where it came between two, from the checkpoint before in the middle of one."""
    checkpoint = pytest.importorskip("drivetrain_checkpoint")

    def sitting(folder: Path, place: str) -> Trainer:
        trainer, press = interrupted(place, folder, checkpoint.CheckpointCallback(every="4st"))
        assert trainer.train().completed is (place == "")
        assert ("evaluated" in press.heard) is (place == "")
        return trainer

    first = sitting(tmp_path / "cut", place)
    assert checkpoint.find_checkpoints(first.run_dir)[0].step == saved
    second, whole = sitting(tmp_path / "cut", ""), sitting(tmp_path / "whole", "")
    assert (second.ctx.resumed, second.output.steps, second.output.completed) == (True, 10, True)
    assert all(map(torch.equal, second.model.state_dict().values(), whole.model.state_dict().values()))


def test_streaming_metric_objects() -> None:
    class Accuracy:
        def reset(self) -> None:
            self.right, self.seen = 0, 0

        def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
            self.right += int((outputs.argmax(1) == targets).sum())
            self.seen += len(targets)

        def compute(self) -> float:
            return self.right / self.seen

    data = TensorDataset(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    model = nn.Identity()
    model.anchor = nn.Parameter(torch.zeros(()))
    trainer = Trainer(
        model,
        config(per_device_batch_size=3),
        data,
        data,
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        compute_metrics={"accuracy": Accuracy()},
    )
    assert trainer.evaluate()["eval/accuracy"] == 0.75


def test_auxiliary_gradients_are_the_steps_own_and_leave_the_training_alone() -> None:
    data, found = token_data(7), []

    class Auxiliary(Callback):
        def on_step_start(self, ctx: CallbackContext) -> None:
            gradients, weight = ctx.gradients_of()
            found.append((torch.cat([g.reshape(-1) for g in gradients if g is not None]), float(weight)))

    results = []
    for callbacks in ([], [Auxiliary()]):
        model = TokenModel()
        cfg = config(max_duration="1ep", per_device_batch_size=2, gradient_accumulation_steps=4, dataloader={"shuffle": False})
        Trainer(model, cfg, data, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), callbacks=callbacks).train()
        results.append(weights(model))
    assert torch.equal(*results)
    model = TokenModel()
    batch = {k: torch.stack([row[k] for row in data]) for k in ("x", "labels")}
    loss = model(**batch)
    loss.mean().backward()
    torch.testing.assert_close(found[0][0], torch.cat([p.grad.reshape(-1) for p in model.parameters()]), rtol=1e-6, atol=1e-7)
    assert found[0][1] == float(loss.weight)


def test_a_part_of_an_epoch_of_unknown_length_is_refused() -> None:
    model, rows = mlp(), list(regression())
    with pytest.raises(ConfigError, match=r"max_duration: 1\.5ep has a part of an epoch"):
        Trainer(model, config(max_duration="1.5ep"), iter(rows), loss=nn.MSELoss(), optimizer=own(model))


def test_running_out_of_memory_in_an_evaluation_says_what_to_set() -> None:
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        if not model.training:
            raise torch.OutOfMemoryError("out of memory")
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    model = mlp()
    with pytest.raises(torch.OutOfMemoryError) as caught:
        Trainer(model, config(), regression(), regression(), step=step, optimizer=own(model)).train()
    assert "per_device_eval_batch_size to less than 8" in "".join(caught.value.__notes__)


@dataclasses.dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "pair"


def pairs(batch: list[Any]) -> Pair:
    return Pair(*map(torch.stack, zip(*batch, strict=True)))


def square(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch.x), batch.y)


def test_batches_that_are_dataclasses_count_their_samples() -> None:
    """In evaluation, with accumulation and in lengths: 24 samples in batches of 10, 10 and 4."""
    found = []
    for collate in (None, pairs):
        model = mlp()
        cfg = config(max_duration="40sp", per_device_batch_size=10, gradient_accumulation_steps=2, log_interval="1st")
        parts = {"loss": nn.MSELoss()} if collate is None else {"step": square, "data_collator": collate}
        made = Trainer(model, cfg, regression(24), regression(24, seed=2), optimizer=own(model), **parts)
        output = made.train()
        found.append((output.steps, output.losses, made.evaluate()["eval/loss"]))
    assert found[0] == found[1]


def test_a_batch_that_is_a_dataclass_is_divided_when_memory_runs_out() -> None:
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        seen.append(len(batch.x))
        if len(batch.x) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return square(model, batch)

    seen: list[int] = []
    model = mlp()
    cfg = config(max_duration="1st", per_device_batch_size=8)
    with pytest.warns(UserWarning, match="out of memory"):
        Trainer(model, cfg, regression(), step=step, data_collator=pairs, optimizer=own(model)).train()
    assert seen == [8, 4, 2, 2, 2, 2]


def test_a_batch_of_an_unknown_class_is_warned_of() -> None:
    class Opaque:
        def __init__(self, batch: list[Any]) -> None:
            self.x, self.y = map(torch.stack, zip(*batch, strict=True))

    model = mlp()
    loader = torch.utils.data.DataLoader(regression(), 4, collate_fn=Opaque)
    with pytest.warns(UserWarning, match="a batch of the class Opaque holds is not known"):
        Trainer(model, config(max_duration="1st"), loader, step=square, optimizer=own(model)).train()
