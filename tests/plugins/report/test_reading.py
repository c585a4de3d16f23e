"""What is read from a run's directory besides its metrics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain import DrivetrainError
from drivetrain_report import Run, read_run
from drivetrain_report.figures import figures, parts

MakeRun = Callable[..., Path]
MANIFEST: dict[str, Any] = {
    "config": {
        "seed": {"value": 7, "origin": "run.toml"},
        "dataloader": {"value": {"num_workers": 2, "shuffle": True}, "origin": "default"},
        "compile": {"value": None, "origin": "default"},
    },
    "components": {
        "optimizer:adamw": {
            "origin": "drivetrain-optimizers 0.1.0",
            "options": {"lr": 0.004, "betas": {"$tuple": [0.9, 0.95]}, "eps": {"$float": "7ff0000000000000"}},
        },
        "callback:checkpoint": {"origin": "drivetrain-checkpoint 0.1.0", "options": {"every": "500st", "keep_last": 2}},
        "callback:Beginning": {"origin": "drivetrain_cli.session", "options": {}},
    },
    "optimizer": {},
    "model": {"parameters": 869504},
    "versions": {"torch": "2.13.0"},
}
STATE = {"manifest": MANIFEST, "progress": {"step": 10, "samples": 80, "tokens": 0}}
METRICS = [{"step": s, "time": 1000.0 + s, "train/loss": 1.0 / s} for s in (10, 20, 30)]


def settings(run: Run) -> dict[str, tuple[str, str]]:
    return {one.key: (one.value, one.origin) for one in run.settings}


def test_configuration_with_origins(make_run: MakeRun) -> None:
    saved = {"optimizer": {"use": "adamw", "lr": 0.004}, "callbacks": ["goodput", {"use": "checkpoint", "every": "500st"}]}
    run = read_run(make_run(metrics=METRICS, checkpoints={10: STATE}, config=saved))
    assert settings(run) == {
        "seed": ("7", "run.toml"),
        "dataloader.num_workers": ("2", "default"),
        "dataloader.shuffle": ("true", "default"),
        "compile": ("—", "default"),
        "optimizer": ("adamw", "drivetrain-optimizers 0.1.0"),
        "optimizer.lr": ("0.004", "set"),
        "optimizer.betas": ("[0.9, 0.95]", "default"),
        "optimizer.eps": ("inf", "default"),
        "callbacks.checkpoint": ("active", "drivetrain-checkpoint 0.1.0"),
        "callbacks.checkpoint.every": ("500st", "set"),
        "callbacks.checkpoint.keep_last": ("2", "default"),
    }


def test_without_the_saved_configuration_the_origin_of_options_is_not_known(make_run: MakeRun) -> None:
    run = read_run(make_run(metrics=METRICS, checkpoints={10: STATE}))
    assert settings(run)["optimizer.lr"] == ("0.004", "")


def test_without_a_checkpoint_the_saved_configuration_is_shown(make_run: MakeRun) -> None:
    saved = {"seed": 1, "optimizer": {"use": "adamw", "lr": 0.1}, "callbacks": [{"use": "checkpoint", "every": "5st"}, "ema"]}
    run = read_run(make_run(config=saved))
    assert settings(run) == {
        "seed": ("1", "config.json"),
        "optimizer.use": ("adamw", "config.json"),
        "optimizer.lr": ("0.1", "config.json"),
        "callbacks.checkpoint.every": ("5st", "config.json"),
        "callbacks.ema": ("active", "config.json"),
    }
    assert run.environment == []


def test_environment(make_run: MakeRun) -> None:
    run = read_run(make_run(checkpoints={10: STATE}))
    assert {one.key: one.value for one in run.environment} == {
        "model.parameters": "869504",
        "versions.torch": "2.13.0",
        "plugins.drivetrain-checkpoint": "0.1.0",
        "plugins.drivetrain-optimizers": "0.1.0",
    }


def test_the_newest_checkpoint_that_can_be_read_tells(make_run: MakeRun) -> None:
    path = make_run(
        checkpoints={10: STATE, 20: STATE | {"manifest": {"config": {"seed": {"value": 8, "origin": "x"}}}}, 30: {}}
    )
    (path / "checkpoints" / "step-00000030" / "state.json").write_text('{"manifest": {')
    assert settings(read_run(path))["seed"] == ("8", "x")


def test_events(make_run: MakeRun) -> None:
    anomaly = {"event": "anomaly", "time": 5.0, "policy": "skip", "did": "left out", "kind": "nonfinite", "step": 12}
    anomaly |= {"epoch": 0, "window": 12, "loss": "NaN", "grad_norm": 1.25, "tensor": "gradient of head", "samples": [1]}
    path = make_run(metrics=METRICS, checkpoints={20: STATE}, events=[anomaly, {"event": "note", "step": 25, "by": "me"}])
    with (path / "events.jsonl").open("a") as file:
        file.write('{"event": "torn')
    (path / "checkpoints" / "step-00000025").mkdir()  # begun when the run was killed
    (path / "hang").mkdir()
    (path / "hang" / "rank-1.json").write_text('{"step": 28, "time": 1100.0, "idle": 61.2}')
    found = [(one.kind, one.step, one.time) for one in read_run(path).events]
    assert found == [("anomaly", 12, 5.0), ("checkpoint", 20, 1020.0), ("note", 25, 1020.0), ("hang", 28, 1100.0)]
    texts = [one.text for one in read_run(path).events]
    assert texts[0] == "NaN or infinity in gradient of head (loss NaN, gradient norm 1.25). skip: left out"
    assert texts[2] == "by me"


def test_sittings_become_goodput_and_restarts(make_run: MakeRun) -> None:
    def sitting(began: float, first: int, last: int, ended: bool) -> dict[str, Any]:
        seconds = {"forward and backward": 6.0, "optimizer": 2.0, "rest": 2.0}
        return {"began": began, "first_step": first, "last_step": last, "seconds": 10.0, "parts": seconds, "ended": ended}

    path = make_run(metrics=METRICS, goodput={"sittings": [sitting(990, 0, 18, False), sitting(1010, 10, 30, True)]})
    run = read_run(path)
    assert parts(run.sittings) == {"forward and backward": 12.0, "optimizer": 4.0, "rest": 4.0, "down": 10.0}
    shown = {figure.label: figure.value for figure in figures(run)}
    assert (shown["goodput"], shown["time"]) == (pytest.approx(16 / 30), 30.0)
    (restart,) = run.events
    assert (restart.kind, restart.step, restart.time) == ("restart", 10, 1010.0)
    assert restart.text == "the sitting before was killed 10 s earlier, 8 steps repeated"


def test_figures(make_run: MakeRun) -> None:
    evaluations = [{"step": s, "eval/loss": v, "eval/x": 1.0} for s, v in ((10, 3.0), (20, 1.5), (30, 2.0))]
    speeds = [{"step": s, "speed/tokens_per_second": v, "memory/process_gb": v} for s, v in ((10, 5.0), (20, "NaN"), (30, 7.0))]
    run = read_run(make_run(metrics=[*METRICS, *evaluations, *speeds], config={"max_duration": "40st"}))
    shown = {figure.label: (figure.value, figure.better, figure.note) for figure in figures(run)}
    assert shown == {
        "steps": (30, "", "of 40st"),
        "train loss": (1 / 30, "min", "the last logged"),
        "eval loss": (2.0, "min", "best 1.5 at step 20"),
        "eval x": (1.0, "", ""),
        "tokens/s": (6.0, "max", "median"),
        "peak memory": (7.0, "min", "of the process"),
    }


def test_a_run_that_ended_in_nan_does_not_look_well(make_run: MakeRun) -> None:
    values = [1.0, 0.5, "NaN"]
    run = read_run(make_run(metrics=[{"step": s, "train/loss": v, "eval/loss": v} for s, v in enumerate(values)]))
    shown = {figure.label: (figure.value, figure.note) for figure in figures(run)}
    assert shown["train loss"] == shown["eval loss"] == (0.5, "the last before NaN")


@pytest.mark.parametrize("made", [False, True])
def test_what_is_no_run_is_refused(tmp_path: Path, made: bool) -> None:
    path = tmp_path / "nothing"
    if made:
        path.mkdir()
    with pytest.raises(DrivetrainError, match="holds no run" if made else "is no directory"):
        read_run(path)
