"""Injected NaN, infinity and spikes, through real runs, for each policy."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from drivetrain import (
    Callback,
    ConfigError,
    ModelError,
    Precision,
    Trainer,
    TrainingConfig,
    at_hand,
    component,
    hook,
    make_component,
)
from drivetrain_anomaly import EVENTS_FILE, AnomalyCallback
from drivetrain_anomaly.detect import judge_at_hand, judge_for

STEPS = 24  # in one pass


@pytest.fixture(autouse=True, params=["at hand", "on a device"])
def judged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's numbers are judged by the host; those of a device must be judged there, to the same end."""
    if request.param == "on a device":
        as_on_a_device(monkeypatch)


def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_hand, "__code__", (lambda value: None).__code__)  # in all modules that have imported it


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.25), nn.Linear(8, 1))


def windows(accumulation: int = 1) -> list[list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    return [
        [(torch.randn(4, 3, generator=generator), torch.randn(4, 1, generator=generator)) for _ in range(accumulation)]
        for _ in range(STEPS)
    ]


def hurt(window: list[tuple[Tensor, Tensor]], how: str) -> None:
    """Spoil the last microbatch of a window."""
    inputs, targets = window[-1]
    if how == "nan":
        inputs[1, 2] = math.nan
    else:
        targets.fill_(1000.0 if how == "spike" else math.inf)


def stream(chosen: list[list[tuple[Tensor, Tensor]]]) -> DataLoader[Any]:
    """Ready batches in a fixed order."""
    return DataLoader([batch for window in chosen for batch in window], batch_size=None)


class Scaled(Precision):
    """Loss scaling with torch's GradScaler, without autocast: overflow at will by its initial scale."""

    name, scales, dtype = "fp16", True, torch.float16

    def __init__(self, scale: float = 1024.0) -> None:
        self._scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=5)

    def scale(self, loss: Tensor) -> Tensor:
        return self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        before = self._scaler.get_scale()
        self._scaler.step(optimizer)
        self._scaler.update()
        return self._scaler.get_scale() >= before

    def skip(self, optimizer: torch.optim.Optimizer) -> None:
        self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {"scaler": self._scaler.state_dict()}

    def load_state_dict(self, saved: Any) -> None:
        self._scaler.load_state_dict(dict(saved["scaler"]))


@component
class Witness(Callback):
    """Notes weights and optimizer state around each update, and the log."""

    def __attrs_post_init__(self) -> None:
        self.before: dict[int, Any] = {}
        self.after: dict[int, Any] = {}
        self.windows: dict[int, Any] = {}  # before the update with each window
        self.logs: list[tuple[int, dict[str, float]]] = []

    def on_clipped(self, ctx: Any) -> None:
        self.before[ctx.step + 1] = copy.deepcopy([dict(ctx.model.state_dict()), ctx.optimizer.state_dict()["state"]])
        self.windows[ctx.step_in_epoch] = self.before[ctx.step + 1]

    def on_step_end(self, ctx: Any) -> None:
        self.after[ctx.step] = copy.deepcopy([dict(ctx.model.state_dict()), ctx.optimizer.state_dict()["state"]])

    @hook(trylast=True)
    def on_log(self, ctx: Any) -> None:
        self.logs.append((ctx.step, dict(ctx.metrics)))


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def trainer(folder: Path, data: Any, *callbacks: Callback, precision: Precision | None = None, **options: Any) -> Trainer:
    model = net()
    fused = options.pop("fused", False)
    given = {"max_duration": "1ep", "log_interval": "4st", "output_dir": folder, "run_name": "a", "per_device_batch_size": 4}
    config = TrainingConfig(**{**given, "standard_callbacks": False, "device": "cpu", "max_grad_norm": 1.0, **options})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    schedule = options.get("scheduler") or (lambda position: 1 / (1 + position / 10))
    return Trainer(
        model,
        config,
        data,
        loss=nn.MSELoss(),
        optimizer=optimizer,
        scheduler=schedule,
        callbacks=callbacks,
        precision=precision,
    )


def events(folder: Path) -> list[dict[str, Any]]:
    path = folder / "a" / EVENTS_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def anomaly(**options: Any) -> AnomalyCallback:
    return AnomalyCallback(**{"warmup": 4, "snapshot_every": 4, "renew_every": 4, **options})


CASES = [
    pytest.param(how, accumulation, scaled, fused, id=f"{how}-a{accumulation}{'-fp16' * scaled}{'-fused' * fused}")
    for how in ("nan", "inf", "spike")
    for accumulation in (1, 2)
    for scaled in (False, True)
    for fused in (False, True)
    if not (fused and scaled)
]


@pytest.mark.parametrize(("how", "accumulation", "scaled", "fused"), CASES)
def test_skip_leaves_weights_and_optimizer_as_they_were(
    tmp_path: Path, how: str, accumulation: int, scaled: bool, fused: bool
) -> None:
    chosen = windows(accumulation)
    hurt(chosen[13], how)
    witness = Witness()
    run = trainer(
        tmp_path,
        stream(chosen),
        anomaly(nonfinite="skip", spike="skip"),
        witness,
        gradient_accumulation_steps=accumulation,
        fused=fused,
        precision=Scaled() if scaled else None,
    )
    output = run.train()
    overflow = scaled and how != "spike"  # the loss scale's, which leaves it out and does not count it
    assert output.steps == STEPS - overflow, "the step counts"
    assert same(witness.windows[13], witness.windows[14])
    assert not same(witness.windows[12], witness.windows[13]), "negative control"
    assert all(torch.isfinite(value).all() for value in run.model.state_dict().values())
    (event,) = events(tmp_path)
    assert (event["step"], event["window"], event["policy"], event["did"]) == (14, 13, "skip", "left out")
    assert event["kind"] == ("spike" if how == "spike" else "nonfinite")
    kind, log = event["kind"], dict(witness.logs)
    assert log[16][f"anomaly/{kind}"] == 1 and f"anomaly/{kind}" not in log[12]
    assert math.isfinite(log[16]["train/loss"]) == (how == "spike" or overflow), "never hidden from the log"
    assert event["loss"] == {"nan": "NaN", "inf": "Infinity"}.get(how, event["loss"])
    assert how != "spike" or event["loss"] > 1000


PLACES = [  # the last window of an interval, and of the run
    pytest.param("nan", 1, False, False, at, id=f"nan-a1-window{at}") for at in (7, STEPS - 1)
]


@pytest.mark.parametrize(
    ("how", "accumulation", "scaled", "fused", "at"),
    [*(pytest.param(*case.values, 13, id=f"{case.id}-window13") for case in CASES), *PLACES],
)
def test_rollback_is_a_run_that_never_saw_the_window(
    tmp_path: Path, how: str, accumulation: int, scaled: bool, fused: bool, at: int
) -> None:
    """The reference trains on a stream without that window: other numbers of steps, other schedule, other random numbers."""
    options = {"gradient_accumulation_steps": accumulation, "fused": fused}
    without = windows(accumulation)
    del without[at]
    expected = trainer(tmp_path / "reference", stream(without), precision=Scaled() if scaled else None, **options)
    expected.train()
    chosen = windows(accumulation)
    hurt(chosen[at], how)
    callback = anomaly(nonfinite="rollback", spike="rollback")
    run = trainer(tmp_path, stream(chosen), callback, precision=Scaled() if scaled else None, **options)
    output = run.train()
    assert output.steps == STEPS - 1 == expected.output.steps
    assert same(run.model.state_dict(), expected.model.state_dict())
    assert same(run.ctx.optimizer.state_dict(), expected.ctx.optimizer.state_dict())
    assert run.ctx.samples == expected.ctx.samples
    assert output.losses[-1] == expected.output.losses[-1]
    assert output.losses == [pair for pair in output.losses if math.isfinite(pair[1])]
    assert callback.left_out == [(0, at)]
    (event,) = events(tmp_path)
    assert event["did"] == f"went back to step {at - at % 4}"


@component
class Saves(Callback):
    """Keeps the state after one step, of its last repetition, or begins with such a state."""

    def __init__(self, at: int = -1, saved: Any = None) -> None:
        self.at, self.saved = at, saved

    def on_restore(self, ctx: Any) -> None:
        if self.saved is not None:
            ctx.load_state_dict(self.saved)

    def on_step_end(self, ctx: Any) -> None:
        if ctx.step == self.at:
            self.saved = copy.deepcopy(ctx.state_dict())


@pytest.mark.parametrize(("at", "told"), [(6, 8), (13, 16), (STEPS - 1, STEPS - 1)])
def test_it_is_told_in_the_log_of_its_step_wherever_the_run_went_back_to(tmp_path: Path, at: int, told: int) -> None:
    """As in a run that was killed, which has its snapshots elsewhere; the end of the run may be earlier than the step."""
    chosen = windows()
    hurt(chosen[at], "nan")
    for every in (1, 8):  # steps 4 or 8 at most before the log
        witness = Witness()
        callback = anomaly(nonfinite="rollback", snapshot_every=every)
        trainer(tmp_path / f"{every}", stream(chosen), callback, witness).train()
        assert [step for step, log in dict(witness.logs).items() if "anomaly/nonfinite" in log and step < STEPS] == [told]
    assert len({event["did"] for every in (1, 8) for event in events(tmp_path / f"{every}")}) == 2, "two places"


def test_it_is_told_by_a_run_that_was_interrupted_between_going_back_and_the_log(tmp_path: Path) -> None:
    chosen = windows()
    hurt(chosen[13], "nan")
    first, witness = Saves(at=14), Witness()
    trainer(tmp_path, stream(chosen), anomaly(nonfinite="rollback"), first).train()
    trainer(tmp_path, stream(chosen), anomaly(nonfinite="rollback"), Saves(saved=first.saved), witness).train()
    assert [(step, log.get("anomaly/nonfinite")) for step, log in witness.logs] == [(16, 1.0), (20, None), (23, None)]


def test_rollback_over_epochs_and_two_windows_of_shuffled_data(tmp_path: Path) -> None:
    """Map-style data: a sample that is broken comes once in each pass, in another window."""
    rows = [(x[i], y[i]) for [(x, y)] in windows() for i in range(4)]
    rows[17] = (torch.full((3,), math.nan), rows[17][1])
    callback = anomaly(nonfinite="rollback")
    run = trainer(tmp_path, rows, callback, max_duration="3ep", log_interval="5st")
    output = run.train()
    assert output.steps == 3 * STEPS - 3
    assert [event["epoch"] for event in events(tmp_path)] == [0, 1, 2]
    assert all(17 in event["samples"] and len(event["samples"]) == 4 for event in events(tmp_path))
    order = run.ctx.sample_order
    assert all(order.step(epoch, window).tolist().count(17) == 1 for epoch, window in callback.left_out)
    assert all(torch.isfinite(value).all() for value in run.model.state_dict().values())


def test_raise_names_step_tensor_and_samples_and_keeps_the_weights(tmp_path: Path) -> None:
    rows = [(x[i], y[i]) for [(x, y)] in windows() for i in range(4)]
    rows[49][0].fill_(math.nan)
    witness = Witness()
    run = trainer(tmp_path, rows, anomaly(), witness, dataloader={"shuffle": False})
    with pytest.raises(ModelError, match=r"NaN or infinity in loss at step 13 .*\[48, 49, 50, 51\]"):
        run.train()
    assert run.ctx.step == 16, "found at the next logging step"
    assert same(witness.before[13], witness.after[13])
    assert all(torch.isfinite(value).all() for value in run.model.state_dict().values())


