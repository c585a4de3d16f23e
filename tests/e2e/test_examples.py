"""The examples do what they say: each is run as a person would run it, in an empty folder. test_pages.py runs what pages show."""

from __future__ import annotations

import builtins
import json
import keyword
import os
import pty
import re
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain_cli.app import main

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")["output"]


def test_digits_are_told_apart_in_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    output = run("digits.py")
    assert output.metrics["eval/accuracy"] > 0.95
    assert output.seconds < 60
    assert "held-out digits right" in capsys.readouterr().out


def test_custom_callback_stops_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    output = run("custom_callback.py")
    assert output.steps < 100 * 16, "it ended before its time"
    assert output.stop_reason == "the loss was under 0.1 3 times in a row"
    assert output.stop_reason in capsys.readouterr().out


def test_own_loop_sees_every_step_and_leaves_in_good_order(capsys: pytest.CaptureFixture[str]) -> None:
    output = run("own_loop.py")
    assert output.steps < 2000
    said = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)$", capsys.readouterr().out, re.MULTILINE)]
    assert len(said) == output.steps // 100
    assert said[-1] < 1e-3 < said[0]


def run_at_a_terminal(*words: str) -> tuple[int, str, str]:
    """Run the `drivetrain` program with its standard error on a terminal; the exit code and what it said on both."""
    ours, theirs = pty.openpty()
    said = bytearray()

    def read() -> None:
        try:
            while part := os.read(ours, 1 << 16):
                said.extend(part)
        except OSError:  # how Linux says that the other side is closed
            pass

    env = {**os.environ, "COLUMNS": "120", "TERM": "xterm"}
    command = [sys.executable, "-m", "drivetrain_cli", *words]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=env, text=True)
    os.close(theirs)
    reader = threading.Thread(target=read)
    reader.start()
    assert program.stdout is not None
    output = program.stdout.read()
    code = program.wait()
    reader.join()
    os.close(ours)
    return code, output, said.decode(errors="replace")


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds: (step, value) by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in run_dir.rglob("events.out.tfevents.*")}
    reader = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def python_in(text: str) -> float:
    """Which share of a text's words are Python's own."""
    own = {*keyword.kwlist, *dir(builtins), "self", "cls", "args", "kwargs", "name", "value"}
    words = re.findall(r"[A-Za-z_]+", text)
    return sum(word in own for word in words) / max(len(words), 1)


def quickstart(run: Run, steps: int, every: int, *overrides: str) -> tuple[list[tuple[int, float]], str]:
    """Train as `docs/examples/quickstart.toml` says; the evaluations in bits for each byte, and the text of the end."""
    code, output, shown = run("train", str(EXAMPLES / "quickstart.toml"), *overrides)
    assert code == 0, shown
    run_dir = Path("runs/quickstart")
    assert f"step {steps}/{steps}" in shown
    assert "tensorboard --logdir runs/quickstart" in output

    found = scalars(run_dir)
    bits = found["eval/bits_per_byte"]
    assert [step for step, _ in bits] == list(range(0, steps + 1, every))
    assert [step for step, _ in found["train/loss"]][-1] == steps
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    logged = [(line["step"], line["eval/bits_per_byte"]) for line in lines if "eval/bits_per_byte" in line]
    assert logged == [(step, pytest.approx(value, rel=1e-6)) for step, value in bits]

    kept = sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))
    assert kept == [f"step-{step:08}" for step in (steps - every, steps)], "the two newest"
    text = (run_dir / "samples.txt").read_text(encoding="utf-8")
    assert text in output
    return bits, "\n".join(text.strip().splitlines()[1:-1])


def test_the_quickstart_in_three_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of it in small; and the control of what is asked of the text: an untrained model writes no Python."""

    def here(*words: str) -> tuple[int, str, str]:
        code = main(words)
        return code, *capsys.readouterr()

    small = ("model.layers=1", "model.heads=1", "model.width=16", "data.max_bytes=20000", "max_duration=3st")
    often = ("eval_interval=1st", "callbacks.checkpoint.every=1st", "log_interval=1st")
    bits, text = quickstart(here, 3, 1, *small, *often)
    assert 7.5 < bits[0][1] < 8.5
    assert bits[-1][1] < bits[0][1]
    assert text.startswith("def ")
    assert python_in(text) < 0.05


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_quickstart_learns_to_write_python(record_property: Any) -> None:
    """As it is: from 8 bits for each byte to under 2.6, and text that a person knows for Python."""
    began = time.monotonic()
    shown = ""

    def at_a_terminal(*words: str) -> tuple[int, str, str]:
        nonlocal shown
        code, output, shown = run_at_a_terminal(*words)
        return code, output, shown

    bits, text = quickstart(at_a_terminal, 1500, 500)
    assert re.search(r"\rstep \d{1,3}/1500 ━[^\r]* \d+%", shown), "a progress bar"
    record_property("seconds", time.monotonic() - began)
    record_property("bits_per_byte", bits)
    assert 7.5 < bits[0][1] < 8.5
    assert bits[-1][1] < 2.6
    assert all(c.isprintable() or c in "\n\t" for c in text) and "\ufffd" not in text
    assert text.startswith("def ")
    assert python_in(text) > 0.15
    assert sum(line.startswith("    ") for line in text.splitlines()) >= 3, "blocks are indented"


def test_every_example_is_tested_here() -> None:
    tested = set(re.findall(r'run\("(\w+\.py)"\)', Path(__file__).read_text(encoding="utf-8")))
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested
