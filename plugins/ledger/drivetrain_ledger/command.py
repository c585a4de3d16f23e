"""`drivetrain ledger`: the samples of a step."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


class Ledger:
    """Tell which samples fed a step."""

    help = "tell which samples fed a step of a run"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the run's directory")
        parser.add_argument("--step", metavar="N", type=_step, required=True, help="the step, from 1, or a range such as 10-20")
        parser.add_argument("--json", action="store_true", help="one JSON object for each step")

    def run(self, arguments: argparse.Namespace) -> int:
        """Print a line for each step."""
        from drivetrain_ledger.book import find, read_book

        entries = read_book(arguments.run_dir)
        for step in arguments.step:
            place = find(entries, step)
            if arguments.json:
                row = {"step": step, "epoch": place.epoch, "window": place.window, "samples": place.samples}
                print(json.dumps(row))
                continue
            where = f"step {step} (epoch {place.epoch}, window {place.window})"
            if place.samples is None:
                print(f"{where}: the data is a stream, whose samples have no numbers; count its batches from the epoch's start")
            else:
                print(f"{where}: {' '.join(map(str, place.samples))}")
        return 0


def _step(text: str) -> range:
    first, dash, last = text.partition("-")
    steps = range(int(first), int(last if dash else first) + 1)
    if not steps or steps[0] < 1:
        raise argparse.ArgumentTypeError("steps count from 1, such as 10 or 10-20")
    return steps
