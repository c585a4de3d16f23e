"""The TensorBoard tracker: what it writes is read back with TensorBoard's own reader."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer

from drivetrain import make_component
from drivetrain_tensorboard import TensorboardTracker


def context(tmp_path: Path, step: int = 0) -> Any:
    """As much of a run as a tracker asks for."""
    return SimpleNamespace(run_dir=tmp_path, step=step, resumed=step > 0)


def sitting(tmp_path: Path, start: int, end: int, offset: float = 0.0) -> None:
    """One sitting: a value for each second step after `start`, an evaluation for each fourth."""
    tracker = make_component("tracker", "tensorboard")
    assert isinstance(tracker, TensorboardTracker)
    tracker.start(context(tmp_path, start))
    tracker.text("config", json.dumps({"seed": 0, "sitting": start}, indent=2), start)
    for step in range(start + 2, end + 1, 2):
        tracker.log({"train/loss": step + offset, "train/lr": 0.125}, step)
        if step % 4 == 0:
            tracker.log({"eval/loss": step + offset + 0.5}, step)
    tracker.close()


def board(tmp_path: Path) -> EventAccumulator:
    """What TensorBoard shows of the run."""
    reader = EventAccumulator(
        str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0, "images": 0}
    )
    return reader.Reload()


def scalars(tmp_path: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in board(tmp_path).Scalars(name)]


def test_scalars_and_texts_come_back(tmp_path: Path) -> None:
    sitting(tmp_path, 0, 8)
    assert sorted(board(tmp_path).Tags()["scalars"]) == ["eval/loss", "train/loss", "train/lr"]
    assert scalars(tmp_path, "train/loss") == [(2, 2.0), (4, 4.0), (6, 6.0), (8, 8.0)]
    assert scalars(tmp_path, "eval/loss") == [(4, 4.5), (8, 8.5)]
    (event,) = board(tmp_path).Tensors("config/text_summary")
    lines = event.tensor_proto.string_val[0].decode().splitlines()
    assert all(line.startswith("    ") for line in lines), "shown as it is, not as markdown"
    assert json.loads("\n".join(lines)) == {"seed": 0, "sitting": 0}


def test_after_a_resume_no_step_shows_twice_and_none_is_lost(tmp_path: Path) -> None:
    """Killed at step 10, resumed from step 6; the second sitting's values differ, so that it shows whose are kept."""
    sitting(tmp_path, 0, 10)
    sitting(tmp_path, 6, 12, offset=100.0)
    assert scalars(tmp_path, "train/loss") == [(2, 2.0), (4, 4.0), (6, 6.0), (8, 108.0), (10, 110.0), (12, 112.0)]
    assert scalars(tmp_path, "eval/loss") == [(4, 4.5), (8, 108.5), (12, 112.5)]
    assert [event.step for event in board(tmp_path).Tensors("config/text_summary")] == [0, 6]


