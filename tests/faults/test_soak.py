"""F23: one process trains for long while disks fill up, signals come and processes are killed; it ends exact, and as large as before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads what a process holds from /proc"),
    pytest.mark.timeout(7200),
]
SOAK = float(os.environ.get("SOAK", "1800"))  # seconds
MAY_GROW = {"fds": 0, "threads": 0, "children": 0, "shared": 0, "rss": 4 << 20}  # rss in bytes: half a megabyte comes and goes


def soak(folder: Path, seconds: float, runs: int, *leaks: str) -> list[dict[str, Any]]:
    """What the process held after each run; each was compared with the uninterrupted one."""
    root = Path(__file__).parents[2]
    program = [sys.executable, str(Path(__file__).with_name("soaked.py")), str(folder), str(seconds), str(runs), *leaks]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(program, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def grown(rows: list[dict[str, Any]]) -> set[str]:
    """What there was more of throughout the last third of the runs than at any time of the second; the first is for warming up."""
    third = len(rows) // 3
    before, after = rows[third : 2 * third], rows[2 * third :]
    return {
        name for name, more in MAY_GROW.items() if min(row[name] for row in after) > max(row[name] for row in before) + more
    }


def test_eight_runs(tmp_path: Path) -> None:
    rows = soak(tmp_path, 0, 8)
    assert len(rows) == 8 and grown(rows) == set(), rows
    assert all(rows[-1][what] > 0 for what in ("full disk", "signal", "killed")), rows[-1]


def test_it_would_notice_what_is_lost(tmp_path: Path) -> None:
    """Negative control."""
    leaks = [name for name in MAY_GROW if name != "shared" or Path("/dev/shm").is_dir()]
    assert grown(soak(tmp_path, 0, 6, *leaks)) == set(leaks)


@pytest.mark.slow
def test_half_an_hour(tmp_path: Path) -> None:
    rows = soak(tmp_path, SOAK, 30)
    print(len(rows), rows[len(rows) // 3], rows[-1])
    assert grown(rows) == set(), rows
    assert all(rows[-1][what] > len(rows) / 10 for what in ("full disk", "signal", "killed")), rows[-1]
