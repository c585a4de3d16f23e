"""The commands as the program calls them."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain import DrivetrainError
from drivetrain_report.command import Report, Runs
from drivetrain_testing import Check, conformance

MakeRun = Callable[..., Path]


@conformance(Report, Runs, kind="command")
def test_conformance(check: Check) -> None:
    check()


def command(thing: Any, *words: object) -> int:
    parser = argparse.ArgumentParser()
    thing.add_arguments(parser)
    return int(thing.run(parser.parse_args([str(word) for word in words])))


def metrics(loss: float, **more: float) -> list[dict[str, float]]:
    return [{"step": s, "time": 1000.0 + 2 * s, "train/loss": loss * 10 / s} | more for s in (5, 10)]


def state(**config: Any) -> dict[int, Any]:
    rows = {key: {"value": value, "origin": "run.toml"} for key, value in config.items()}
    return {10: {"manifest": {"config": rows, "components": {}, "versions": {"torch": "2.13"}}}}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- report ------------------------------------------------------------------------------------------------------------------


def test_the_page_of_one_run_lies_in_it(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_run(metrics=metrics(2.0))
    assert command(Report(), path) == 0
    assert (path / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert str(path / "report.html") in capsys.readouterr().out
    assert command(Report(), path) == 0, "again, over the old one"
    assert sorted(p.name for p in path.iterdir()) == ["metrics.jsonl", "report.html"]


def test_the_page_of_several_runs_lies_beside_the_first(make_run: MakeRun, here: Path) -> None:
    one, other = make_run("runs/a", metrics=metrics(2.0)), make_run("runs/b", metrics=metrics(3.0))
    assert command(Report(), one, "b", one) == 0, "b is found below runs/; the same one twice counts once"
    text = (one.parent / "report.html").read_text()
    assert "<title>a, b ·" in text
    assert command(Report(), one, other, "--output", here / "both.html") == 0
    assert (here / "both.html").is_file()


def test_report_refuses(make_run: MakeRun, here: Path) -> None:
    path = make_run(metrics=metrics(2.0))
    with pytest.raises(DrivetrainError, match="is a directory; name a file"):
        command(Report(), path, "--output", here)
    with pytest.raises(DrivetrainError, match="is no directory"):
        command(Report(), "tidy-oter")
    assert not list(here.rglob("*.html")) and not list(here.rglob("*.tmp"))


def test_the_commands_leave_torch_alone(make_run: MakeRun) -> None:
    path = make_run(metrics=metrics(2.0), checkpoints=state(seed=1))
    code = (
        "import argparse, sys; from drivetrain_report.command import Report, Runs\n"
        "for thing, words in ((Report(), sys.argv[1:2]), (Runs(), ['list', sys.argv[2]]), (Runs(), ['compare', *sys.argv[1:2] * 2])):\n"
        "    parser = argparse.ArgumentParser(); thing.add_arguments(parser); thing.run(parser.parse_args(words))\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), str(path.parent)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# -- runs list ---------------------------------------------------------------------------------------------------------------


def test_list_shows_the_newest_first(make_run: MakeRun, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = make_run(
        "runs/old",
        metrics=[*metrics(2.0), {"step": 10, "eval/loss": 1.25}],
        checkpoints=state(),
        config={"max_duration": "20st"},
    )
    make_run("runs/new", metrics=metrics(3.0))
    (here / "runs" / "no-run").mkdir()
    for path in [old, *old.rglob("*")]:
        os.utime(path, (1e9, 1e9))
    assert command(Runs(), "list") == 0
    head, new, before = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["NAME", "STEP", "OF", "TRAIN", "LOSS", "EVAL", "LOSS", "CHECKPOINT", "CHANGED"]
    assert new[:6] == ["new", "10", "—", "3", "—", "—"]
    assert before[:6] == ["old", "10", "20st", "2", "1.25", "10"] and before[-2:] == ["d", "ago"]
    assert command(Runs(), "list", "runs", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[1] == {
        "name": "old",
        "step": 10,
        "wanted": "20st",
        "train_loss": 2.0,
        "eval_loss": 1.25,
        "checkpoint": 10,
        "changed": 1e9,
    }


def test_list_reads_the_end_of_long_metrics_and_past_a_torn_line(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    line = b'{"step": 7, "train/loss": 5}\n'
    path = make_run("runs/a", metrics=line * 10_000 + b'{"step": 8, "train/loss": "NaN"}\n{"step": 9, "tr')
    command(Runs(), "list", path.parent, "--json")
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["step"], row["train_loss"]) == (8, "NaN"), "the newest, whatever it is"
    command(Runs(), "list", path.parent)
    assert "NaN" in capsys.readouterr().out


def test_list_without_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DrivetrainError, match="runs is no directory"):
        command(Runs(), "list")
    (here / "runs").mkdir()
    assert command(Runs(), "list") == 0
    assert capsys.readouterr().out == "no runs in runs\n"


@pytest.mark.parametrize("width", [80, 120])
def test_lines_fit_the_terminal_and_obey_no_name(
    make_run: MakeRun, here: Path, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    name = "runs/\x1b[2Jb" + "long-" * 30
    for one, seed in ((name, 1), ("runs/c", 2)):
        make_run(one, metrics=metrics(2.0, **{"eval/\x1b[31m": seed}), checkpoints=state(seed=seed, **{"key" * 20: seed}))
    command(Runs(), "list")
    command(Runs(), "compare", name, "c")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width and "\x1b" not in "".join(lines)
    assert any("\\x1b[2Jb" in line for line in lines)


# -- runs compare ------------------------------------------------------------------------------------------------------------


def test_compare(make_run: MakeRun, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run("runs/a", metrics=metrics(2.0), checkpoints=state(seed=1, lr=0.5))
    make_run("runs/b", metrics=metrics(3.0, **{"eval/x": 4.0}), checkpoints=state(seed=2, lr=0.5))
    assert command(Runs(), "compare", "a", "runs/b") == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[0].strip(): " ".join(line.split()) for line in out.splitlines()}
    assert lines["train loss"] == "train loss 2 * 3 +1 (+50.0%)"
    assert lines["eval x"] == "eval x — 4"
    assert lines["time"] == "time 10.0 s 10.0 s ="
    assert lines["seed"] == "seed 1 2"
    assert "lr" not in lines and lines["environment: no difference"]
    command(Runs(), "compare", "a", "b", "--all")
    assert "lr 0.5 0.5" in " ".join(capsys.readouterr().out.split())


def test_compare_says_what_is_not_known(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = make_run("a", metrics=[*metrics(2.0), {"step": 11, "train/loss": 1e-9}]), make_run("b", config={"seed": 1})
    command(Runs(), "compare", one, other)
    out = capsys.readouterr().out
    assert "configuration: not known of a (a checkpoint keeps it)" in out
    assert "b: no metrics" in out
