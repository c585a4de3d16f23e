"""What the finders find, and that a run with them is the run without them."""

from __future__ import annotations

import copy
import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drivetrain import Callback, ConfigError, ModelError, Precision, Trainer, TrainingConfig, component, make_component, state
from drivetrain_finders import BatchSizeFinderCallback, LrFinderCallback, suggestion


class Net(nn.Module):
    """Counts its calls; runs out of memory above a size."""

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.25), nn.Linear(16, 1))
        self.limit, self.sizes = limit, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        return self.layers(x)


@component
class Counts(Callback):
    """Hears of each step, and has state."""

    steps: int = state(default=0)

    def on_optimizer_step(self, ctx: Any) -> None:
        self.steps += 1


def rows() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(3, generator=generator) for _ in range(48)]
    return [(x, x.sum().reshape(1)) for x in inputs]


def trainer(folder: Path, *callbacks: Callback, model: Net | None = None, **options: Any) -> Trainer:
    model = model or Net()
    given = {"max_duration": "2ep", "per_device_batch_size": 8, "output_dir": folder, "run_name": "a", "device": "cpu"}
    optimizer = torch.optim.AdamW(
        [{"params": model.layers[0].parameters()}, {"params": model.layers[4].parameters(), "lr": 0.02}], lr=0.01
    )
    config = TrainingConfig(**{**given, "standard_callbacks": False, **options})
    return Trainer(
        model, config, rows(), loss=nn.MSELoss(), optimizer=optimizer, callbacks=[*callbacks, Counts()], precision=Precision()
    )


def final(run: Trainer) -> Any:
    """All that a run without finders has as well."""
    saved = run.state_dict()
    saved["components"].pop("callback:BatchSizeFinderCallback", None)
    return {key: saved[key] for key in ("model", "optimizer", "rng", "components", "precision")}


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"dataloader": {"num_workers": 1}}], ids=str)
def test_a_run_with_finders_is_the_run_without(tmp_path: Path, options: dict[str, Any]) -> None:
    alone = trainer(tmp_path, **options)
    alone.train()
    size = {"largest": 8}  # the configured one
    model = Net()
    found = trainer(tmp_path, BatchSizeFinderCallback(**size), LrFinderCallback(steps=20), model=model, **options)
    found.train()
    assert len(model.sizes) - len(alone.model.sizes) >= 20, "they did train"
    assert same(final(found), final(alone))
    assert found.output.losses == alone.output.losses


def test_negative_control_without_putting_back_it_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = trainer(tmp_path)
    alone.train()
    monkeypatch.setattr("drivetrain.rehearsal._kept", lambda ctx: lambda: None)
    found = trainer(tmp_path, LrFinderCallback(steps=20))
    found.train()
    assert not same(final(found), final(alone))


def test_the_curve_is_written_and_the_rate_taken_when_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path, LrFinderCallback(steps=60, lowest=1e-5, highest=10.0, apply=True))
    run.train()
    with (tmp_path / "a" / "lr_finder.csv").open() as file:
        curve = [(float(row["lr"]), float(row["loss"])) for row in csv.DictReader(file)]
    expected = suggestion([rate for rate, _ in curve], [loss for _, loss in curve])
    assert expected is not None and 1e-4 < expected < 1.0
    assert curve[0][0] == pytest.approx(1e-5)
    assert f"suggested learning rate {expected:.2e}" in caplog.text
    first, second = (group["initial_lr"] for group in run.ctx.optimizer.param_groups)
    assert (first, second) == (pytest.approx(expected), pytest.approx(2 * expected))


def test_the_suggestion_is_the_steepest_fall_before_the_minimum() -> None:
    rates = [10.0**k for k in range(-6, 2)]
    assert suggestion(rates, [5, 5, 4.9, 3, 1.5, 1.4, 6, 0.5]) == rates[3]
    assert suggestion(rates, [1, 2, 3, 4, 5, 6, 7, 8]) is None
    assert suggestion([], []) is None


