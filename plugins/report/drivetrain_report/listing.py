"""`drivetrain runs list`: a line for each run, from the last bytes of its files, however long it has trained."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from attrs import asdict, frozen

from drivetrain import DrivetrainError
from drivetrain_report.figures import shown
from drivetrain_report.reading import Run, is_run
from drivetrain_report.series import METRICS_FILE, Metrics, known, last_rows, number, word

_FILES = (METRICS_FILE, "goodput.json", "events.jsonl", "config.json", "checkpoints")


@frozen
class Line:
    """What is known of a run at a glance; None and "" for what it does not tell. Its losses are the newest, NaN too."""

    name: str
    step: int | None
    wanted: str  # the configured length, such as "1500st"
    train_loss: float | None
    eval_loss: float | None
    checkpoint: int | None
    changed: float  # seconds since 1970


def look(directory: Path) -> list[Line]:
    """The runs in a directory, or the one that it is, the one that changed last first."""
    try:
        found = [path for path in directory.iterdir() if path.is_dir() and is_run(path)]
    except OSError as error:
        raise DrivetrainError(f"{directory} cannot be read: {error.strerror or error}.") from error
    if not found and is_run(directory):
        found = [directory.absolute()]
    return sorted((_line(path) for path in found), key=lambda line: (-line.changed, line.name))


def lines(found: Sequence[Line]) -> Iterator[str]:
    """The table for a terminal."""
    now = time.time()
    head = ("NAME", "STEP", "OF", "TRAIN LOSS", "EVAL LOSS", "CHECKPOINT", "CHANGED")
    rows = [
        (
            one.name,
            shown(one.step, "count"),
            one.wanted or "—",
            shown(one.train_loss),
            shown(one.eval_loss),
            shown(one.checkpoint, "count"),
            _ago(now - one.changed),
        )
        for one in found
    ]
    yield from columns([head, *rows], right=(1, 3, 4, 5, 6), shrink=(0,))


def as_json(found: Sequence[Line]) -> str:
    """The same for programs, as strict JSON: what is not finite is the text "NaN", "Infinity" or "-Infinity"."""
    rows = [asdict(one) for one in found]
    strict = [{k: word(v) if isinstance(v, float) and known(v) is None else v for k, v in row.items()} for row in rows]
    return json.dumps(strict, indent=2, allow_nan=False)


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = (), shrink: Sequence[int] = ()) -> Iterator[str]:
    """Rows as lines with aligned columns, as wide as the terminal at most: the columns of `shrink` are cut for that."""
    cells = [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    room = shutil.get_terminal_size((100, 24)).columns - 1 - 2 * (len(widths) - 1)
    while shrink and sum(widths) > room and max(widths[i] for i in shrink) > 8:
        widths[max(shrink, key=lambda i: widths[i])] -= 1
    for row in cells:
        parts = [_cut(cell, width) for cell, width in zip(row, widths, strict=True)]
        yield "  ".join(
            f"{p:>{w}}" if i in right else f"{p:<{w}}" for i, (p, w) in enumerate(zip(parts, widths, strict=True))
        ).rstrip()


def plain(text: object) -> str:
    """Text without what a terminal would obey: names of runs and metrics are foreign."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in str(text))


def _line(path: Path) -> Line:
    run = Run(path, Metrics())
    step: float | None = None
    values: dict[str, float] = {}
    for row in last_rows(path / METRICS_FILE):
        step = number(row["step"]) if step is None else step
        for name in ("train/loss", "eval/loss"):
            if name not in values and (value := number(row.get(name))) is not None:
                values[name] = value
        if len(values) == 2:
            break
    saved = [int(one.step) for one in run.events if one.kind == "checkpoint" and one.step is not None]
    changed = max((path / name).stat().st_mtime for name in _FILES if (path / name).exists())
    wanted = str(run.saved.get("max_duration") or "")
    losses = values.get("train/loss"), values.get("eval/loss")
    return Line(path.name, None if step is None else int(step), wanted, *losses, max(saved, default=None), changed)


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago" if seconds >= 5 else "now"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
