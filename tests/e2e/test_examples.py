"""The examples do what they say: each is run as a person would run it, in an empty folder. test_pages.py runs what pages show."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"


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


def test_every_example_is_tested_here() -> None:
    tested = set(re.findall(r'run\("(\w+\.py)"\)', Path(__file__).read_text(encoding="utf-8")))
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested
