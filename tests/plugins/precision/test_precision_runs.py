"""The precisions in whole runs of the Trainer."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from drivetrain import Callback, CallbackContext, Precision, Trainer, TrainingConfig, component, option
from drivetrain_precision import Bf16, Fp16, Tf32


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(64, 6, generator=generator)
    return TensorDataset(inputs, 0.3 * inputs.sum(dim=1, keepdim=True))


def trainer(
    model: nn.Module, precision: Any, *callbacks: Callback, steps: int = 24, accumulation: int = 2, optimizer: Any = None
) -> Trainer:
    config = TrainingConfig(
        max_duration=f"{steps}st",
        per_device_batch_size=8,
        gradient_accumulation_steps=accumulation,
        precision=precision,
        log_interval="1st",
        standard_callbacks=False,
        dataloader={"shuffle": False},
    )
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    return Trainer(model, config, make_data(), loss=nn.functional.mse_loss, optimizer=optimizer, callbacks=callbacks)


@pytest.mark.parametrize("name", ["auto", "fp32", "tf32", "bf16", "bf16_true", "fp16", "fp64"])
def test_a_run_in_every_precision_learns_and_says_what_it_does(name: str) -> None:
    made = trainer(make_model(), name, steps=40)
    losses = [loss for _, loss in made.train().losses]
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    assert made.ctx.precision.reason
    expected = {"fp64": {torch.float64}, "bf16_true": {torch.float32, torch.bfloat16}}.get(name, {torch.float32})
    assert {p.dtype for p in made.model.parameters()} == expected


def torchs_own_loop(dtype: torch.dtype, clip: str = "after unscaling") -> nn.Module:
    """Eight steps of two microbatches as torch's documentation writes them; `clip` says when gradients are clipped to a norm of 1."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    inputs, targets = (part.split(8) for part in make_data().tensors)
    for step in range(8):
        for half in (2 * step % 8, (2 * step + 1) % 8):
            with torch.autocast("cpu", dtype):
                loss = nn.functional.mse_loss(model(inputs[half]), targets[half]) / 2
            scaler.scale(loss).backward()
        if clip == "before unscaling":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.unscale_(optimizer)
        if clip == "after unscaling":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return model


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("made", "dtype"), [(Bf16(), torch.bfloat16), (Fp16(), torch.float16)])
def test_a_run_is_bit_equal_to_torchs_own_loop(made: Any, dtype: torch.dtype) -> None:
    model, full = make_model(), make_model()
    trainer(model, made, steps=8).train()
    trainer(full, "fp32", steps=8).train()
    assert equal(model, torchs_own_loop(dtype))
    assert not equal(full, model), "control: another precision"
    assert not equal(model, torchs_own_loop(dtype, "never")), "control: clipping acts in these steps"
    if dtype == torch.float16:
        assert not equal(model, torchs_own_loop(dtype, "before unscaling")), (
            "control: clipped are the gradients, not the scaled ones"
        )


@component
class Record(Callback):
    """What a listener sees after each step and before clipping."""

    def __attrs_post_init__(self) -> None:
        self.steps: list[int] = []
        self.largest: list[float] = []

    def on_gradients(self, ctx: CallbackContext) -> None:
        self.largest.append(max(p.grad.abs().max().item() for p in ctx.model.parameters()))

    def on_step_end(self, ctx: CallbackContext) -> None:
        self.steps.append(ctx.step)


def test_overflows_are_skipped_and_counted_and_the_run_still_has_all_its_steps() -> None:
    record = Record()
    made = trainer(make_model(), {"use": "fp16", "init_scale": 2.0**40}, record, steps=20)
    output = made.train()
    assert output.steps == 20
    assert record.steps == list(range(1, 21))
    skipped = made.ctx.skipped_steps
    assert skipped > 10
    assert made.ctx.precision.state_dict()["scale"] == 2.0 ** (40 - skipped)
    finite = [value for value in record.largest if math.isfinite(value)]
    assert len(record.largest) - len(finite) == skipped
    assert max(finite) < 100, "listeners see unscaled gradients"