def test_without_the_resume_step_the_reader_does_show_steps_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the test above would fail without what `start` does with the step."""
    monkeypatch.setattr("drivetrain_tensorboard.SummaryWriter", _no_purge)
    sitting(tmp_path, 0, 10)
    sitting(tmp_path, 6, 12)
    steps = [step for step, _ in scalars(tmp_path, "train/loss")]
    assert len(steps) > len(set(steps))


def _no_purge(folder: str, **options: Any) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder)


def test_a_run_begun_anew_in_the_same_directory_hides_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also within a second, and if the writers' counter, the end of a file's name, turns from 9 to 10, which sorts before it."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    sitting(tmp_path, 0, 10)
    sitting(tmp_path, 0, 4, offset=100.0)
    assert scalars(tmp_path, "train/loss") == [(2, 102.0), (4, 104.0)]


def test_values_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    """Without a close or a flush: a process that is killed loses a moment of its values, not two minutes."""
    tracker = TensorboardTracker()
    tracker.start(context(tmp_path))
    tracker.log({"train/loss": 1.5}, 10)
    deadline = time.monotonic() + 10
    while "train/loss" not in board(tmp_path).Tags()["scalars"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert scalars(tmp_path, "train/loss") == [(10, 1.5)]
    tracker.close()


def test_nan_and_infinity_stay_what_they_are(tmp_path: Path) -> None:
    tracker = TensorboardTracker()
    tracker.start(context(tmp_path))
    tracker.log({"nan": math.nan, "inf": math.inf}, 1)
    tracker.close()
    assert math.isnan(scalars(tmp_path, "nan")[0][1])
    assert scalars(tmp_path, "inf") == [(1, math.inf)]


def test_a_directory_that_cannot_be_made_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file is in the way")
    with pytest.raises(OSError, match="tensorboard"):
        TensorboardTracker().start(context(tmp_path))


def test_closing_without_a_start_is_allowed() -> None:
    TensorboardTracker().close()


def tracker_at(tmp_path: Path, step: int = 0) -> TensorboardTracker:
    tracker = TensorboardTracker(compared_by=["eval/loss"])
    tracker.start(context(tmp_path, step))
    return tracker


def test_the_configuration_is_there_as_hyperparameters(tmp_path: Path) -> None:
    tracker = tracker_at(tmp_path)
    values = {"seed": 3, "optimizer": {"use": "adamw", "lr": 0.001, "betas": [0.9, 0.95]}, "compile": False}
    tracker.config(values, 0)
    tracker.log({"eval/loss": 0.5}, 4)
    tracker.close()
    content = board(tmp_path).summary_metadata
    (start,) = [m.plugin_data.content for name, m in content.items() if name.endswith("session_start_info")]
    found = HParamsPluginData.FromString(start).session_start_info.hparams
    assert {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()} == {
        "seed": 3,
        "optimizer.use": "adamw",
        "optimizer.lr": 0.001,
        "optimizer.betas": "[0.9, 0.95]",
        "compile": "false",
    }
    (experiment,) = [m.plugin_data.content for name, m in content.items() if name.endswith("experiment")]
    assert [info.name.tag for info in HParamsPluginData.FromString(experiment).experiment.metric_infos] == ["eval/loss"]
    assert json.loads(board(tmp_path).Tensors("config/text_summary")[0].tensor_proto.string_val[0]) == values


def test_histograms_and_images_come_back_over_a_resume(tmp_path: Path) -> None:
    values = torch.cat([torch.zeros(10), torch.ones(5), torch.tensor([math.nan, math.inf])])
    for start, end in ((0, 6), (4, 8)):
        tracker = tracker_at(tmp_path, start)
        for step in range(start + 2, end + 1, 2):
            tracker.histogram("gradients/layer.weight", values, step)
            tracker.image("samples/first", torch.rand(3, 6, 5), step)
        tracker.histogram("nothing", torch.tensor([math.nan]), end)
        tracker.close()
    shown = board(tmp_path)
    assert [event.step for event in shown.Histograms("gradients/layer.weight")] == [2, 4, 6, 8]
    histogram = shown.Histograms("gradients/layer.weight")[0].histogram_value
    assert (histogram.num, histogram.sum, histogram.min, histogram.max) == (15, 5, 0, 1)
    images = shown.Images("samples/first")
    assert [(image.step, image.height, image.width) for image in images] == [(step, 6, 5) for step in (2, 4, 6, 8)]
    assert "nothing" not in shown.Tags()["histograms"]


def test_odd_names_are_shown(tmp_path: Path) -> None:
    tracker = tracker_at(tmp_path)
    tracker.log({"a/b/c": 1.0, "new\nline": 2.0, "esc\x1b[31m": 3.0}, 1)
    tracker.close()
    tags = board(tmp_path).Tags()["scalars"]
    assert "a/b/c" in tags and len(tags) == 3
    assert all(tag.isprintable() for tag in tags)
