"""The page is read back: its data are the run's files, its only program is ours, and it asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
import statistics
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from drivetrain_report import page, read_run
from drivetrain_report.series import MOST_POINTS

MakeRun = Callable[..., Path]
HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\n\x1b[31m\u202e<!--'
SITTING = {"began": 1.0, "first_step": 0, "last_step": 9, "seconds": 5.0, "parts": {"rest": 5.0}, "ended": True}


class Reader(HTMLParser):
    """The elements of a page with their attributes, and what stands in those of a kind."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.inside.append((self.elements[-1][0], data))


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def data_of(text: str) -> Any:
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert embedded is not None
    return json.loads(embedded[1], parse_constant=no_constant)


def report(*paths: Path) -> Any:
    return data_of(page([read_run(path) for path in paths]))


def points(run: dict[str, Any], name: str) -> list[tuple[float, ...]]:
    """(step, time, epoch, value) of a curve in the page."""
    series = run["series"][name]
    grid = run["grids"][series["grid"]]
    return list(zip(grid["step"], grid["time"], grid["epoch"], series["values"], strict=True))


def rows(count: int = 10) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for i in range(1, count + 1):
        place = {"step": 2 * i, "time": 1.7e9 + i / 3, "epoch": round(i / 7, 4)}
        found.append({**place, "train/loss": 5 / i + 0.1, "train/lr": 1e-3 / i})
        if i % 5 == 0:
            found.append({**place, "eval/loss": 5 / i + 0.2, "eval/accuracy": 1 - 1 / i})
    return found


# -- what was logged ---------------------------------------------------------------------------------------------------------


def test_every_value_is_in_the_page_as_it_is_in_the_file(make_run: MakeRun) -> None:
    path = make_run(metrics=rows(50))
    (run,) = report(path)["runs"]
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in lines for name in line} - {"step", "time", "epoch"}
    assert set(run["series"]) == names and len(names) == 4
    for name in names:
        assert points(run, name) == [(r["step"], r["time"], r["epoch"], r[name]) for r in lines if name in r]
    assert len(run["grids"]) == 2, "metrics of the same rows share their positions"


def test_evaluations_are_a_table(make_run: MakeRun) -> None:
    (run,) = report(make_run(metrics=rows()))["runs"]
    table = run["evaluations"]
    assert (table["names"], table["better"]) == (["eval/accuracy", "eval/loss"], ["max", "min"])
    assert [row[0] for row in table["rows"]] == [10, 20]
    assert table["rows"][1][3:] == [0.9, 0.7]


def test_numbers_that_are_not_finite_are_kept_as_what_they_are(make_run: MakeRun) -> None:
    values = [1.0, "NaN", 2.0, "Infinity", "-Infinity", 3.0]
    metrics = [{"step": i, "train/loss": value, "eval/loss": value} for i, value in enumerate(values)]
    (run,) = report(make_run(metrics=metrics))["runs"]
    series = run["series"]["train/loss"]
    assert series["values"] == [1.0, None, 2.0, None, None, 3.0]
    assert series["odd"] == [[1, "NaN", 1], [3, "Infinity", 1], [4, "-Infinity", 1]]
    assert [row[3] for row in run["evaluations"]["rows"]] == values
    assert next(f["value"] for f in run["figures"] if f["label"] == "eval loss") == 3.0


