from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drivetrain import Callback, CallbackContext, Component, ConfigError, DrivetrainError, TrainingConfig, component
from drivetrain.rng import mix, seed_all
from drivetrain_bench import Report, Speed, bench
from drivetrain_bench.advice import Change, changes
from drivetrain_bench.command import Bench
from drivetrain_bench.loops import by_engine, by_hand, trainer
from drivetrain_bench.report import Advice


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.layers(x) - y).square().mean()


class Rows(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return {"x": x, "y": y}


@component
class Model(Component):
    kind: ClassVar[str] = "model"

    def make_model(self, ctx: CallbackContext) -> nn.Module:
        return Net()


@component
class Data(Component):
    kind: ClassVar[str] = "dataset"

    def make_dataset(self, ctx: CallbackContext) -> Any:
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        return Rows(x, x.sum(1, keepdim=True))


def config(**more: Any) -> TrainingConfig:
    given: dict[str, Any] = {"model": Model(), "data": Data(), "max_duration": "1ep", "per_device_batch_size": 8}
    given |= {"optimizer": {"use": "adamw", "lr": 0.01}, "precision": "fp32", "device": "cpu", "standard_callbacks": False}
    return TrainingConfig(**(given | more))


@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 2, "max_grad_norm": False}, {"precision": "bf16"}])
def test_the_loop_by_hand_does_the_same_work(tmp_path: Path, more: dict[str, Any]) -> None:
    """Bit by bit, over the end of an epoch; were it to leave something out, the comparison would be unfair."""
    weights = []
    for name, loop in (("hand", by_hand), ("engine", by_engine)):
        made = trainer(config(**more), tmp_path / name, False)
        if name == "hand":  # the engine seeds its steps by itself
            seed_all(mix(made.config.seed, 0), made.ctx.device)
        steps = loop(made)
        for _ in itertools.islice(steps, 11):
            pass
        weights.append(torch.cat([p.detach().flatten() for p in made.model.parameters()]))
        steps.close()  # type: ignore[attr-defined]
    assert torch.equal(*weights)
    fresh = trainer(config(**more), tmp_path / "fresh", False)
    assert not torch.equal(weights[0], torch.cat([p.detach().flatten() for p in fresh.model.parameters()]))


def test_a_report_has_all_that_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling, which takes long, is left out here."""
    monkeypatch.setattr(
        "drivetrain_bench.measure.changes", lambda *given: (c for c in changes(*given) if "compile" not in c.text)
    )
    said: list[str] = []
    report = bench(config(output_dir=tmp_path / "runs"), steps=2, turns=2, say=said.append)
    assert list(report.speeds) == ["loop by hand", "engine, no callbacks", "engine, your callbacks"]
    assert all(len(speed.seconds) == 2 and speed.samples == 8 for speed in report.speeds.values())
    assert report.ratio("loop by hand") == 1.0
    assert 0.01 < report.ratio("engine, no callbacks") < 100
    tried = [text.removeprefix("with ") for text in said if text.startswith("with ")]
    assert tried and sorted(tried) == sorted(row.change for row in report.advice)
    text = str(report)
    assert "× by hand" in text and "what would be faster" in text
    assert not (tmp_path / "runs").exists(), "the configuration's own runs are left alone"
    assert json.loads(json.dumps(report.plain()))["facts"]["precision"] == "fp32"


@component
class Chatty(Callback):
    """Counts, and prints."""

    seen: ClassVar[list[int]] = []

    def on_step_end(self, ctx: CallbackContext) -> None:
        self.seen.append(ctx.step)
        print("chatty")


def test_callbacks_take_part_in_one_of_three_and_are_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    Chatty.seen.clear()
    bench(config(callbacks=[Chatty()]), steps=3, turns=1, advice=False)
    assert Chatty.seen[:8] == list(range(1, 9)), "two steps, a turn to warm up and one that counts"
    assert Chatty.seen[8:] in ([], list(range(1, 9))), "once more for where the time goes, with drivetrain-goodput"
    assert "chatty" not in capsys.readouterr().out


def test_no_worker_process_outlives_a_bench() -> None:
    before = multiprocessing.active_children()
    bench(config(dataloader={"num_workers": 1}), steps=1, turns=1, advice=False)
    assert multiprocessing.active_children() == before


class Interrupting(Net):
    """A signal arrives in one of all forwards, whichever training's it is."""

    signals: ClassVar[dict[int, signal.Signals]] = {}  # by the number of the forward

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.signals.update({number - 1: name for number, name in self.signals.items()})
        if (number := self.signals.pop(0, None)) is not None:
            self.signals.clear()
            signal.raise_signal(number)
        return super().forward(x, y)


