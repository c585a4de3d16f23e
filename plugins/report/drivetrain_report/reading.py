"""What a run's directory tells: its metrics, checkpoints, goodput, events, configuration and environment. Nothing in it is trusted."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

from drivetrain import DrivetrainError
from drivetrain_report.manifest import Setting, config_settings, environment_settings, plain
from drivetrain_report.series import METRICS_FILE, Metrics, Series, known, number, read_metrics

_MOST_BYTES = 1 << 28  # of a JSON file that is read whole
_MOST_EVENTS = 5000
_CHECKPOINT = re.compile(r"step-\d{8,}(?:-\d+)?")
_MOST_STEPS = 1 << 53  # beyond that a float cannot tell one step from the next
_OWN_KEYS = ("event", "step", "time")


@frozen
class Event:
    """Something that happened once. `text` is for people; time in seconds since 1970."""

    kind: str
    step: float | None
    time: float | None
    text: str


@frozen
class Sitting:
    """One process's part of the run, as goodput accounts for it: seconds by part."""

    began: float
    first_step: int
    last_step: int
    seconds: float
    parts: Mapping[str, float]
    ended: bool


@define(slots=False)
class Run:
    """A run as it is on disk. `notes` say what could not be read."""

    path: Path
    metrics: Metrics
    notes: list[str] = field(factory=list)

    @property
    def name(self) -> str:
        """The directory's name, by which the run is called."""
        return self.path.name

    @cached_property
    def sittings(self) -> list[Sitting]:
        """From goodput's account; none when the run keeps none."""
        table = _table(self.path / "goodput.json")
        return [one for row in _list(table.get("sittings")) if (one := _sitting(row)) is not None]

    @cached_property
    def state(self) -> Mapping[str, Any]:
        """`progress` and `manifest` of the newest checkpoint that can be read, as plain data."""
        for _, directory in reversed(_checkpoints(self.path)):
            tree = _table(directory / "state.json")
            if isinstance(tree.get("manifest"), dict):
                return {key: plain(tree.get(key)) for key in ("progress", "manifest")}
        return {}

    @property
    def manifest(self) -> Mapping[str, Any]:
        """What the run is made of; empty when no checkpoint tells."""
        return _mapping(self.state.get("manifest"))

    @property
    def progress(self) -> Mapping[str, Any]:
        """Steps, samples and tokens at the newest checkpoint; empty when none tells."""
        return _mapping(self.state.get("progress"))

    @cached_property
    def saved(self) -> Mapping[str, Any]:
        """config.json, with which the command line goes on with the run; empty for a run of another program."""
        return _table(self.path / "config.json")

    @cached_property
    def settings(self) -> list[Setting]:
        """The configuration with the origin of each value."""
        return config_settings(self.manifest, self.saved)

    @cached_property
    def environment(self) -> list[Setting]:
        """Versions, hardware, processes, model and data."""
        return environment_settings(self.manifest)

    @cached_property
    def events(self) -> list[Event]:
        """Everything that happened, in the order of steps."""
        found = [*self._recorded(), *self._of_checkpoints(), *self._of_sittings(), *_hangs(self.path)]
        return sorted((self._placed(one) for one in found), key=lambda one: (one.step or 0, one.time or 0))

    def series(self, name: str) -> Series:
        """A metric's values; an empty series when there are none."""
        return self.metrics.series.get(name) or Series()

    def _recorded(self) -> Iterator[Event]:
        path = self.path / "events.jsonl"
        if not path.is_file():
            return
        with path.open("rb") as file:
            for count, line in enumerate(file):
                if count == _MOST_EVENTS:
                    self.notes.append(f"events.jsonl has more than {_MOST_EVENTS} lines; the rest is left out")
                    return
                if (row := _json(line)) is not None:
                    yield Event(str(row.get("event", "event")), number(row.get("step")), number(row.get("time")), _told(row))

    def _of_checkpoints(self) -> Iterator[Event]:
        for step, directory in _checkpoints(self.path):
            size = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
            yield Event("checkpoint", step, None, f"{directory.name}, {size / 1e6:.1f} MB")

    def _of_sittings(self) -> Iterator[Event]:
        before: Sitting | None = None
        for one in self.sittings:
            if before is not None:
                down, again = one.began - before.began - before.seconds, before.last_step - one.first_step
                how = "ended" if before.ended else "was killed"
                text = f"the sitting before {how} {max(0.0, down):.0f} s earlier" + (f", {again} steps repeated" * (again > 0))
                yield Event("restart", one.first_step, one.began, text)
            before = one

    def _placed(self, event: Event) -> Event:
        """An event that tells no time gets that of the last values logged before it."""
        steps = self.metrics.step
        if event.time is not None or event.step is None or not steps:
            return event
        row = bisect_right(steps, event.step) - 1
        return Event(event.kind, event.step, known(self.metrics.time[row]) if row >= 0 else None, event.text)