def test_ignore_only_tells(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chosen = windows()
    hurt(chosen[13], "spike")
    witness = Witness()
    with caplog.at_level(logging.WARNING, "drivetrain.anomaly"):
        trainer(tmp_path, stream(chosen), anomaly(), witness).train()
    assert not same(witness.before[14], witness.after[14])
    assert [event["did"] for event in events(tmp_path)] == ["nothing"]
    assert "a spike in gradient of 3.weight at step 14" in caplog.text
    alone = trainer(tmp_path / "alone", stream(chosen))
    alone.train()
    assert same(witness.after[STEPS][0], dict(alone.model.state_dict()))


def test_one_policy_may_ignore_what_the_other_leaves_out(tmp_path: Path) -> None:
    for nonfinite, spike, changed in (("skip", "ignore", 10), ("ignore", "skip", 14)):
        chosen = windows()
        hurt(chosen[9], "spike")
        hurt(chosen[13], "nan")
        witness = Witness()
        trainer(tmp_path / nonfinite, stream(chosen), anomaly(nonfinite=nonfinite, spike=spike), witness).train()
        kept = 24 - changed
        assert not same(witness.before[changed], witness.after[changed])
        assert same(witness.before[kept], witness.after[kept])


def test_a_nan_in_one_gradient_is_named(tmp_path: Path) -> None:
    @component
    class Spoil(Callback):
        @hook(tryfirst=True)
        def on_backward(self, ctx: Any) -> None:
            if ctx.step == 9:
                ctx.model[3].weight.grad[0, 3] = math.inf

    trainer(tmp_path, stream(windows()), anomaly(nonfinite="skip"), Spoil()).train()
    (event,) = events(tmp_path)
    assert (event["tensor"], event["grad_norm"], event["step"]) == ("gradient of 3.weight", "Infinity", 10)
    assert isinstance(event["loss"], float)


def test_sparse_gradients_are_judged(tmp_path: Path) -> None:
    model = nn.Sequential(nn.EmbeddingBag(8, 4, sparse=True), nn.Linear(4, 1))
    data = [(torch.tensor([i % 3, 2]), torch.full((1,), math.nan if i == 9 else 1.0)) for i in range(16)]
    config = TrainingConfig(
        max_duration="4st",
        per_device_batch_size=4,
        standard_callbacks=False,
        device="cpu",
        output_dir=tmp_path,
        max_grad_norm=False,
    )
    parts: Any = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "loss": nn.MSELoss(), "precision": Precision()}
    Trainer(model, config, data, callbacks=[anomaly(nonfinite="skip")], **parts).train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_spikes_of_the_loss(tmp_path: Path) -> None:
    chosen = windows()
    hurt(chosen[13], "spike")
    trainer(tmp_path, stream(chosen), anomaly(spike="skip", norm_factor=None, loss_factor=100.0)).train()
    (event,) = events(tmp_path)
    assert (event["tensor"], event["kind"], event["step"]) == ("loss", "spike", 14)


def test_overflow_of_a_loss_scale_is_no_anomaly(tmp_path: Path) -> None:
    run = trainer(tmp_path, stream(windows()), anomaly(nonfinite="skip"), precision=Scaled(scale=2.0**127))
    run.train()
    assert run.ctx.skipped_steps > 0
    assert events(tmp_path) == []


def test_the_means_are_those_of_the_good_steps(tmp_path: Path) -> None:
    """Against the definition in plain numbers."""
    chosen = windows()
    hurt(chosen[13], "nan")
    norms: list[float] = []

    @component
    class Norms(Callback):
        def on_clipped(self, ctx: Any) -> None:
            norms.append(ctx.grad_norm.item())

    callback = anomaly(nonfinite="skip", decay=0.9)
    trainer(tmp_path, stream(chosen), callback, Norms()).train()
    mean, seen = 0.0, 0
    for norm in norms:
        if math.isfinite(norm):
            seen += 1
            mean += max(1 / seen, 1 - 0.9) * (norm - mean)
    state = callback.state_dict()["detector"]
    assert state["seen"] == seen == STEPS - 1
    assert float(state["means"][1]) == pytest.approx(mean, rel=1e-5)


