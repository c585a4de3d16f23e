"""The few numbers by which runs are judged, and numbers as text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import pairwise
from statistics import median
from typing import Literal

from attrs import frozen

from drivetrain_report.reading import Run, Sitting
from drivetrain_report.series import Series, known, word

Unit = Literal["number", "count", "seconds", "share", "gb"]
Better = Literal["min", "max", ""]

_LOWER = re.compile(r"loss|perplexity|error|bits|mae$|mse$", re.IGNORECASE)
_HIGHER = re.compile(r"accuracy|f1|auc|precision|recall|bleu|rouge|score", re.IGNORECASE)
# The parts of goodput in which the model learns.
USEFUL = ("forward and backward", "optimizer")
_MEMORY = {
    "memory/device_gb": "of the device",
    "memory/process_peak_gb": "of the process",
    "memory/process_gb": "of the process",
}


@frozen
class Figure:
    """One number of a run. `better` says which of two runs is ahead, empty where neither is or nobody knows."""

    label: str
    value: float
    unit: Unit = "number"
    better: Better = ""
    note: str = ""


def figures(run: Run) -> Iterator[Figure]:
    """The numbers of a run that it has."""
    metrics = run.metrics
    if metrics.step:
        yield Figure("steps", metrics.step[-1], "count", "", _of_duration(run))
    if (loss := last(run.series("train/loss"))) is not None:
        yield Figure("train loss", loss, "number", "min", _newer(run.series("train/loss")) or "the last logged")
    evaluated = [name for name in metrics.series if name.startswith("eval/")]
    for name in sorted(evaluated, key=lambda name: (name != "eval/loss", name)):
        yield from _evaluated(run, name)
    if seconds := duration(run):
        yield Figure("time", seconds, "seconds", "", "pauses included")
    for name in ("tokens", "samples"):
        if speeds := [v for v in run.series(f"speed/{name}_per_second").values if math.isfinite(v)]:
            yield Figure(f"{name}/s", median(speeds), "number", "max", "median")
            break
    for name, whose in _MEMORY.items():
        if held := [v for v in run.series(name).values if math.isfinite(v)]:
            yield Figure("peak memory", max(held), "gb", "min", whose)
            break
    if (share := goodput(run.sittings)) is not None:
        yield Figure("goodput", share, "share", "max", "spent learning")


def better(name: str) -> Better:
    """Whether less or more of a metric is better, as its name tells."""
    return "min" if _LOWER.search(name) else "max" if _HIGHER.search(name) else ""


def last(series: Series) -> float | None:
    """The newest finite value."""
    return next((v for v in reversed(series.values) if math.isfinite(v)), None)


def parts(sittings: list[Sitting]) -> dict[str, float]:
    """Seconds by part over all sittings, and between them as `down`."""
    found: dict[str, float] = {}
    for one in sittings:
        for name, seconds in one.parts.items():
            found[name] = found.get(name, 0.0) + seconds
    gaps = [max(0.0, b.began - a.began - a.seconds) for a, b in pairwise(sittings)]
    return found | ({"down": sum(gaps)} if gaps else {})


def goodput(sittings: list[Sitting]) -> float | None:
    """The share of the time in which the model learned, from 0 to 1; None where nobody accounted for it."""
    found = parts(sittings)
    whole = sum(found.values())
    return sum(found.get(name, 0.0) for name in USEFUL) / whole if whole > 0 else None


def duration(run: Run) -> float | None:
    """Seconds from begin to end, pauses included: by goodput's account, or from the first values to the last."""
    if run.sittings:
        return sum(parts(run.sittings).values())
    times = [t for t in (run.metrics.time[:1] + run.metrics.time[-1:]) if math.isfinite(t)]
    return times[1] - times[0] if len(times) == 2 else None


def setting(run: Run, key: str) -> str:
    """A configured value as text, empty when it is not known."""
    return next((one.value for one in run.settings if one.key == key), "")


def _newer(series: Series) -> str:
    """What came after the newest finite value, empty when that is the newest of all."""
    return "" if math.isfinite(series.values[-1]) else f"the last before {word(series.values[-1])}"


def _of_duration(run: Run) -> str:
    wanted = setting(run, "max_duration")
    return f"of {wanted}" if wanted and wanted != "—" else ""


def _evaluated(run: Run, name: str) -> Iterator[Figure]:
    """The last value of an evaluation's metric, with the best one where the name tells which that is."""
    series = run.series(name)
    if (newest := last(series)) is None:
        return
    direction, note = better(name), _newer(series)
    if direction and not note:
        finite = [(v, row) for v, row in zip(series.values, series.rows, strict=True) if math.isfinite(v)]
        value, row = (min if direction == "min" else max)(finite, key=lambda pair: pair[0])
        if value != newest:
            note = f"best {shown(value)} at step {shown(run.metrics.step[row], 'count')}"
    yield Figure(name.replace("/", " ", 1), newest, "number", direction, note)


def shown(value: float | None, unit: Unit = "number") -> str:
    """A number for people: "1.734", "8.2 M", "1:02:13", "93.1%"."""
    if value is None:
        return "—"
    if known(value) is None:
        return word(value)
    if unit == "seconds":
        return clock(value)
    if unit == "share":
        return f"{value:.1%}"
    if unit == "gb":
        return f"{value:.3g} GB"
    if unit == "count" and value == int(value):
        return f"{int(value):,}" if abs(value) < 1e9 else _large(value)
    if abs(value) >= 1e5:
        return _large(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _large(value: float) -> str:
    for letter, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if size <= abs(value) < 1e15:
            return f"{value / size:.4g} {letter}"
    return f"{value:.4g}"


def clock(seconds: float) -> str:
    """Seconds as "4.2 s", "1:38", "2:05:07" or "3 d 04:10"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