@component
class Averages(Callback):
    """What advances with a step: the schedule's position, an average of the weights, and what a listener sees."""

    def __attrs_post_init__(self) -> None:
        self.rates: list[tuple[int, float]] = []
        self.averaged = 0
        self.ended: list[int] = []

    def on_clipped(self, ctx: CallbackContext) -> None:
        self.rates.append((ctx.step, ctx.lr))

    def on_optimizer_step(self, ctx: CallbackContext) -> None:
        self.averaged += 1

    def on_step_end(self, ctx: CallbackContext) -> None:
        self.ended.append(ctx.step)


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_advance_neither_schedule_nor_steps_nor_averages(fused: bool) -> None:
    model, seen = make_model(), Averages()
    config = TrainingConfig(
        max_duration="12st", precision={"use": "fp16", "init_scale": 2.0**40}, standard_callbacks=False, per_device_batch_size=8
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, fused=fused)
    made = Trainer(
        model,
        config,
        make_data(),
        loss=nn.functional.mse_loss,
        optimizer=optimizer,
        scheduler=lambda position: 1e-3 * (1 + position),
        callbacks=[seen],
    )
    made.train()
    skipped = made.ctx.skipped_steps
    assert skipped > 10
    assert len(seen.rates) == 12 + skipped
    assert all(rate == pytest.approx(1e-3 * (1 + step)) for step, rate in seen.rates)
    assert seen.averaged == 12
    assert seen.ended == list(range(1, 13))
    assert {float(state["step"]) for state in optimizer.state.values()} == {12.0}, "nor the optimizer's own bias correction"


@component
class Restore(Callback):
    """Hands a run the state of another."""

    saved: dict[str, Any] = option()

    def on_restore(self, ctx: CallbackContext) -> None:
        ctx.load_state_dict(self.saved)


def test_a_restored_fp16_run_ends_bit_equal() -> None:
    options = {"use": "fp16", "init_scale": 2.0**30, "growth_interval": 5}
    straight = trainer(make_model(), options)
    straight.train()

    first = trainer(make_model(), options)
    for step in first.steps():
        if step.number == 9:
            saved = deepcopy(first.state_dict())
            break
    assert saved["precision"]["growth_tracker"] != 0
    second = trainer(make_model(), options, Restore(saved=saved))
    second.train()
    assert all(torch.equal(a, b) for a, b in zip(second.model.parameters(), straight.model.parameters(), strict=True))
    assert second.ctx.precision.state_dict() == straight.ctx.precision.state_dict()


@component
class PretendTf32(Tf32):
    """As on a GPU that has TF32."""

    def make_precision(self, ctx: CallbackContext) -> Precision:
        made = super().make_precision(ctx)
        self._effective = True
        return made


@component
class Watch(Callback):
    """Notes the process' setting in backward, and fails if asked to."""

    fail: bool = False

    def __attrs_post_init__(self) -> None:
        self.seen: set[str] = set()

    def on_backward(self, ctx: CallbackContext) -> None:
        self.seen.add(torch.get_float32_matmul_precision())
        if self.fail:
            raise KeyError("on purpose")


@pytest.mark.parametrize("fail", [False, True])
def test_tf32_holds_for_backward_too_and_ends_with_the_run(fail: bool) -> None:
    watch = Watch(fail=fail)
    made = trainer(make_model(), PretendTf32(), watch, steps=2)
    assert torch.get_float32_matmul_precision() == "highest"
    try:
        made.train()
    except KeyError:
        assert fail
    assert watch.seen == {"high"}
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_true", {"use": "fp16", "init_scale": 8.0}], ids=str)
def test_an_update_that_fails_in_a_rehearsal_changes_nothing(precision: Any) -> None:
    fails = [True]

    class Fails(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            if fails[0]:
                raise torch.OutOfMemoryError("on purpose")
            return super().step(closure)

    @component
    class Rehearse(Callback):
        def on_run_start(self, ctx: CallbackContext) -> None:
            with pytest.raises(torch.OutOfMemoryError), ctx.rehearsal() as step:
                step()
            fails[0] = False
            with ctx.rehearsal() as step:
                step()

    def run(*callbacks: Callback) -> nn.Module:
        model = make_model()
        trainer(model, precision, *callbacks, steps=4, optimizer=Fails(model.parameters(), lr=1e-2)).train()
        return model

    assert equal(run(Rehearse()), run())


@pytest.mark.parametrize("event", ["on_gradients", "on_clipped", "on_optimizer_step"])
def test_an_fp16_run_goes_on_after_a_step_that_failed(event: str) -> None:
    @component
    class Fail(Callback):
        def __attrs_post_init__(self) -> None:
            self.done = False

        def _once(self, ctx: CallbackContext) -> None:
            if ctx.step == 2 and not self.done:
                self.done = True
                raise KeyError("on purpose")

    setattr(Fail, event, Fail._once)
    made = trainer(make_model(), Fp16(init_scale=8.0), Fail(), steps=6)
    with pytest.raises(KeyError):
        made.train()
    assert made.train().steps == 6