@pytest.mark.parametrize(("limit", "expected"), [(48, 24), (23, 12), (7, 6), (1.5, 1)])
def test_the_largest_microbatch_that_fits(tmp_path: Path, limit: float, expected: int) -> None:
    model = Net(limit)
    model.layers[1], model.layers[3] = nn.Identity(), nn.Identity()  # of which the result would depend on the microbatch
    other = Net()
    other.layers[1], other.layers[3] = nn.Identity(), nn.Identity()
    options = {"global_batch_size": 24, "max_grad_norm": False}
    alone = trainer(tmp_path, model=other, **options)
    alone.train()
    run = trainer(tmp_path, BatchSizeFinderCallback(), model=model, **options)
    output = run.train()
    assert output.steps == alone.output.steps == 4
    assert model.sizes[-24 // expected :] == [expected] * (24 // expected)
    assert run.ctx.samples == alone.ctx.samples == 96
    for name, value in run.model.state_dict().items():
        assert torch.allclose(value, alone.model.state_dict()[name], atol=1e-5)


def test_nothing_fits(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not even a microbatch of one sample"):
        trainer(tmp_path, BatchSizeFinderCallback(), model=Net(0)).train()


def test_another_error_is_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    model = Net()
    model.layers[4] = nn.Linear(5, 1)
    with pytest.raises(RuntimeError, match="shapes"):
        trainer(tmp_path, BatchSizeFinderCallback(), model=model).train()


def test_a_resumed_run_keeps_its_rate(tmp_path: Path) -> None:
    run = trainer(tmp_path, LrFinderCallback(steps=20, apply=True))
    for step in run.steps():
        if step.number == 3:
            break
    rate = run.ctx.optimizer.param_groups[0]["initial_lr"]
    run.train()
    assert run.ctx.optimizer.param_groups[0]["initial_lr"] == rate


def test_bad_input() -> None:
    for name, options in [
        ("lr_finder", {"steps": 3}),
        ("lr_finder", {"lowest": 1.0, "highest": 0.1}),
        ("lr_finder", {"lowest": 0.0}),
        ("batch_size_finder", {"largest": 0}),
        ("batch_size_finder", {"headroom": 1.0}),
    ]:
        with pytest.raises(ConfigError):
            make_component("callback", {"use": name, **options})


def test_a_lowest_rate_above_the_highest_is_said_at_its_place() -> None:
    with pytest.raises(ConfigError, match=r"\n  lr_finder\.lowest: must be below highest = 0\.1, got 1$"):
        make_component("callback", {"use": "lr_finder", "lowest": 1.0, "highest": 0.1})


@pytest.mark.parametrize("forgets", [False, True])
def test_a_run_that_goes_on_keeps_the_size_that_it_began_with(tmp_path: Path, forgets: bool) -> None:
    """On a machine with more memory, say: larger microbatches would draw other numbers for dropout. The control forgets the size."""

    kept: list[Any] = []

    class Keep(Callback):
        def on_restore(self, ctx: Any) -> None:
            if kept:
                ctx.load_state_dict(kept[0])

        def on_step_end(self, ctx: Any) -> None:
            if ctx.step == 2:
                ctx.trainer.stop("test")

        def on_run_end(self, ctx: Any) -> None:
            kept.append(copy.deepcopy(ctx.state_dict()))

    size = {"per_device_batch_size": 24, "max_duration": "4st"}
    whole = trainer(tmp_path, BatchSizeFinderCallback(), model=Net(12), **size)
    whole.train()
    trainer(tmp_path, BatchSizeFinderCallback(), Keep(), model=Net(12), **size).train()
    if forgets:
        kept[0]["components"]["callback:BatchSizeFinderCallback"]["found"] = None
    second = trainer(tmp_path, BatchSizeFinderCallback(), Keep(), model=Net(99), **size)
    second.train()
    assert second.model.sizes[-1] == (24 if forgets else 12)
    equal = all(torch.equal(value, whole.model.state_dict()[name]) for name, value in second.model.state_dict().items())
    assert equal != forgets
