"""Averaged weights, through real runs: the formula in float64, torch's AveragedModel, resume, skipped steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drivetrain import (
    Callback,
    ConfigError,
    ModelError,
    PluginError,
    Precision,
    Trainer,
    TrainingConfig,
    component,
    make_component,
)
from drivetrain_ema import EmaCallback


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.25), nn.Linear(8, 1)).to(dtype)


def data(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(3, generator=generator, dtype=dtype), torch.randn(1, generator=generator, dtype=dtype)) for _ in range(24)
    ]


def values(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and floating-point buffers, copied."""
    return {name: value.detach().clone() for name, value in model.state_dict().items() if value.is_floating_point()}


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


@component
class Follow(Callback):
    """Notes the weights after each update, and those that evaluation sees."""

    def __attrs_post_init__(self) -> None:
        self.path: list[dict[str, Tensor]] = []
        self.evaluated: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []

    def on_run_start(self, ctx: Any) -> None:
        self.path.append(values(ctx.model))

    def on_optimizer_step(self, ctx: Any) -> None:
        self.path.append(values(ctx.model))

    def on_evaluate_batch(self, ctx: Any) -> None:
        if len(self.evaluated) < ctx.step:
            self.evaluated.append(values(ctx.model))

    def on_step_start(self, ctx: Any) -> None:
        self.after.append(values(ctx.model))


def trainer(*callbacks: Callback, model: nn.Module | None = None, steps: int = 8, **options: Any) -> Trainer:
    model = model or net()
    given = {"max_duration": f"{steps}st", "eval_interval": "1st", "per_device_batch_size": 4, "device": "cpu"}
    config = TrainingConfig(**{**given, "standard_callbacks": False, **{k: v for k, v in options.items() if k != "precision"}})
    rows = data(next(model.parameters()).dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return Trainer(
        model,
        config,
        rows,
        rows,
        loss=nn.MSELoss(),
        optimizer=optimizer,
        callbacks=callbacks,
        precision=options.get("precision"),
    )


def averaged(ema: EmaCallback, run: Trainer) -> dict[str, Tensor]:
    with ema.averaged(run.ctx):
        return values(run.model)


def formula(path: list[dict[str, Tensor]], decay: float, warmup: bool, every: int = 1) -> dict[str, Tensor]:
    """average ← d·average + (1−d)·weights in float64, step by step; the weights of the steps between are those of the next `every`-th."""
    average, n = {name: value.double() for name, value in path[0].items()}, 0
    for step, weights in enumerate(path[1:], 1):
        if step % every:
            continue
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        for _ in range(every):
            average = {name: d * average[name] + (1 - d) * weights[name].double() for name in average}
        n += every
    return average


@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.9, "warmup": False},
        {"decay": 0.999, "warmup": True},
        {"decay": 0.15, "warmup": True},  # the warm-up ends during the run
        {"decay": 0.8, "warmup": False, "update_every": 3},
        {"decay": 0.0, "warmup": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_formula_in_fp64(options: dict[str, Any], accumulation: int) -> None:
    ema, follow = EmaCallback(**options), Follow()
    run = trainer(ema, follow, model=net(torch.float64), gradient_accumulation_steps=accumulation)
    run.train()
    expected = formula(follow.path, options["decay"], options["warmup"], options.get("update_every", 1))
    found = averaged(ema, run)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-12, atol=1e-14) for name in expected)
    wrong = formula(follow.path, options["decay"] + 0.01, options["warmup"], options.get("update_every", 1))
    assert options["decay"] > 0.99 or not all(
        torch.allclose(found[name], wrong[name], rtol=1e-12, atol=1e-14) for name in wrong
    )


def test_torchs_averaged_model() -> None:
    @component
    class Torchs(Callback):
        def on_run_start(self, ctx: Any) -> None:
            update = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
            self.model = torch.optim.swa_utils.AveragedModel(ctx.model, multi_avg_fn=update, use_buffers=True)
            self.model.update_parameters(ctx.model)  # its first update copies

        def on_optimizer_step(self, ctx: Any) -> None:
            self.model.update_parameters(ctx.model)

    ema, torchs = EmaCallback(decay=0.9, warmup=False), Torchs()
    run = trainer(ema, torchs)
    run.train()
    expected, found = values(torchs.model.module), averaged(ema, run)
    assert all(torch.equal(found[name], expected[name]) for name in dict(run.model.named_parameters()))


def test_evaluation_sees_the_averages_and_training_goes_on_as_without_them() -> None:
    ema, follow, alone = EmaCallback(decay=0.9), Follow(), Follow()
    run = trainer(ema, follow)
    run.train()
    trainer(alone).train()
    assert all(map(same, follow.path, alone.path))
    assert all(map(same, follow.after[1:], follow.path[1:-1]))
    expected = formula(follow.path[:4], 0.9, True)
    assert all(torch.allclose(follow.evaluated[2][name].double(), expected[name], atol=1e-6) for name in expected)
    assert not same(follow.evaluated[2], follow.path[3])


def test_evaluation_of_the_weights_when_asked() -> None:
    follow = Follow()
    trainer(EmaCallback(evaluate=False), follow).train()
    assert all(map(same, follow.evaluated, follow.path[1:]))


def test_the_model_at_the_end() -> None:
    plain, follow = EmaCallback(), Follow()
    run = trainer(plain, follow)
    run.train()
    assert same(values(run.model), follow.path[-1])
    ema = EmaCallback(use_at_end=True)
    ended = trainer(ema)
    ended.train()
    assert same(values(ended.model), averaged(plain, run))
    loss = ended.evaluate()["eval/loss"]
    assert loss == run.evaluate()["eval/loss"], "both evaluate the averages"
    assert same(values(ended.model), averaged(plain, run)), "and an evaluation leaves them in"


