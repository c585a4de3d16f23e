"""The values of `metrics.jsonl`: every line that can be read, every number, and long curves made short without losing a spike."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

METRICS_FILE = "metrics.jsonl"
MOST_POINTS = 2000  # of a curve that is kept as it is; of a longer one half as many buckets
_POSITIONS = ("step", "time", "epoch")
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@define
class Series:
    """One metric: its values, and for each of them the number of its row."""

    rows: array[int] = field(factory=lambda: array("L"))
    values: array[float] = field(factory=lambda: array("d"))


@define
class Metrics:
    """A whole file: where each row stands (NaN for what it does not say), the metrics by name, and the number of lines left out."""

    step: array[float] = field(factory=lambda: array("d"))
    time: array[float] = field(factory=lambda: array("d"))
    epoch: array[float] = field(factory=lambda: array("d"))
    series: dict[str, Series] = field(factory=dict)
    unreadable: int = 0
    torn: bool = False  # the last line was cut short: the run was killed while it wrote, or writes just now

    def positions(self, row: int) -> tuple[float | None, float | None, float | None]:
        """Step, time and epoch of a row."""
        return known(self.step[row]), known(self.time[row]), known(self.epoch[row])


@frozen
class Curve:
    """What a page draws: points in the order of steps.

    Attributes:
        rows: the row of each point; of a bucket, that of its last value.
        values: the value, or a bucket's mean; None where no value is finite.
        low, high: the least and the greatest of each bucket; None for a curve whose points are the values themselves.
        odd: (point, "NaN" or "Infinity" or "-Infinity", how often) for what is not finite.
    """

    rows: list[int]
    values: list[float | None]
    low: list[float | None] | None
    high: list[float | None] | None
    odd: list[tuple[int, str, int]]


def read_metrics(path: Path) -> Metrics:
    """Read a file of metrics. What is no row of metrics is counted and left out; no file is an empty one."""
    found = Metrics()
    if not path.is_file():
        return found
    with path.open("rb") as file:
        for line in file:
            if line.strip() and not _take(found, line):
                found.torn = not line.endswith(b"\n")
                found.unreadable += not found.torn
    _sort(found)
    return found


def last_rows(path: Path, most: int = 1 << 16) -> Iterator[dict[str, Any]]:
    """The last rows of a file of metrics, the newest first, from its last bytes alone."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - most))
        lines = file.read().split(b"\n")
    for line in reversed(lines if size <= most else lines[1:]):
        if (row := _row(line)) is not None:
            yield row


def number(value: Any) -> float | None:
    """A number, also one of the three that JSON has texts for; None for anything else."""
    if isinstance(value, str):
        return _WORDS.get(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def known(value: float) -> float | None:
    """None for NaN and infinity."""
    return value if math.isfinite(value) else None


def word(value: float) -> str:
    """What JSON calls a number that is not finite."""
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def curve(series: Series, most: int = MOST_POINTS) -> Curve:
    """The points to draw; more than `most` values become half as many buckets with their mean, least and greatest value."""
    values, rows = series.values, series.rows
    if len(values) <= most:
        odd = [(i, word(v), 1) for i, v in enumerate(values) if not math.isfinite(v)]
        return Curve(list(rows), [known(v) for v in values], None, None, odd)
    buckets = most // 2
    edges = [i * len(values) // buckets for i in range(buckets + 1)]
    found = Curve([rows[edge - 1] for edge in edges[1:]], [], [], [], [])
    for index in range(buckets):
        _fill(found, index, values[edges[index] : edges[index + 1]])
    return found


def _fill(found: Curve, index: int, values: array[float]) -> None:
    assert found.low is not None and found.high is not None
    total, finite = sum(values), values
    if not math.isfinite(total):
        finite = array("d", (v for v in values if math.isfinite(v)))
        words = [word(v) for v in values if not math.isfinite(v)]
        found.odd.extend((index, one, words.count(one)) for one in dict.fromkeys(words))
        total = math.nan
    least, greatest = (min(finite), max(finite)) if finite else (None, None)
    found.low.append(least)
    found.high.append(greatest)
    found.values.append(_mean(finite) if math.isnan(total) else total / len(values))


def _mean(values: array[float]) -> float | None:
    """The mean of finite values whose sum may not be finite."""
    return sum(value / len(values) for value in values) if values else None


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and known(_or_nan(row.get("step"))) is not None else None


def _take(found: Metrics, line: bytes) -> bool:
    """Add the values of a line; False when it is none."""
    if (row := _row(line)) is None:
        return False
    index = len(found.step)
    for name in _POSITIONS:
        getattr(found, name).append(_or_nan(row.pop(name, None)))
    for name, value in row.items():
        taken = value if type(value) is float else number(value)
        if taken is not None:
            if (one := found.series.get(name)) is None:
                one = found.series[name] = Series()
            one.rows.append(index)
            one.values.append(taken)
    return True


def _or_nan(value: Any) -> float:
    found = number(value)
    return math.nan if found is None else found


def _sort(found: Metrics) -> None:
    """Put each series in the order of steps, in which a run writes them; a file put together by hand may not be."""
    steps = found.step
    if all(steps[i] <= steps[i + 1] for i in range(len(steps) - 1)):
        return
    for one in found.series.values():
        order = sorted(range(len(one.rows)), key=lambda i: steps[one.rows[i]])
        one.values = array("d", (one.values[i] for i in order))
        one.rows = array("L", (one.rows[i] for i in order))
