"""`drivetrain hang RUN`: who kept the others waiting."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from drivetrain import DrivetrainError

_FRAME = re.compile(r'File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<name>\S+)')
_OF_LIBRARIES = ("site-packages", "dist-packages", "/lib/python")


class Hang:
    """Read what the processes of a run wrote when it made no progress."""

    help = "say where the processes of a run stood when it made no progress (callback watchdog)"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the run's directory, such as runs/tidy-otter")

    def run(self, arguments: argparse.Namespace) -> int:
        """Print one line for each process, and who is missing; 1 when nothing was written."""
        if not arguments.run_dir.is_dir():
            raise DrivetrainError(f"{arguments.run_dir} is no directory.")
        print("\n".join(lines := report(arguments.run_dir)))
        return 0 if len(lines) > 1 else 1


def report(run_dir: Path) -> list[str]:
    """What is known about the newest time without progress."""
    folder = run_dir / "hang"
    found = {row["rank"]: row for path in folder.glob("rank-*.json") for row in [json.loads(path.read_text(encoding="utf-8"))]}
    if not found:
        return [f"{run_dir}: no process has written anything; was the callback watchdog active?"]
    first = max(found.values(), key=lambda row: float(row["time"]))
    lines = [f"no progress for {first['idle']:.0f} s at step {first['step']}"]
    for rank in range(first["world_size"]):
        told = _standing(found[rank], folder) if rank in found else _silence(rank, list(found.values()))
        lines.append(f"  {told}")
    return [*lines, _verdict(found, first["world_size"]), f"stacks: {folder}/rank-*.txt"]


def _standing(row: dict[str, Any], folder: Path) -> str:
    last = max(row["collectives"], key=lambda c: (not c["ended"], c["number"]), default=None)
    where = "" if last is None else f"  {'after' if last['ended'] else 'in'} {last['name']} number {last['number']}"
    return f"rank {row['rank']} on {row['host']}  step {row['step']}{where}  {_frames(row, folder)}"


def _silence(rank: int, others: list[dict[str, Any]]) -> str:
    """What the others know of one that has written nothing; those on its own machine know most."""
    known = [peer for row in others for peer in row["peers"] if peer["rank"] == rank]
    if not known:
        return f"rank {rank}  has written nothing"
    peer = next((peer for peer in known if peer["state"] != "unknown"), known[0])
    return f"rank {rank} on {peer['host']}  has written nothing; process {peer['pid']} is {peer['state']}"


def _verdict(found: dict[int, dict[str, Any]], world_size: int) -> str:
    """Those that wrote nothing; else those whose last collective has a lower number than the others'."""
    late = [rank for rank in range(world_size) if rank not in found] or _behind(found)
    if not late:
        return "all processes are at the same collective: look at the stacks"
    names = ", ".join(map(str, late[:8])) + (" …" if len(late) > 8 else "")
    return f"rank{'s' if len(late) > 1 else ''} {names} keep{'s' if len(late) == 1 else ''} the others waiting"


def _behind(found: dict[int, dict[str, Any]]) -> list[int]:
    groups: dict[str, dict[int, int]] = {}
    for rank, row in found.items():
        for one in row["collectives"]:
            groups.setdefault(one["group"], {})[rank] = one["number"]
    return sorted({rank for numbers in groups.values() for rank, number in numbers.items() if number < max(numbers.values())})


def _frames(row: dict[str, Any], folder: Path) -> str:
    """Where the main thread is in the code of the run itself, innermost first: three frames outside of libraries."""
    try:
        text = (folder / f"rank-{row['rank']}.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    threads = re.split(r"\n(?=Thread|Current thread)", text)
    main = next((t for t in threads if f"{row['main_thread']:#018x}" in t), threads[0])
    frames = [m for m in _FRAME.finditer(main) if not any(part in m["file"] for part in _OF_LIBRARIES)]
    return " < ".join(f"{m['name']} ({Path(m['file']).name}:{m['line']})" for m in frames[:3])
