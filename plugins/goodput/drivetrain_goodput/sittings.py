"""The totals of each sitting in a file, and the table over all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from attrs import asdict, define, field

TOTALS_FILE = "goodput.json"
BAR = 24  # columns of the longest bar of the table
STEP_PARTS = ("forward and backward", "communication", "optimizer")


@define
class Sitting:
    """One process's part of a run. `parts` are seconds by name; together they are `seconds`, from the begin to now."""

    began: float  # seconds since 1970
    first_step: int
    last_step: int
    seconds: float = 0.0
    parts: dict[str, float] = field(factory=dict)
    ended: bool = False  # false as long as it runs, and for ever if it was killed


def read_sittings(run_dir: Path) -> list[Sitting]:
    """The sittings of a run so far; none when there is no file, or none that can be read."""
    try:
        rows = json.loads((run_dir / TOTALS_FILE).read_text(encoding="utf-8"))["sittings"]
        return [Sitting(**row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write_sittings(run_dir: Path, sittings: list[Sitting]) -> None:
    """Write them, in a way that a crash leaves the old file or the new one."""
    rows: list[Mapping[str, Any]] = [asdict(sitting) for sitting in sittings]
    replacement = run_dir / f"{TOTALS_FILE}.tmp"
    replacement.write_text(json.dumps({"sittings": rows}, indent=1), encoding="utf-8")
    replacement.replace(run_dir / TOTALS_FILE)


def totals(sittings: list[Sitting]) -> dict[str, float]:
    """Seconds by name over all sittings, and between them as `down`: stopped, killed, waiting in a queue, starting Python."""
    found: dict[str, float] = {}
    for sitting in sittings:
        for name, seconds in sitting.parts.items():
            found[name] = found.get(name, 0.0) + seconds
    gaps = [max(0.0, after.began - before.began - before.seconds) for before, after in pairwise(sittings)]
    return found | ({"down": sum(gaps)} if gaps else {})


def repeated_steps(sittings: list[Sitting]) -> int:
    """Steps that were done again, since a sitting ended without saving them."""
    return sum(max(0, before.last_step - after.first_step) for before, after in pairwise(sittings))


def repeated_seconds(sittings: list[Sitting]) -> float:
    """About how long those steps took the first time: the mean of their sitting's."""
    lost = 0.0
    for before, after in pairwise(sittings):
        steps = before.last_step - before.first_step
        busy = sum(before.parts.get(name, 0.0) for name in ("data wait", "transfer", *STEP_PARTS))
        lost += max(0, before.last_step - after.first_step) * busy / steps if steps else 0.0
    return lost


def table(sittings: list[Sitting], device: str, mark: str) -> Iterator[str]:
    """The lines that a person reads at the end, the largest part first, each with a bar made of `mark`."""
    parts = totals(sittings)
    whole = sum(parts.values())
    restarts = len(sittings) - 1
    again = f"{repeated_steps(sittings)} steps ({repeated_seconds(sittings):.1f} s) repeated"
    more = f", {restarts} restart{'s' * (restarts > 1)}, {again}" if restarts else ""
    yield f"where {whole:.1f} s went{more}" + (
        "" if device == "cpu" else f"; time of the host, which launches work on the {device}"
    )
    shown = sorted((part for part in parts.items() if part[1] >= 0.0005 * whole), key=lambda part: -part[1])
    width, digits = max((len(name) for name, _ in shown), default=0), len(f"{whole:.1f}")
    for name, seconds in shown:
        bar = mark * round(BAR * seconds / shown[0][1])
        yield f"  {name:<{width}}  {seconds:{digits}.1f} s  {seconds / whole:5.1%}  {bar}".rstrip()