@pytest.mark.parametrize("use_at_end", [False, True])
def test_a_second_sitting_goes_on_from_the_weights(use_at_end: bool) -> None:
    whole, ema = EmaCallback(), EmaCallback(use_at_end=use_at_end)
    expected = trainer(whole, steps=8)
    expected.train()
    run = trainer(ema, steps=8)
    for step in run.steps():
        if step.number == 4:
            break
    assert run.ctx.step == 4
    run.train()
    assert same(averaged(ema, run), averaged(whole, expected))


@component
class Restore(Callback):
    """Stands for a checkpoint plugin."""

    saved: Any

    def on_restore(self, ctx: Any) -> None:
        ctx.load_state_dict(self.saved)


@pytest.mark.parametrize("use_at_end", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_equal_bit_by_bit(use_at_end: bool, dtype: torch.dtype) -> None:
    options = {"use_at_end": use_at_end, "update_every": 2}
    whole = EmaCallback(**options)
    expected = trainer(whole, model=net(dtype), steps=9)
    expected.train()
    first = trainer(EmaCallback(**options), model=net(dtype), steps=9)
    for step in first.steps():
        if step.number == 5:
            saved = copy.deepcopy(first.state_dict())
            break
    del saved["components"]["callback:EmaCallback"]["weights"]
    saved["components"]["callback:EmaCallback"]["weights"] = None
    ema = EmaCallback(**options)
    resumed = trainer(ema, Restore(saved=saved), model=net(dtype), steps=9)
    resumed.train()
    assert same(resumed.state_dict()["components"], expected.state_dict()["components"])
    assert same(values(resumed.model), values(expected.model))
    forgetful = EmaCallback(**options)
    saved["components"]["callback:EmaCallback"]["updates"] = 0
    other = trainer(forgetful, Restore(saved=saved), model=net(dtype), steps=9)
    other.train()
    assert not same(averaged(forgetful, other), averaged(whole, expected)), "negative control"


def test_restoring_to_export() -> None:
    ema = EmaCallback(use_at_end=True)
    run = trainer(ema)
    run.train()
    saved = copy.deepcopy(run.state_dict())
    again = EmaCallback(use_at_end=True)
    restored = trainer(again, Restore(saved=saved))
    restored.restore("auto")
    assert same(values(restored.model), values(run.model))
    raw = EmaCallback()
    restored = trainer(raw, Restore(saved=saved))
    restored.restore("auto")
    assert same(averaged(raw, restored), values(run.model))


def test_narrow_weights_are_averaged_in_fp32() -> None:
    """In bfloat16 a share of 0.001 of a small difference is lost; the average of most weights stands still."""
    wide, own = EmaCallback(decay=0.999, warmup=False), EmaCallback(decay=0.999, warmup=False, dtype="own")
    follow = Follow()
    trainer(wide, own, follow, model=net(torch.bfloat16)).train()
    states = {ema.dtype: ema.state_dict()["averages"] for ema in (wide, own)}
    assert {value.dtype for value in states["fp32"].values()} == {torch.float32}
    assert {value.dtype for value in states["own"].values()} == {torch.bfloat16}
    start, expected = follow.path[0]["3.weight"].double(), formula(follow.path, 0.999, False)["3.weight"]
    assert torch.allclose(states["fp32"]["3.weight"].double() - start, expected - start, rtol=1e-3, atol=1e-7)
    assert not torch.allclose(states["own"]["3.weight"].double() - start, expected - start, rtol=0.1, atol=1e-7)


class Skipping(Precision):
    """Leaves every third step out, as loss scaling does when gradients overflow."""

    scales = True
    count = 0

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        self.count += 1
        if self.count % 3 == 0:
            return False
        optimizer.step()
        return True


def test_a_skipped_step_is_no_update() -> None:
    ema, follow = EmaCallback(decay=0.9, warmup=False), Follow()
    run = trainer(ema, follow, precision=Skipping())
    run.train()
    assert run.ctx.skipped_steps == 3
    assert ema.updates == run.ctx.step == 8
    expected = formula(follow.path, 0.9, False)
    weights = dict(run.model.named_parameters())  # batch norm has seen the skipped batches, the average has not yet
    found = averaged(ema, run)
    assert all(torch.allclose(found[name].double(), expected[name], atol=1e-6) for name in weights)


def test_a_failed_evaluation_leaves_the_weights() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise RuntimeError("no evaluation today")
            return self.inner(x)

    follow, model = Follow(), Broken()
    run = trainer(EmaCallback(), follow, model=model, eval_interval="3st")
    with pytest.raises(RuntimeError, match="today"):
        run.train()
    assert same(values(run.model), follow.path[-1])


def test_frozen_weights_take_no_part() -> None:
    model = net()
    model[0].requires_grad_(False)
    ema = EmaCallback()
    trainer(ema, model=model).train()
    assert sorted(ema.state_dict()["averages"]) == [
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.weight",
        "3.bias",
        "3.weight",
    ]


def test_bad_input() -> None:
    for options in ({"decay": 1.0}, {"decay": -0.1}, {"update_every": 0}, {"dtype": "fp8"}):
        with pytest.raises(ConfigError):
            make_component("callback", {"use": "ema", **options})
    ema = EmaCallback()
    run = trainer(ema)
    run.train()
    saved = copy.deepcopy(ema.state_dict())
    saved["averages"]["other"] = saved["averages"].pop("0.weight")
    ema.load_state_dict(saved)
    with pytest.raises(PluginError, match=r"0\.weight, other"):
        run.evaluate()
    frozen = net().requires_grad_(False)
    with pytest.raises(ModelError, match="nothing to average"):
        trainer(EmaCallback(), model=frozen).evaluate()
