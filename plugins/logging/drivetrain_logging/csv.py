"""A tracker for spreadsheets."""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import attrs

from drivetrain import Tracker, component
from drivetrain.tracking import printable

if TYPE_CHECKING:
    from drivetrain import CallbackContext

_FIRST = ("step", "time", "epoch")


@component
class CsvTracker(Tracker):
    """Write `metrics.csv` into the run's directory: a row for each log and each evaluation, a column for each name.

    A name that occurs for the first time adds a column, for which the file is written anew; a value that is itself named "step", "time"
    or "epoch" is in "step_" and so on; control characters in a name are written as `\\x1b`. NaN and infinity are `nan`, `inf` and
    `-inf`. Each row is flushed at once. After a resume from step S the rows beyond S are taken back; a run that begins at step 0 leaves
    what it finds in `metrics.previous.csv`.
    """

    _ctx: Any = attrs.field(default=None, init=False, repr=False)
    _path: Any = attrs.field(default=None, init=False, repr=False)
    _file: TextIO | None = attrs.field(default=None, init=False, repr=False)
    _columns: list[str] = attrs.field(factory=list, init=False, repr=False)

    def start(self, ctx: CallbackContext) -> None:
        """Open the file; take back the rows of steps that will be run again."""
        self._ctx, self._path, self._columns = ctx, ctx.run_dir / "metrics.csv", list(_FIRST)
        if self._path.exists() and ctx.step == 0:
            self._path.replace(self._path.with_name("metrics.previous.csv"))
        rows = _read(self._path)
        self._columns += [name for name in (rows[0] if rows else ()) if name not in _FIRST]
        self._write_anew(row for row in rows if _step_of(row) <= ctx.step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Append one row."""
        row = {"step": step, "time": round(time.time(), 3), "epoch": round(self._ctx.position_in("ep"), 4)}
        row |= {f"{name}_" if name in _FIRST else printable(name): value for name, value in values.items()}
        if self._file is None or not row.keys() <= set(self._columns):
            self._columns += [name for name in row if name not in self._columns]
            self._write_anew(_read(self._path))
        assert self._file is not None
        csv.DictWriter(self._file, self._columns).writerow(row)
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Take back the rows of steps that will be run again."""
        self._write_anew(row for row in _read(self._path) if _step_of(row) <= step)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _write_anew(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Put a file with all columns in the old one's place, in a way that a crash cannot lose a row."""
        replacement = self._path.with_suffix(".csv.tmp")
        with replacement.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        self.close()
        replacement.replace(self._path)
        self._file = self._path.open("a", newline="", encoding="utf-8")


def _read(path: Path) -> list[dict[str, str]]:
    """The whole rows of the file; a crash may have cut the last one short."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1].decode("utf-8", "replace")
    rows = csv.DictReader(io.StringIO(whole, newline=""))
    return [row for row in rows if None not in row and None not in row.values()]


def _step_of(row: Mapping[str, str]) -> float:
    try:
        return float(row["step"])
    except (KeyError, ValueError):
        return float("inf")
