"""The page: one HTML file with its style, its program and the runs' data, which asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import time
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from drivetrain import __version__
from drivetrain_report.figures import better, figures, parts
from drivetrain_report.reading import Event, Run
from drivetrain_report.series import Series, curve, known, word

_MOST_EVALUATIONS = 500
_PROGRAM = ("basics", "axis", "curves", "tables", "main")
_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="drivetrain-report {version}">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<noscript>This report draws itself with the program that is in this file: please allow JavaScript for it.</noscript>
<script type="application/json" id="data">{data}</script>
<script>{program}</script>
</body>
</html>
"""


def page(runs: Sequence[Run]) -> str:
    """The whole HTML of a report on one run, or on several side by side.

    Every text that comes from a run is data in JSON, which the page's program shows as text; a policy in the page lets a
    browser run that program alone, and load nothing.
    """
    style, program = _resource("report.css"), _program()
    names = labels(runs)
    data = {
        "version": __version__,
        "made": time.time(),
        "runs": [{"name": name, **run_data(run)} for name, run in zip(names, runs, strict=True)],
    }
    # "<" would let a text end the script element it stands in; in JSON it may be written as an escape
    written = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(program)}"
    title = html.escape(f"{', '.join(names[:3])}{', …' * (len(names) > 3)} · Drivetrain report")
    return _TEMPLATE.format(policy=policy, version=__version__, title=title, style=style, data=written, program=program)


def labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its directory's, with as much of the path before it as tells them apart."""
    found: list[str] = []
    for depth in range(1, 1 + max((len(run.path.parts) for run in runs), default=0)):
        found = ["/".join(run.path.parts[-depth:]) for run in runs]
        if len(set(found)) == len(found):
            break
    return found


def run_data(run: Run) -> dict[str, Any]:
    """A run as the page's program takes it."""
    metrics, steps = run.metrics, run.metrics.step
    grids: dict[tuple[int, ...], int] = {}
    series = {name: _series_data(run, name, one, grids) for name, one in metrics.series.items()}
    columns = [metrics.step, metrics.time, metrics.epoch]
    began = run.sittings[0].began if run.sittings else next((t for t in metrics.time if math.isfinite(t)), None)
    return {
        "path": str(run.path),
        "began": began,
        "ended": next((t for t in reversed(metrics.time) if math.isfinite(t)), None),
        "rows": len(steps),
        "notes": run.notes,
        "figures": [
            {"label": f.label, "value": f.value, "unit": f.unit, "better": f.better, "note": f.note} for f in figures(run)
        ],
        "per_step": _per_step(run),
        "grids": [dict(zip(("step", "time", "epoch"), _grid(columns, rows), strict=True)) for rows in grids],
        "series": series,
        "evaluations": _evaluations(run),
        "goodput": _goodput(run),
        "events": [_event_data(run, one) for one in run.events],
        "config": [[one.key, one.value, one.origin] for one in run.settings],
        "environment": [[one.key, one.value] for one in run.environment],
    }


def _series_data(run: Run, name: str, series: Series, grids: dict[tuple[int, ...], int]) -> dict[str, Any]:
    """A curve, whose positions are those of a grid that it shares with the other metrics of the same rows."""
    drawn = curve(series)
    grid = grids.setdefault(tuple(drawn.rows), len(grids))
    data: dict[str, Any] = {"grid": grid, "count": len(series.values), "values": drawn.values, "better": better(name)}
    if drawn.low is not None:
        data |= {"low": drawn.low, "high": drawn.high}
    return data | ({"odd": drawn.odd} if drawn.odd else {})


def _grid(columns: list[Any], rows: tuple[int, ...]) -> list[list[float | None] | None]:
    found = [[known(column[row]) for row in rows] for column in columns]
    return [values if any(v is not None for v in values) else None for values in found]


def _per_step(run: Run) -> dict[str, float]:
    """Samples and tokens of a step, as the newest checkpoint has counted them."""
    steps = run.progress.get("step")
    if not isinstance(steps, int) or steps < 1:
        return {}
    counted = {name: run.progress.get(name) for name in ("samples", "tokens")}
    return {name: count / steps for name, count in counted.items() if isinstance(count, int) and 0 < count < 1 << 63}


def _evaluations(run: Run) -> dict[str, Any]:
    """The newest evaluations as a table, their values as they are; `left_out` says how many older ones there are."""
    names = sorted(name for name in run.metrics.series if name.startswith("eval/"))
    rows: dict[int, dict[str, float]] = {}
    for name in names:
        one = run.metrics.series[name]
        for row, value in zip(one.rows, one.values, strict=True):
            rows.setdefault(row, {})[name] = value
    kept = sorted(rows)[-_MOST_EVALUATIONS:]
    table = [[*run.metrics.positions(row), *(_in_json(rows[row].get(name)) for name in names)] for row in kept]
    return {"names": names, "better": [better(name) for name in names], "rows": table, "left_out": len(rows) - len(kept)}


def _in_json(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else word(value)


def _goodput(run: Run) -> dict[str, Any] | None:
    return {"parts": parts(run.sittings), "sittings": len(run.sittings)} if run.sittings else None


def _event_data(run: Run, event: Event) -> dict[str, Any]:
    return {"kind": event.kind, "step": _finite(event.step), "time": _finite(event.time), "text": event.text}


def _finite(value: float | None) -> float | None:
    return None if value is None else known(value)


def _program() -> str:
    """The files as one, in a scope of their own."""
    return "".join(['(() => {\n"use strict";\n', *(_resource(f"{name}.js") for name in _PROGRAM), "})();\n"])


def _resource(name: str) -> str:
    return files("drivetrain_report").joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
