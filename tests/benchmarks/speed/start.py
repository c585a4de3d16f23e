"""(c): what importing costs, and how long it takes until the first step is done, in fresh processes that take turns.

    python tests/benchmarks/speed/start.py [--rounds 9] [--out FOLDER]

The raw loop builds the same model, data and fused AdamW. Seconds are the process's own, from its first line on; `--help` is timed from
outside, with the interpreter's start. Loop and peers find their own distributions alone installed (`environments.py`).
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from environments import python
from report import environment, save
from worker import ENGINES

HERE = Path(__file__).parent
BEGIN = "import time; began = time.perf_counter(); import sys, torch\n"
END = "\nprint(time.perf_counter() - began, len(sys.modules))"
ONE_STEP = (
    f"import os; sys.path.insert(0, {str(HERE)!r}); from task import Task; task = Task(steps=2, warmup=0, folder=sys.argv[1])\n"
)
CASES: dict[str, str] = {
    "import torch": "",
    "and drivetrain": "import drivetrain",
    "and drivetrain's Trainer": "from drivetrain import Trainer, TrainingConfig",
    "two steps, raw loop": f"{ONE_STEP}from raw import tuned; tuned(task)",
    "two steps, drivetrain": f"{ONE_STEP}from with_drivetrain import train; train(task)",
    "two steps, ignite": f"{ONE_STEP}from with_ignite import train; train(task)",
    "two steps, accelerate": f"{ONE_STEP}from with_accelerate import train; train(task)",
    "two steps, lightning": f"{ONE_STEP}from with_lightning import train; train(task)",
    "two steps, hf": f"{ONE_STEP}from with_hf import train; train(task)",
}
PEERS = {"ignite": "ignite", "accelerate": "accelerate", "lightning": "lightning", "hf": "transformers"}
# of the last word of a case; the others find everything
DISTRIBUTIONS = {"loop": ENGINES["raw, tuned"][2]} | {name: ENGINES[name][2] for name in PEERS}


def once(name: str, folder: Path) -> tuple[float, int]:
    """Seconds and modules of one process."""
    command, variables = python(DISTRIBUTIONS.get(name.rpartition(" ")[2], ()))
    command += ["-c", BEGIN + CASES[name] + END, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
    seconds, modules = done.stdout.strip().rpartition("\n")[2].split()
    return float(seconds), int(modules)


def help_seconds() -> float | None:
    """`drivetrain --help`, from outside; None without the command line."""
    program = shutil.which("drivetrain", path=str(Path(sys.executable).parent))
    if program is None:
        return None
    began = time.perf_counter()
    subprocess.run([program, "--help"], capture_output=True, check=True)
    return time.perf_counter() - began


def measure(rounds: int, folder: Path) -> dict[str, Any]:
    """All cases in turns."""
    missing = {name for name, module in PEERS.items() if importlib.util.find_spec(module) is None}
    cases = {name: code for name, code in CASES.items() if name.rpartition(" ")[2] not in missing}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    modules: dict[str, int] = {}
    helps = []
    for index in range(rounds + 1):
        for name in cases:
            found, modules[name] = once(name, folder)
            if index:  # the first round writes bytecode and fills the disk's cache
                seconds[name].append(found)
        helps.append(help_seconds())
    rows = {name: {"seconds": statistics.median(s), "least": min(s), "modules": modules[name]} for name, s in seconds.items()}
    known = [value for value in helps[1:] if value is not None]
    return {"rows": rows, "help_seconds": statistics.median(known) if known else None, "rounds": rounds}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--toy", action="store_true", help="one round")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    result = measure(1 if given.toy else given.rounds, given.out) | {"environment": environment()}
    save(given.out, "start", result)
    print("| | seconds | least | modules |\n| --- | --- | --- | --- |")
    for name, row in result["rows"].items():
        print(f"| {name} | {row['seconds']:.3f} | {row['least']:.3f} | {row['modules']} |")
    if result["help_seconds"] is not None:
        print(f"| `drivetrain --help`, whole process | {result['help_seconds']:.3f} | | |")


if __name__ == "__main__":
    main()