@component
class Restore(Callback):
    """Stands for a checkpoint plugin."""

    saved: Any

    def on_restore(self, ctx: Any) -> None:
        ctx.load_state_dict(self.saved)


@pytest.mark.parametrize("at", [3, 10, 14, 19])  # before, between logs, after the window but before its log, after
def test_resume(tmp_path: Path, at: int) -> None:
    chosen = windows()
    hurt(chosen[12], "nan")
    whole = anomaly(nonfinite="skip")
    expected = trainer(tmp_path / "whole", stream(chosen), whole)
    expected.train()
    first = trainer(tmp_path, stream(chosen), anomaly(nonfinite="skip"))
    for step in first.steps():
        if step.number == at:
            saved = copy.deepcopy(first.state_dict())
            break
    second = anomaly(nonfinite="skip")
    resumed = trainer(tmp_path, stream(chosen), second, Restore(saved=saved))
    resumed.train()
    assert same(resumed.model.state_dict(), expected.model.state_dict())
    assert same(second.state_dict(), whole.state_dict())
    assert {event["step"] for event in events(tmp_path)} == {13}


def test_a_window_left_out_stays_left_out_after_a_resume(tmp_path: Path) -> None:
    chosen, without = windows(), windows()
    hurt(chosen[9], "nan")
    del without[9]
    expected = trainer(tmp_path / "reference", stream(without), max_duration="2ep")
    for step in expected.steps():  # the second pass of the other run has the window, and leaves it out as well
        if step.number == 15:
            break
    run = trainer(tmp_path, stream(chosen), anomaly(nonfinite="rollback"))
    for step in run.steps():
        if step.number == 15 and run.ctx.skipped_steps:
            saved = copy.deepcopy(run.state_dict())
            break
    assert same(run.model.state_dict(), expected.model.state_dict())
    resumed = trainer(tmp_path, stream(chosen), anomaly(nonfinite="rollback"), Restore(saved=saved))
    resumed.train()
    assert resumed.ctx.left_out == {(0, 9)}
    assert resumed.output.steps == STEPS - 1


@component
class Stop(Callback):
    at: int

    def on_step_end(self, ctx: Any) -> None:
        if ctx.step == self.at:
            ctx.trainer.stop("enough")


@component
class Save(Callback):
    """Stands for a checkpoint plugin: at the end of a run, as after an interruption, or after a step, as before a kill."""

    at: int | None = None
    saved: Any = None

    def on_step_end(self, ctx: Any) -> None:
        if ctx.step == self.at:
            self.saved = copy.deepcopy(ctx.state_dict())

    def on_run_end(self, ctx: Any) -> None:
        if self.at is None:
            self.saved = copy.deepcopy(ctx.state_dict())


@pytest.mark.parametrize("how", ["interrupted", "killed"])
@pytest.mark.parametrize("at", [12, 13, 14, 15, 17])  # the bad step is 13, its log 16
def test_a_rollback_over_an_interruption_is_a_run_that_never_saw_the_window(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str, at: int
) -> None:
    without = windows()
    del without[12]
    expected = trainer(tmp_path / "reference", stream(without), anomaly(nonfinite="rollback"))
    expected.train()
    chosen = windows()
    hurt(chosen[12], "nan")
    save = Save() if how == "interrupted" else Save(at=at)
    first = trainer(tmp_path, stream(chosen), anomaly(nonfinite="rollback"), Stop(at=at), save)
    first.train()
    owed = at in (13, 14, 15)
    assert len(events(tmp_path)) == (0 if owed or at == 12 else 1)
    assert ("when the run goes on, it goes back to step 12" in caplog.text) == owed
    assert ("snapshot" in save.saved["components"]["callback:AnomalyCallback"]) == owed, "it is large: only where it is needed"
    callback = anomaly(nonfinite="rollback")
    resumed = trainer(tmp_path, stream(chosen), callback, Restore(saved=save.saved))
    assert resumed.train().steps == STEPS - 1
    assert same(resumed.model.state_dict(), expected.model.state_dict())
    assert same(resumed.ctx.optimizer.state_dict(), expected.ctx.optimizer.state_dict())
    assert same(callback.state_dict()["detector"], expected.ctx.run.components[-1].state_dict()["detector"])
    assert callback.left_out == [(0, 12)]
    assert [(event["step"], event["did"]) for event in events(tmp_path)] == [(13, "went back to step 12")]