@component
class InterruptingModel(Model):
    def make_model(self, ctx: CallbackContext) -> nn.Module:
        return Interrupting()


@component
class Last(Callback):
    """Notes whether there is a folder to save to when the run ends."""

    ends: ClassVar[list[bool]] = []

    def on_run_end(self, ctx: CallbackContext) -> None:
        self.ends.append(ctx.run_dir.is_dir() and ctx.config.output_dir.name in os.listdir(tempfile.gettempdir()))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary directory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """A process started in the background of a script ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("forward", [1, 3, 5, 6, 7, 14])
def test_all_trainings_have_ended_when_their_folder_goes(temporary: Path, forward: int) -> None:
    """The interrupted one, and those that wait for their turn: they may save in their end."""
    Last.ends.clear()
    Interrupting.signals = {forward: signal.SIGINT}
    with pytest.raises(KeyboardInterrupt) as caught:  # which keeps what is alive
        bench(config(model=InterruptingModel(), callbacks=[Last()]), steps=2, turns=1, advice=False)
    assert Last.ends == [True] * (forward > 4)
    assert not list(temporary.iterdir())
    del caught


def test_termination_ends_the_command_as_ctrl_c_does(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = temporary / "run.toml"
    file.write_text("seed = 1\n")
    monkeypatch.setattr("drivetrain.load_training_config", lambda *_, **__: config(model=InterruptingModel()))
    parser, before = argparse.ArgumentParser(), signal.getsignal(signal.SIGTERM)
    Bench().add_arguments(parser)
    Interrupting.signals = {5: signal.SIGTERM}
    with pytest.raises(KeyboardInterrupt):
        Bench().run(parser.parse_args([str(file), "--no-advice"]))
    assert [path.name for path in temporary.iterdir()] == ["run.toml"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("before", [None, "/somewhere"])
def test_the_command_keeps_no_compiled_code(temporary: Path, monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    name, file = "TORCHINDUCTOR_CACHE_DIR", temporary / "run.toml"
    file.write_text("seed = 1\n")
    monkeypatch.setenv(name, before) if before else monkeypatch.delenv(name, raising=False)
    seen: list[str | None] = []
    monkeypatch.setattr("drivetrain_bench.measure.bench", lambda *_, **__: seen.append(os.environ.get(name)))
    parser = argparse.ArgumentParser()
    Bench().add_arguments(parser)
    Bench().run(parser.parse_args([str(file)]))
    assert Path(str(seen[0])).parent == temporary and os.environ.get(name) == before
    assert [path.name for path in temporary.iterdir()] == ["run.toml"]


@component
class Stops(Callback):
    """As a training that early stopping ends."""

    def on_step_end(self, ctx: CallbackContext) -> None:
        if ctx.step == 4:
            ctx.stop("good enough")


def test_a_run_that_a_callback_ends_is_said() -> None:
    with pytest.raises(DrivetrainError, match="ended after 4 steps"):
        bench(config(callbacks=[Stops()]), steps=2, turns=2, advice=False)


@component
class WithEvaluation(Data):
    def make_eval_dataset(self, ctx: CallbackContext) -> Any:
        return self.make_dataset(ctx)


@component
class Watches(Callback):
    """As one that needs evaluations."""

    evaluations: ClassVar[list[int]] = []

    def on_run_start(self, ctx: CallbackContext) -> None:
        if ctx.config.eval_interval is None or ctx.eval_batches == 0:
            raise DrivetrainError("it watches eval/loss")

    def on_evaluate_start(self, ctx: CallbackContext) -> None:
        self.evaluations.append(ctx.step)


def test_evaluation_is_left_out_and_that_is_said() -> None:
    """A callback that needs evaluations is none the wiser."""
    Watches.evaluations.clear()
    more: dict[str, Any] = {"eval_interval": "1st", "eval_at_start": True, "callbacks": [Watches()]}
    report = bench(config(data=WithEvaluation(), **more), steps=2, turns=1, advice=False)
    assert Watches.evaluations == []
    assert "left out: evaluation (eval_interval = 1st)" in str(report)
    assert "evaluation" in report.plain()["left_out"]
    for other in (config(data=WithEvaluation(), eval_interval=False), config()):
        assert "left out" not in str(bench(other, steps=1, turns=1, advice=False))


def test_a_change_that_does_not_run_is_said_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = [Change("precision = 'none such'", {"precision": "none such"}), Change("the same", {"seed": 1}, rounds=True)]
    monkeypatch.setattr("drivetrain_bench.measure.changes", lambda *_: iter(tried))
    broken = {row.change: row for row in bench(config(), steps=1, turns=1).advice}
    assert broken["precision = 'none such'"].gain is None
    assert "none such" in broken["precision = 'none such'"].note
    same = broken["the same"]
    assert same.gain is not None and same.gain > 0 and "after as many steps" in same.note


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, ["per_device_batch_size = 16"]),
        ({"gradient_accumulation_steps": 4}, ["per_device_batch_size = 16, gradient_accumulation_steps = 2"]),
        ({"global_batch_size": 32}, ["per_device_batch_size = 16"]),
        ({"global_batch_size": 24}, []),
        ({"gradient_accumulation_steps": 3}, ["per_device_batch_size = 16"]),
    ],
)
def test_batches_that_are_tried(more: dict[str, Any], expected: list[str]) -> None:
    found = [str(change) for change in changes(config(compile=True, **more), "fp64", "cpu", 0.0)]
    assert found == expected


def test_other_changes_that_are_tried() -> None:
    def texts(waiting: float = 0.0, precision: str = "bf16", **more: Any) -> Iterator[str]:
        return (change.text.partition(" =")[0] for change in changes(config(**more), precision, "cpu", waiting))

    assert "compile" in texts() and "compile" not in texts(compile=True)
    assert "precision" in texts(precision="fp32") and "precision" not in texts(precision="fp64")
    assert 'precision = "fp32"' in [change.text for change in changes(config(), "bf16", "cpu", 0.0)]
    assert not [change for change in changes(config(), "bf16", "NVIDIA H200", 0.0) if "fp32" in change.text]
    assert "dataloader.num_workers" in texts(0.5) and "dataloader.num_workers" not in texts(0.001)
    assert "dataloader.num_workers" not in texts(0.5, callbacks=["workers_finder"]), "which finds their number in each run"
    assert "activation_checkpointing" in texts(activation_checkpointing=True)


def test_the_memory_format_is_tried_for_models_with_convolutions() -> None:
    def texts(convolves: bool, **more: Any) -> list[str]:
        return [change.text for change in changes(config(**more), "bf16", "cpu", 0.0, convolves)]

    assert "channels_last = true" in texts(True) and "channels_last = true" not in texts(False)
    assert "channels_last = true" not in texts(True, channels_last=True)


def test_graphs_are_tried_on_a_gpu_where_they_are_not_in_use() -> None:
    def tried(device: str, *callbacks: Any) -> bool:
        return any("cuda_graphs" in change.text for change in changes(config(callbacks=list(callbacks)), "bf16", device, 0.0))

    (graphs,) = (c for c in changes(config(callbacks=["gc"]), "bf16", "NVIDIA H200", 0.0) if "graphs" in c.text)
    assert graphs.keys == {"callbacks": ["gc", "cuda_graphs"]}
    assert tried("NVIDIA H200") and tried("NVIDIA H200", "gc", {"use": "ema"}) and tried("NVIDIA H200", Chatty())
    assert (
        not tried("cpu")
        and not tried("NVIDIA H200", "cuda_graphs")
        and not tried("NVIDIA H200", {"use": "cuda_graphs", "most": 2})
    )


class Slow(Rows):
    def __getitem__(self, index: int) -> Any:
        time.sleep(0.004)
        return super().__getitem__(index)


@component
class SlowData(Data):
    def make_dataset(self, ctx: CallbackContext) -> Any:
        return Slow(*super().make_dataset(ctx).tensors)


def test_workers_gain_nothing_by_what_they_fetch_while_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetching is nearly all that there is to do: one worker does it no faster."""
    change = Change("a worker", {"dataloader": {"num_workers": 1}})
    monkeypatch.setattr("drivetrain_bench.measure.changes", lambda *_: iter([change]))
    (row,) = bench(config(data=SlowData()), steps=2, turns=2).advice
    assert row.gain is not None and 0.5 < row.gain < 1.4


@component
class Sleeps(Callback):
    """Takes most of a step's time; each of two trainings at the same time needs one of its own."""

    run: Any = None

    def on_run_start(self, ctx: CallbackContext) -> None:
        assert self.run is None
        self.run = ctx

    def on_step_end(self, ctx: CallbackContext) -> None:
        assert self.run is ctx
        time.sleep(0.01 if ctx.config.seed == 0 else 0.001)


def test_changes_are_tried_on_the_configuration_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its callbacks, and those that a change adds."""
    Chatty.seen.clear()
    tried = [Change("more", {"callbacks": [Sleeps(), Chatty()]}), Change("seed", {"seed": 1})]
    monkeypatch.setattr("drivetrain_bench.measure.changes", lambda *_: iter(tried))
    report = bench(config(callbacks=[Sleeps()]), steps=2, turns=1)
    gains = {row.change: row.gain for row in report.advice}
    assert Chatty.seen and gains["more"] is not None and 0.7 < gains["more"] < 1.4
    assert gains["seed"] is not None and gains["seed"] > 2


def test_numbers_become_advice_in_words() -> None:
    fast, slow = Speed((1.0, 1.0), 8, 0, 1.0), Speed((2.0, 4.0), 16, 0, 1.0)
    assert slow.over(fast) == 1.5, "of each sample: (2 + 4) / 2 over twice the samples"
    rows = (Advice("a", 1.5, "note"), Advice("b", 1.01), Advice("c", None, "fails: X"))
    facts = {"device": "cpu", "precision": "fp32", "parameters": 1e6, "torch": "2"}
    text = str(Report(facts, {"loop by hand": fast}, {}, {"forward and backward": 3.0, "rest": 1.0}, rows))
    assert "1.50 × with a (note)" in text and "no gain from b: 1.01 ×" in text and "no gain from c: fails: X" in text
    assert "forward and backward          75.0 %" in text


def test_what_only_some_turns_gain_is_no_sure_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """And rows are broken between words."""
    monkeypatch.setenv("COLUMNS", "60")
    one, other = Speed((1.0,) * 5, 8, 0, 1.0), Speed((0.85, 1.16, 1.19, 1.20, 1.22), 8, 0, 1.0)
    assert other.quartiles(one) == pytest.approx((1.16, 1.19, 1.20)) and other.over(one) == pytest.approx(1.19)
    assert Speed((2.0,), 8, 0, 1.0).quartiles(Speed((1.0,), 8, 0, 1.0)) == (2.0, 2.0, 2.0)
    note = "gain for each sample; steps of twice the samples want another learning rate"
    rows = (Advice("a = 16", 1.5, note, (1.4, 1.6)), Advice("b", 1.16, "", (0.9, 1.2)))
    facts = {"device": "cpu", "precision": "fp32", "parameters": 1e6, "torch": "2"}
    report = Report(facts, {"loop by hand": one}, {}, {}, rows)
    assert "no sure gain from b: 1.16 × (0.90 – 1.20)" in str(report)
    assert "1.50 × (1.40 – 1.60) with a = 16 (gain for each sample;\n      steps" in str(report)
    assert report.plain()["advice"][1]["quartiles"] == (0.9, 1.2)


def test_problems_found_while_building_are_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.toml"
    monkeypatch.setattr("drivetrain.load_training_config", lambda *_, **__: config(global_batch_size=12))
    parser = argparse.ArgumentParser()
    Bench().add_arguments(parser)
    with pytest.raises(ConfigError) as caught:
        Bench().run(parser.parse_args([str(file)]))
    assert caught.value.source == str(file)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DrivetrainError, match="names its model and its data"):
        bench(TrainingConfig())
    file = tmp_path / "run.toml"
    file.write_text("seed = 1\n")
    parser = argparse.ArgumentParser()
    Bench().add_arguments(parser)
    with pytest.raises(DrivetrainError, match="at least 1"):
        Bench().run(parser.parse_args([str(file), "--steps", "0"]))