def read_run(path: Path) -> Run:
    """Read a run.

    Raises:
        DrivetrainError: when the directory does not exist or holds nothing of a run.
    """
    path = Path(path)
    if not path.is_dir():
        raise DrivetrainError(
            f"{path} is no directory. Name a run's directory, such as runs/tidy-otter (drivetrain runs list)."
        )
    if not is_run(path):
        raise DrivetrainError(f"{path} holds no run: neither {METRICS_FILE} nor config.json nor a checkpoint.")
    metrics = read_metrics(path / METRICS_FILE)
    run = Run(path.absolute(), metrics)
    if metrics.torn:
        run.notes.append(
            f"the last line of {METRICS_FILE} was cut short and is left out; the run was killed, or is still writing"
        )
    if metrics.unreadable:
        run.notes.append(f"{metrics.unreadable} lines of {METRICS_FILE} cannot be read and are left out")
    if not metrics.step:
        run.notes.append(f"no metrics: {METRICS_FILE} is missing or empty (the callback logging writes it)")
    return run


def is_run(path: Path) -> bool:
    """Whether a directory holds what a run writes."""
    return (path / METRICS_FILE).is_file() or (path / "config.json").is_file() or bool(_checkpoints(path))


def _checkpoints(path: Path) -> list[tuple[int, Path]]:
    """Checkpoints with their steps, by step; one without a manifest is none."""
    found = []
    try:
        for directory in (path / "checkpoints").iterdir():
            step = _table(directory / "manifest.json").get("step")
            if _CHECKPOINT.fullmatch(directory.name) and isinstance(step, int) and 0 <= step < _MOST_STEPS:
                found.append((step, directory))
    except OSError:
        return []
    return sorted(found)


def _hangs(path: Path) -> Iterator[Event]:
    """What the watchdog wrote: one event for all ranks."""
    rows = [table for file in sorted((path / "hang").glob("rank-*.json")) if (table := _table(file))]
    if rows:
        first, idle = rows[0], number(rows[0].get("idle")) or 0.0
        text = f"no progress for {idle:.0f} s; see: drivetrain hang"
        yield Event("hang", number(first.get("step")), number(first.get("time")), text)


def _told(row: dict[str, Any]) -> str:
    """An event in a line: of an anomaly what was found and done, of any other its values."""
    if row.get("event") == "anomaly" and {"tensor", "kind", "policy", "did"} <= row.keys():
        what = "NaN or infinity" if row["kind"] == "nonfinite" else "a spike"
        values = f"loss {_short(row.get('loss'))}, gradient norm {_short(row.get('grad_norm'))}"
        return f"{what} in {row['tensor']} ({values}). {row['policy']}: {row['did']}"
    return ", ".join(f"{key} {_short(value)}" for key, value in row.items() if key not in _OWN_KEYS)


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 200 else f"{text[:199]}…"


def _sitting(row: Any) -> Sitting | None:
    try:
        parts = {str(name): _sensible(seconds) for name, seconds in row["parts"].items()}
        steps = int(_sensible(row["first_step"])), int(_sensible(row["last_step"]))
        return Sitting(_sensible(row["began"]), *steps, _sensible(row["seconds"]), parts, bool(row["ended"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _sensible(value: Any) -> float:
    """A number of seconds or steps that sums of such cannot make infinite."""
    found = number(value)
    if found is None or not 0 <= found < _MOST_STEPS:
        raise ValueError(f"{value!r} is no time or step")
    return found


def _table(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty for everything that is none."""
    try:
        if path.is_file() and path.stat().st_size <= _MOST_BYTES:
            return _json(path.read_bytes()) or {}
    except OSError:
        pass
    return {}


def _json(data: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