def test_negative_control_without_the_snapshot_the_window_counts(tmp_path: Path) -> None:
    chosen, save = windows(), Save(at=14)
    hurt(chosen[12], "nan")
    trainer(tmp_path, stream(chosen), anomaly(nonfinite="rollback"), save, Stop(at=14)).train()
    del save.saved["components"]["callback:AnomalyCallback"]["snapshot"]
    resumed = trainer(tmp_path, stream(chosen), anomaly(nonfinite="rollback"), Restore(saved=save.saved))
    assert resumed.train().steps == STEPS


def test_a_second_sitting_in_the_same_process_goes_back(tmp_path: Path) -> None:
    without, chosen = windows(), windows()
    del without[12]
    hurt(chosen[12], "nan")
    expected = trainer(tmp_path / "reference", stream(without))
    expected.train()
    run = trainer(tmp_path, stream(chosen), anomaly(nonfinite="rollback"), Stop(at=14))
    assert [run.train().steps for _ in range(3)] == [14, 14, STEPS - 1], "it comes to step 14 twice"
    assert same(run.model.state_dict(), expected.model.state_dict())


def test_too_many_rollbacks_end_the_run(tmp_path: Path) -> None:
    chosen = windows()
    for index in (5, 9, 14):
        hurt(chosen[index], "nan")
    with pytest.raises(ModelError, match="one more than max_rollbacks = 2 windows; its samples are those of a stream"):
        trainer(tmp_path, stream(chosen), anomaly(nonfinite="rollback", max_rollbacks=2)).train()


@pytest.mark.parametrize("policy", ["raise", "skip", "rollback"])
def test_ordinary_steps_read_nothing_from_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Any) -> None:
    """With a fused optimizer; the first step of all is the exception."""
    as_on_a_device(monkeypatch)
    reads: list[int] = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "__index__"):
        original = getattr(torch.Tensor, name)

        def spy(self: Tensor, *args: Any, _original: Any = original) -> Any:
            reads.append(run.ctx.step)
            return _original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, spy)
    chosen = windows()
    run = trainer(tmp_path, stream(chosen), anomaly(nonfinite=policy, spike=policy), fused=True, log_interval="6st")
    run.train()
    assert {step for step in reads if step % 6} == set()
    assert {6, 12} <= set(reads), "the spy must see the reads of logging steps"


@pytest.mark.parametrize("nonfinite", [True, False])
@pytest.mark.parametrize("spikes", [True, False])
@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("counts", [True, False])
def test_the_host_judges_as_the_device_does(nonfinite: bool, spikes: bool, limited: bool, counts: bool) -> None:
    chosen = {"loss_counts": counts, "loss_is_limited": limited, "spikes": spikes, "nonfinite": nonfinite}
    there, here = judge_for(torch.device("cpu"), **chosen), judge_at_hand(**chosen)
    assert (there is None) == (here is None) == (not nonfinite and not spikes)
    if there is None or here is None:
        return
    limits = torch.tensor([2.0, 3.0])
    values = [0.0, -1.0, 2.0, 3.0, 3.0000002, 100.0, math.nan, math.inf, -math.inf]
    for loss, norm in itertools.product(values, values):
        tensors = torch.tensor(loss), torch.tensor(norm)
        told = bool(there(*tensors, limits if limited else limits[1]))
        assert here(*(t.item() for t in tensors), limits.tolist()) == told, (loss, norm)


def test_bad_input() -> None:
    for options in ({"spike": "panic"}, {"norm_factor": 1.0}, {"warmup": 0}, {"decay": 1.0}, {"max_rollbacks": 0}):
        with pytest.raises(ConfigError):
            make_component("callback", {"use": "anomaly", **options})