@pytest.mark.parametrize("count", [20_001, pytest.param(1_000_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_a_long_curve_loses_no_extreme(make_run: MakeRun, count: int) -> None:
    """Each stretch against a plain computation over its own rows."""
    draw = random.Random(0)
    values: list[float] = [draw.gauss(2, 0.1) for _ in range(count)]
    values[777], values[count // 2], values[count // 3], values[count // 3 + 1] = 99.5, -55.5, math.nan, math.inf
    text = "".join(f'{{"step": {i}, "train/loss": {json.dumps(v)}}}\n' for i, v in enumerate(values))
    (run,) = report(make_run(metrics=text.encode()))["runs"]
    series = run["series"]["train/loss"]
    edges = [int(step) + 1 for step in run["grids"][series["grid"]]["step"]]
    assert len(edges) == MOST_POINTS // 2 and edges[-1] == count and series["count"] == count
    assert (max(series["high"]), min(series["low"])) == (99.5, -55.5)
    for i, (start, end) in enumerate(zip([0, *edges], edges, strict=False)):
        finite = [v for v in values[start:end] if math.isfinite(v)]
        assert (series["low"][i], series["high"][i]) == (min(finite), max(finite))
        assert series["values"][i] == pytest.approx(statistics.fmean(finite), rel=1e-12)
    place = next(i for i, end in enumerate(edges) if end > count // 3)
    assert series["odd"] == [[place, "NaN", 1], [place, "Infinity", 1]]


def test_a_long_curve_without_any_finite_value(make_run: MakeRun) -> None:
    (run,) = report(make_run(metrics=[{"step": i, "x": "NaN"} for i in range(MOST_POINTS + 1)]))["runs"]
    assert set(run["series"]["x"]["values"]) == set(run["series"]["x"]["low"]) == {None}


def test_values_whose_sum_is_beyond_floats_have_a_mean(make_run: MakeRun) -> None:
    (run,) = report(make_run(metrics=[{"step": i, "x": 1.5e308} for i in range(MOST_POINTS + 1)]))["runs"]
    assert run["series"]["x"]["values"] == pytest.approx([1.5e308] * (MOST_POINTS // 2))


# -- files as crashes and strangers leave them -------------------------------------------------------------------------------


def test_a_torn_last_line_is_told_and_the_rest_is_there(make_run: MakeRun) -> None:
    whole = "".join(json.dumps(row) + "\n" for row in rows())
    (run,) = report(make_run(metrics=whole.encode() + b'{"step": 99, "train/lo'))["runs"]
    assert len(run["series"]["train/loss"]["values"]) == 10
    assert len(run["notes"]) == 1 and "cut short" in run["notes"][0]


def test_lines_that_are_no_rows_are_counted(make_run: MakeRun) -> None:
    bad = [
        b"",
        b"[1, 2]",
        b'"text"',
        b"\xff\xfe\x00",
        b"{" * 100_000,
        b"null",
        b'{"train/loss": 1}',
        b'{"step": "two"}',
        b'{"step": NaN}',
    ]
    (run,) = report(make_run(metrics=b"\n".join([*bad, b'{"step": 1, "train/loss": 2.5}', b""])))["runs"]
    assert run["series"]["train/loss"]["values"] == [2.5]
    assert run["notes"] == [f"{len(bad) - 1} lines of metrics.jsonl cannot be read and are left out"], (
        "an empty line is nothing"
    )


def test_values_that_are_no_numbers_are_passed_over(make_run: MakeRun) -> None:
    row = b'{"step": 1, "a": "text", "b": true, "c": null, "d": [1], "e": 2, "f": 1%s, "g": 1e999, "h": "NaN"}\n' % (b"0" * 400)
    (run,) = report(make_run(metrics=row))["runs"]
    assert set(run["series"]) == {"e", "f", "g", "h"}
    assert run["series"]["e"]["values"] == [2.0]
    assert [run["series"][name]["odd"][0][1] for name in "fgh"] == ["Infinity", "Infinity", "NaN"]


def test_rows_out_of_order_are_put_in_order(make_run: MakeRun) -> None:
    (run,) = report(make_run(metrics=[{"step": s, "x": float(s)} for s in (3, 1, 2)]))["runs"]
    assert (run["grids"][0]["step"], run["series"]["x"]["values"]) == ([1, 2, 3], [1.0, 2.0, 3.0])


def test_a_run_without_metrics_or_anything_else(make_run: MakeRun) -> None:
    (run,) = report(make_run(config={"seed": 3}))["runs"]
    assert (run["series"], run["goodput"], run["events"], run["figures"]) == ({}, None, [], [])
    assert run["notes"] and "no metrics" in run["notes"][0]
    assert run["config"] == [["seed", "3", "config.json"]]


@pytest.mark.parametrize(
    "files",
    [
        {"goodput": {"sittings": [{"began": "x"}, 3, None]}},
        {
            "goodput": {
                "sittings": [SITTING | {"began": math.nan}, SITTING | {"seconds": math.inf}, SITTING | {"last_step": 10**400}]
            }
        },
        {"goodput": {"sittings": [SITTING | {"parts": {"rest": math.nan}}]}},
        {"goodput": [1, 2]},
        {"config": {"optimizer": [[[{}]]], "callbacks": [{"use": 3}, "x", None]}},
        {"events": [{"event": "anomaly"}, {"step": "x"}, {"event": {"a": 1}, "time": "NaN", "step": 1e999}]},
        {"checkpoints": {5: {"manifest": {"config": {"a": 1, "b": {"value": {"$int": "zz"}}}, "components": {"x": 3}}}}},
        {"checkpoints": {5: {"manifest": {"config": {}}, "progress": {"step": 1, "samples": 10**400}}}},
        {"checkpoints": {10**200: {"manifest": {"config": {}}}}},
        {"checkpoints": {5: {"manifest": {"config": [], "components": [], "model": []}, "progress": 3}}},
    ],
)
def test_other_files_may_hold_anything(make_run: MakeRun, files: dict[str, Any]) -> None:
    assert len(report(make_run(metrics=rows(), **files))["runs"]) == 1


# -- texts -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(make_run: MakeRun) -> Path:
    state = {
        "manifest": {"config": {HOSTILE: {"value": HOSTILE, "origin": HOSTILE}}, "components": {HOSTILE: {"origin": HOSTILE}}}
    }
    metrics = [{"step": 1, f"eval/{HOSTILE}": 1.0, HOSTILE: 2.0, "__proto__": 3.0}]
    goodput = {
        "sittings": [{"began": 1.0, "first_step": 0, "last_step": 1, "seconds": 1, "parts": {HOSTILE: 1.0}, "ended": True}]
    }
    events = [{"event": HOSTILE, "step": 1, HOSTILE: HOSTILE}]
    return make_run('<b onmouseover="alert(3)">', metrics=metrics, checkpoints={1: state}, goodput=goodput, events=events)


def test_no_text_of_a_run_becomes_markup(hostile: Path) -> None:
    text = page([read_run(hostile)])
    read = Reader(text)
    assert [tag for tag, _ in read.elements].count("script") == 2
    assert not {"img", "b", "iframe", "svg"} & {tag for tag, _ in read.elements}
    assert not [name for _, attributes in read.elements for name in attributes if name.startswith("on")]
    (data,) = [content for tag, content in read.inside if content.startswith("{")]
    assert "<" not in data
    (run,) = data_of(text)["runs"]
    assert (
        HOSTILE in run["series"]
        and HOSTILE in run["goodput"]["parts"]
        and HOSTILE in {event["kind"] for event in run["events"]}
    )
    assert run["series"]["__proto__"]["values"] == [3.0]


def test_the_page_may_run_its_own_program_alone_and_load_nothing(hostile: Path) -> None:
    text = page([read_run(hostile)])
    read = Reader(text)
    policy = next(
        a["content"] for tag, a in read.elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == "'none'" and rules.pop("img-src") == "data:"
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules.pop(rule) == f"'sha256-{digest}'"
    assert not rules
    addresses = {
        value for _, attributes in read.elements for name, value in attributes.items() if name in ("src", "href", "action")
    }
    assert addresses == {"data:,"}
    style = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)[0]
    assert "url(" not in style and "@import" not in style
    program = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[0]
    assert re.findall(r"https?://[^\"']*", program) == ["http://www.w3.org/2000/svg"], "the name of SVG, which nobody loads"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|XMLHttp|import\(", program)


def test_runs_of_the_same_name_are_told_apart(make_run: MakeRun) -> None:
    first, second = make_run("a/tidy-otter", metrics=rows()), make_run("b/tidy-otter", metrics=rows())
    assert [run["name"] for run in report(first, second)["runs"]] == ["a/tidy-otter", "b/tidy-otter"]
    assert [run["name"] for run in report(first)["runs"]] == ["tidy-otter"]
