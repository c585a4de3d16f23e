"""The logging callback and the jsonl tracker, through real runs; trackers of the tests stand for those of third parties."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import drivetrain_logging.callback
from drivetrain import Callback, ConfigError, Tracker, Trainer, TrainingConfig, component, make_component, state
from drivetrain_logging import CsvTracker, JsonlTracker, LoggingCallback


def trainer(tmp_path: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """Twelve steps of a linear model, four to an epoch, logged every second one, evaluated every fourth."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    data = [(torch.randn(2), torch.randn(1)) for _ in range(8)]
    given = {"max_duration": "12st", "log_interval": "2st", "eval_interval": "4st", "per_device_batch_size": 2}
    given |= {"output_dir": tmp_path, "run_name": "run", "standard_callbacks": False, "resume": "never"}
    config = TrainingConfig(**{**given, **options})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    return Trainer(model, config, data, data, loss=nn.functional.mse_loss, optimizer=optimizer, callbacks=callbacks)


@component
class Restore(Callback):
    """Stands for a checkpoint plugin."""

    saved: dict[str, Any]

    def on_restore(self, ctx: Any) -> None:
        ctx.load_state_dict(self.saved)


@component
class Recorder(Tracker):
    """A tracker that remembers its calls, and fails when it is told to."""

    fail_in: str = ""
    calls: list[Any] = state(factory=list)

    def _call(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        if name == self.fail_in:
            raise OSError(28, "No space left on device")

    def start(self, ctx: Any) -> None:
        self._call("start", ctx.step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._call("log", dict(values), step)

    def text(self, name: str, text: str, step: int) -> None:
        self._call("text", name, text, step)

    def close(self) -> None:
        self._call("close")


def rows(tmp_path: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The file's lines, read by a parser that refuses what JSON does not have."""
    lines = (tmp_path / "run" / name).read_bytes().decode().splitlines()
    return [json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is no JSON")) for line in lines]


# -- jsonl -----------------------------------------------------------------------------------------------------------------


def test_jsonl_has_a_line_for_each_log_and_each_evaluation(tmp_path: Path) -> None:
    began = time.time()
    output = trainer(tmp_path, LoggingCallback(trackers=["jsonl"])).train()
    found = rows(tmp_path)
    logs = [row for row in found if "train/loss" in row]
    assert [(row["step"], row["train/loss"]) for row in logs] == output.losses
    assert [row["step"] for row in found if "eval/loss" in row] == [4, 8, 12]
    assert [row["epoch"] for row in logs] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert all(row["train/lr"] == 0.125 for row in logs)
    assert all(began - 1 < row["time"] < time.time() + 1 for row in found)  # clocks are set now and then
    assert [list(row)[:3] for row in found] == [["step", "time", "epoch"]] * 9


def test_jsonl_writes_nan_and_infinity_as_texts_that_float_reads(tmp_path: Path) -> None:
    @component
    class Odd(Callback):
        def on_log(self, ctx: Any) -> None:
            ctx.metrics |= {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "tiny": 5e-324}

    trainer(tmp_path, LoggingCallback(trackers=["jsonl"]), Odd()).train()
    row = rows(tmp_path)[0]
    assert (row["nan"], row["inf"], row["-inf"], row["tiny"]) == ("NaN", "Infinity", "-Infinity", 5e-324)
    assert math.isnan(float(row["nan"])) and float(row["-inf"]) == -math.inf


@pytest.mark.parametrize("tracker", ["jsonl", "csv"])
def test_odd_names_stay_what_they_are_and_take_no_columns_place(tmp_path: Path, tracker: str) -> None:
    names = ["a/b\\c", "new\nline", "esc\x1b[31m", "\u202ebidi", 'comma, "quote"', "step", "epoch", ""]

    @component
    class Odd(Callback):
        def on_log(self, ctx: Any) -> None:
            ctx.metrics |= {name: float(index) for index, name in enumerate(names)}

    trainer(tmp_path, LoggingCallback(trackers=[tracker]), Odd(), eval_interval=False).train()
    text = (tmp_path / "run" / f"metrics.{tracker}").read_bytes().decode()
    found = rows(tmp_path) if tracker == "jsonl" else list(csv.DictReader(io.StringIO(text, newline="")))
    assert [int(row["step"]) for row in found] == [2, 4, 6, 8, 10, 12]
    expected = {f"{name}_" if name in ("step", "epoch") else name: float(index) for index, name in enumerate(names)}
    if tracker == "csv":  # a sheet, or a terminal, would act on them
        expected = {name.encode("unicode_escape").decode().replace("\\\\", "\\"): value for name, value in expected.items()}
    assert {name: float(found[0][name]) for name in expected} == expected
    assert [float(row["epoch"]) for row in found] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


def test_jsonl_lines_are_on_disk_at_once(tmp_path: Path) -> None:
    run = trainer(tmp_path, LoggingCallback(trackers=["jsonl"]))
    for step in run.steps():
        if step.number % 2 == 0:
            assert rows(tmp_path)[-1]["step"] == step.number


def test_jsonl_after_a_resume_is_as_if_the_run_had_never_stopped(tmp_path: Path) -> None:
    """Killed at step 11, resumed from step 6: lines beyond 6, one of them torn, are taken back."""
    trainer(tmp_path / "whole", LoggingCallback(trackers=["jsonl"])).train()

    first, saved = trainer(tmp_path, LoggingCallback(trackers=["jsonl"])), {}
    for step in first.steps():
        if step.number == 6:
            saved = torch.load(_saved(first, tmp_path), weights_only=False)
        if step.number == 11:
            break
    path = tmp_path / "run" / "metrics.jsonl"
    assert rows(tmp_path)[-1]["step"] == 10, "there is something to take back"
    path.write_bytes(path.read_bytes() + b'{"step": 4, "ti')  # a crash in the middle of a write

    trainer(tmp_path, LoggingCallback(trackers=["jsonl"]), Restore(saved=saved)).train()
    without_time = [{k: v for k, v in row.items() if k != "time"} for row in rows(tmp_path)]
    assert without_time == [{k: v for k, v in row.items() if k != "time"} for row in rows(tmp_path / "whole")]
    assert os.listdir(tmp_path / "run") == ["metrics.jsonl"]


def _saved(run: Trainer, folder: Path) -> Path:
    torch.save(run.ctx.state_dict(), folder / "state.pt")
    return folder / "state.pt"


def test_jsonl_goes_on_in_a_second_sitting_of_the_same_trainer(tmp_path: Path) -> None:
    run = trainer(tmp_path, LoggingCallback(trackers=["jsonl"]))
    for step in run.steps():
        if step.number == 5:
            break
    run.train()
    assert [row["step"] for row in rows(tmp_path) if "train/loss" in row] == [2, 4, 6, 8, 10, 12]


def test_jsonl_of_a_run_that_begins_anew_leaves_the_old_one_aside(tmp_path: Path) -> None:
    for _ in range(2):
        trainer(tmp_path, LoggingCallback(trackers=["jsonl"])).train()
    assert len(rows(tmp_path)) == len(rows(tmp_path, "metrics.previous.jsonl")) == 9


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_jsonl_on_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Training goes on, the failure is told once, and lines that the disk refused come out whole when it has room again."""

    @component
    class Disk(Callback):
        def on_step_end(self, ctx: Any) -> None:
            tracker = callback._active[0]
            if ctx.step == 3:
                self.file, self.real = tracker._file, os.dup(tracker._file.fileno())
                os.dup2(os.open("/dev/full", os.O_WRONLY), self.file.fileno())
            if ctx.step == 9:
                os.dup2(self.real, self.file.fileno())

    callback = LoggingCallback(trackers=["jsonl"])
    assert trainer(tmp_path, callback, Disk()).train().steps == 12
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 4, 6, 8, 8, 10, 12, 12]
    assert len(caplog.records) == 1


# -- trackers --------------------------------------------------------------------------------------------------------------


def test_what_a_tracker_is_called_with(tmp_path: Path) -> None:
    tracker = Recorder()
    output = trainer(tmp_path, LoggingCallback(trackers=[tracker])).train()
    names = [call[0] for call in tracker.calls]
    assert names == ["start", "text", *["log"] * 9, "close"]
    logged = [(values, step) for _, values, step in tracker.calls[2:-1]]
    assert [(step, values["train/loss"]) for values, step in logged if "train/loss" in values] == output.losses
    assert logged[-1] == ({"eval/loss": output.metrics["eval/loss"]}, 12)
    _, name, text, step = tracker.calls[1]
    assert (name, step) == ("config", 0)
    assert json.loads(text)["max_duration"] == "12st"


def test_values_that_later_callbacks_add_are_logged(tmp_path: Path) -> None:
    @component
    class Later(Callback):
        def on_log(self, ctx: Any) -> None:
            ctx.metrics["later"] = 1.0

        def on_evaluate_end(self, ctx: Any) -> None:
            ctx.eval_metrics["eval/later"] = 2.0

    trainer(tmp_path, LoggingCallback(trackers=["jsonl"]), Later()).train()
    assert all(row.get("later", row.get("eval/later")) for row in rows(tmp_path))


def test_a_tracker_that_fails_is_told_once_and_the_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = Recorder(fail_in="log")
    output = trainer(tmp_path, LoggingCallback(trackers=[broken, "jsonl"])).train()
    assert output.steps == 12 and output.completed
    assert len(rows(tmp_path)) == 9
    assert [call[0] for call in broken.calls].count("log") == 9, "it is tried again"
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("drivetrain.logging", logging.WARNING)
    said = "tracker:Recorder .* failed to log at step 2: OSError: .* No space left on device. Training goes on."
    assert re.match(said, record.getMessage())


def test_an_error_of_a_server_is_one_line_without_escape_codes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    @component
    class Rude(Tracker):
        def log(self, values: Mapping[str, float], step: int) -> None:
            raise RuntimeError("<html>\n\x1b[31mgo away\r")

    assert trainer(tmp_path, LoggingCallback(trackers=[Rude()])).train().completed
    (record,) = caplog.records
    assert "RuntimeError: <html>\\n\\x1b[31mgo away\\r." in record.getMessage()


@pytest.mark.parametrize(("method", "action"), [("text", "record the configuration"), ("close", "close")])
def test_failures_at_the_ends_do_not_end_a_run_either(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str, action: str
) -> None:
    tracker = Recorder(fail_in=method)
    assert trainer(tmp_path, LoggingCallback(trackers=[tracker])).train().completed
    assert f"failed to {action}" in caplog.text


def test_a_tracker_that_cannot_start_is_an_error_before_training(tmp_path: Path) -> None:
    good, bad = Recorder(), Recorder(fail_in="start")
    run = trainer(tmp_path, LoggingCallback(trackers=[good, bad]))
    with pytest.raises(OSError, match="No space") as raised:
        run.train()
    assert "callback:LoggingCallback" in "".join(raised.value.__notes__)
    assert run.ctx.step == 0
    assert good.calls[-1] == ("close",)


def test_trackers_are_closed_when_the_run_fails(tmp_path: Path) -> None:
    @component
    class Fail(Callback):
        def on_step_end(self, ctx: Any) -> None:
            raise RuntimeError("boom")

    tracker = Recorder()
    with pytest.raises(RuntimeError, match="boom"):
        trainer(tmp_path, LoggingCallback(trackers=[tracker]), Fail()).train()
    assert tracker.calls[-1] == ("close",)


def test_what_a_tracker_remembers_is_there_before_it_starts_again(tmp_path: Path) -> None:
    first = trainer(tmp_path, LoggingCallback(trackers=[Recorder()]))
    saved: dict[str, Any] = {}
    for step in first.steps():
        if step.number == 2:
            saved = torch.load(_saved(first, tmp_path), weights_only=False)
            break
    tracker = Recorder()
    trainer(tmp_path, LoggingCallback(trackers=[tracker]), Restore(saved=saved)).train()
    starts = [call[1] for call in tracker.calls if call[0] == "start"]
    assert starts == [0, 2], "the calls of the first sitting, then those of the second"
    assert [step for *_, step in (c for c in tracker.calls if c[0] == "log")][:2] == [2, 4]


def test_a_tracker_may_be_left_out_after_a_resume(tmp_path: Path) -> None:
    first = trainer(tmp_path, LoggingCallback(trackers=[Recorder()]), max_duration="2st")
    first.train()
    assert first.ctx.state_dict()["components"]["callback:LoggingCallback"]["trackers"]["tracker:Recorder"]
    again = trainer(tmp_path, LoggingCallback(trackers=["jsonl"]), Restore(saved=first.ctx.state_dict()))
    assert again.train().steps == 12


def test_only_rank_zero_writes(tmp_path: Path) -> None:
    tracker = Recorder()
    run = trainer(tmp_path, LoggingCallback(trackers=[tracker]))
    run.ctx.strategy.rank = 1
    run.train()
    assert tracker.calls == [] and not (tmp_path / "run").exists()


def test_by_default_jsonl_and_tensorboard_if_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drivetrain.registry.is_installed", lambda kind, name: False)
    trainer(tmp_path, LoggingCallback()).train()
    assert os.listdir(tmp_path / "run") == ["metrics.jsonl"]
    monkeypatch.setattr("drivetrain.registry.is_installed", lambda kind, name: (kind, name) == ("tracker", "tensorboard"))
    asked = []
    make = drivetrain_logging.callback.make_component

    def spy(kind: str, spec: Any, path: str) -> Any:
        asked.append(spec)
        return Recorder() if spec == "tensorboard" else make(kind, spec, path)

    monkeypatch.setattr("drivetrain_logging.callback.make_component", spy)
    trainer(tmp_path, LoggingCallback()).train()
    assert asked == ["jsonl", "tensorboard"]


def test_jsonl_is_written_beside_whatever_else_is(tmp_path: Path) -> None:
    trainer(tmp_path, LoggingCallback(trackers=["csv"])).train()
    assert {"metrics.csv", "metrics.jsonl"} <= set(os.listdir(tmp_path / "run"))
    assert len(rows(tmp_path)) == 9
    again = trainer(tmp_path / "own", LoggingCallback(trackers=[JsonlTracker()]))
    again.train()
    assert len(rows(tmp_path / "own")) == 9, "and once, where it is among them"


def test_a_tracker_that_is_there_twice_is_refused() -> None:
    """Each value would be written twice."""
    mine = CsvTracker()
    with pytest.raises(ConfigError) as raised:
        LoggingCallback(trackers=["csv", "jsonl", {"use": "csv"}, mine, mine])
    assert [(problem.path, problem.message) for problem in raised.value.problems] == [
        ("trackers[2]", "'csv' is there twice, with the same options: leave one out"),
        ("trackers[4]", "'CsvTracker' is there twice, with the same options: leave one out"),
    ]


def test_mistakes_are_found_with_the_configuration_all_at_once() -> None:
    table = {"use": "logging", "trackers": ["jsnl", {"use": "jsonl", "colour": "red"}, 3]}
    with pytest.raises(ConfigError) as raised:
        make_component("callback", table, "callbacks[2]")
    found = {problem.path: problem.message for problem in raised.value.problems}
    assert set(found) == {
        "callbacks[2].logging.trackers[0]",
        "callbacks[2].logging.trackers[1].jsonl.colour",
        "callbacks[2].logging.trackers[2]",
    }
    assert "Did you mean 'jsonl'" in found["callbacks[2].logging.trackers[0]"]


def test_a_tracker_that_defines_nothing_says_what_it_lacks() -> None:
    @component
    class Empty(Tracker):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty must define log\(values, step\)"):
        Empty().log({}, 0)


def test_no_trackers_no_directory(tmp_path: Path) -> None:
    trainer(tmp_path, LoggingCallback(trackers=[])).train()
    assert not (tmp_path / "run").exists()


def test_the_tracker_is_found_by_its_name() -> None:
    assert isinstance(make_component("tracker", "jsonl"), JsonlTracker)


# -- secrets ---------------------------------------------------------------------------------------------------------------


def test_the_configuration_that_trackers_get_holds_no_secret(tmp_path: Path) -> None:
    @component
    class WithKey(Callback):
        api_key: str = "s3cr3t"

    tracker = Recorder()
    trainer(tmp_path, LoggingCallback(trackers=[tracker]), callbacks=[WithKey()]).train()
    text = tracker.calls[1][2]
    assert "api_key" in text and "s3cr3t" not in text


# -- csv ----------------------------------------------------------------------------------------------------------------------


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class TestCsv:
    def sitting(self, folder: Path, start: int, end: int, offset: float = 0.0, close: bool = True) -> CsvTracker:
        tracker = CsvTracker()
        tracker.start(SimpleNamespace(run_dir=folder, step=start, position_in=lambda unit: 0.5))
        for step in range(start + 2, end + 1, 2):
            tracker.log({"train/loss": step + offset}, step)
            if step % 4 == 0:
                tracker.log({"eval/loss": step + offset + 0.5}, step)
        if close:
            tracker.close()
        return tracker

    def test_a_column_for_each_name(self, tmp_path: Path) -> None:
        self.sitting(tmp_path, 0, 4)
        rows = table(tmp_path)
        assert list(rows[0]) == ["step", "time", "epoch", "train/loss", "eval/loss"]
        assert [(row["step"], row["train/loss"], row["eval/loss"]) for row in rows] == [
            ("2", "2.0", ""),
            ("4", "4.0", ""),
            ("4", "", "4.5"),
        ]

    def test_after_a_resume_no_step_is_there_twice(self, tmp_path: Path) -> None:
        self.sitting(tmp_path, 0, 10, close=False)
        with (tmp_path / "metrics.csv").open("a") as file:
            file.write('12,1767225600,0.5,"12.')  # a crash in the middle of a row
        self.sitting(tmp_path, 6, 12, offset=100.0)
        losses = [(int(row["step"]), float(row["train/loss"])) for row in table(tmp_path) if row["train/loss"]]
        assert losses == [(2, 2.0), (4, 4.0), (6, 6.0), (8, 108.0), (10, 110.0), (12, 112.0)]

    def test_a_run_begun_anew_leaves_the_old_file_beside_it(self, tmp_path: Path) -> None:
        self.sitting(tmp_path, 0, 10)
        self.sitting(tmp_path, 0, 2, offset=100.0)
        assert [row["train/loss"] for row in table(tmp_path)] == ["102.0"]
        assert "10.0" in (tmp_path / "metrics.previous.csv").read_text()

    def test_odd_names_and_values_come_back(self, tmp_path: Path) -> None:
        values = {'a,b/"c"': 1.5, "new\nline": math.nan, "esc\x1b[31m": math.inf, "größe": -math.inf}
        tracker = self.sitting(tmp_path, 0, 2, close=False)
        tracker.log(values, 4)
        tracker.close()
        found = table(tmp_path)[-1]
        names = {"new\nline": "new\\nline", "esc\x1b[31m": "esc\\x1b[31m"}  # what a sheet or a terminal would act on
        assert {name: found[names.get(name, name)] for name in values} == {name: str(value) for name, value in values.items()}
        assert math.isnan(float(found["new\\nline"]))
        self.sitting(tmp_path, 4, 6)
        assert table(tmp_path)[1] == found, "over a resume too"


@component
class Shows(Tracker):
    """Keeps what it is handed."""

    def __attrs_post_init__(self) -> None:
        self.seen: list[Any] = []

    def log(self, values: Any, step: int) -> None:
        pass

    def config(self, values: Any, step: int) -> None:
        self.seen.append(("config", values["seed"], step))

    def histogram(self, name: str, values: Any, step: int) -> None:
        self.seen.append(("histogram", name, step))

    def image(self, name: str, image: Any, step: int) -> None:
        raise RuntimeError("no images here")

    def text(self, name: str, text: str, step: int) -> None:
        self.seen.append((name, text, step))


def test_what_is_shown_reaches_the_trackers_at_the_next_log_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    @component
    class Show(Callback):
        def on_step_end(self, ctx: Any) -> None:
            if ctx.step in (2, 3):
                ctx.show("histogram", "weights", ctx.model.weight)
                ctx.show("image", "kernel", ctx.model.weight)
                ctx.show("text", "sample", "once upon a time")

    shows = Shows()
    model = nn.Linear(2, 1)
    config = TrainingConfig(max_duration="6st", log_interval="2st", output_dir=tmp_path, standard_callbacks=False, device="cpu")
    data = [(torch.ones(2), torch.ones(1))] * 8
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callbacks = [Show(), LoggingCallback(trackers=[shows])]
    Trainer(model, config, data, loss=nn.functional.mse_loss, optimizer=optimizer, callbacks=callbacks).train()
    expected = [("config", 0, 0)]
    for step in (2, 4):
        expected += [("histogram", "weights", step), ("sample", "once upon a time", step)]
    assert shows.seen == expected
    assert caplog.text.count("failed to record the image 'kernel'") == 1, "said once"
