"""A tracker that needs nothing but a file."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import attrs

from drivetrain import Tracker, component

if TYPE_CHECKING:
    from drivetrain import CallbackContext


@component
class JsonlTracker(Tracker):
    """Write `metrics.jsonl` into the run's directory: one JSON object a line for each log and each evaluation.

    A line has "step", "time" (seconds since 1970), "epoch" (passes over the data, with the part of the current one) and the
    values under their names. JSON has no NaN and no infinity; they are the texts "NaN", "Infinity" and "-Infinity", which
    `float()` reads. A value that is itself named "step", "time" or "epoch" is written as "step_" and so on. Each line is flushed at once.
    After a resume from step S the lines beyond S are taken back; a run that begins at step 0 leaves what it finds in
    `metrics.previous.jsonl`.
    """

    _ctx: Any = attrs.field(default=None, init=False, repr=False)
    _file: BinaryIO | None = attrs.field(default=None, init=False, repr=False)

    def start(self, ctx: CallbackContext) -> None:
        """Open the file; take back the lines of steps that will be run again."""
        path = ctx.run_dir / "metrics.jsonl"
        if path.exists() and ctx.step == 0:  # a run that begins anew in an old directory
            path.replace(path.with_name("metrics.previous.jsonl"))
        elif path.exists():
            _keep_until(path, ctx.step)
        self._ctx, self._file = ctx, path.open("ab")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Append one line."""
        assert self._file is not None
        row = {"step": step, "time": round(time.time(), 3), "epoch": round(self._ctx.position_in("ep"), 4)}
        row |= {f"{name}_" if name in row else name: _in_json(value) for name, value in values.items()}
        # Buffered, so that what a full disk refuses stays in the buffer, whole, and goes out first with a later line.
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Take back the lines of steps that will be run again."""
        if self._file is not None:
            path = self._ctx.run_dir / "metrics.jsonl"
            self._file.close()
            _keep_until(path, step)
            self._file = path.open("ab")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        self._ctx = self._file = None


def _in_json(value: float) -> Any:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines beyond `step` and a last line that a crash cut short, in a way that a crash cannot lose the rest."""
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) == len(lines):
        return
    replacement = path.with_suffix(".jsonl.tmp")
    with replacement.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    replacement.replace(path)


def _step_of(line: bytes) -> float:
    """The step of a complete line; infinity for anything else."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
