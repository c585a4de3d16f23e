"""`drivetrain doctor`: whether this machine and environment can train, and what to do when not."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from drivetrain import DrivetrainError, is_installed
from drivetrain.registry import find
from drivetrain_doctor.checks import Finding, examine

__all__ = ["Doctor", "Finding", "examine"]


class Doctor:
    """Look at everything that a training needs from its machine and environment."""

    help = "say whether this machine and environment can train, and what to do when not"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("--json", action="store_true", help="as JSON, for programs")
        parser.add_argument(
            "--hang", metavar="RUN_DIR", type=Path, help="say who kept a run's processes waiting (drivetrain-watchdog)"
        )
        parser.add_argument("--output-dir", metavar="DIR", type=Path, default=Path("runs"), help="where runs are kept (runs)")

    def run(self, arguments: argparse.Namespace) -> int:
        """Print the findings as they come; 1 when something failed, else 0."""
        if arguments.hang is not None:
            return _hang(arguments.hang)
        found = []
        for finding in _examined(arguments.output_dir):
            found.append(finding)
            if not arguments.json:
                print(finding, flush=True)
        failed = [finding for finding in found if not finding.ok]
        if arguments.json:
            print(json.dumps([finding.as_data() for finding in found], indent=2))
        else:
            print(f"{len(failed)} of {len(found)} failed" if failed else "all is well")
        return 1 if failed else 0


def _examined(output_dir: Path) -> Iterator[Finding]:
    """The findings; what plugins print while they are asked goes to standard error, which no program reads as JSON."""
    findings = examine(output_dir)
    while True:
        with redirect_stdout(sys.stderr):
            finding = next(findings, None)
        if finding is None:
            return
        yield finding


def _hang(run_dir: Path) -> int:
    """What the command `hang` says, where there is one."""
    if not is_installed("command", "hang"):
        raise DrivetrainError("--hang reads what the callback watchdog has written: pip install drivetrain-watchdog")
    loaded: Any = find("command", "hang").load()
    return int(loaded().run(argparse.Namespace(run_dir=run_dir)))
