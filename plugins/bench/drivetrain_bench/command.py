"""`drivetrain bench FILE`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


class Bench:
    """Measure a configuration."""

    help = "measure what the engine costs your configuration, and what would make it faster"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("file", metavar="FILE", help="the configuration")
        parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that replace those of the file")
        parser.add_argument("--steps", metavar="N", type=int, default=10, help="steps of one turn (10)")
        parser.add_argument("--turns", metavar="K", type=int, default=5, help="turns of each that is compared (5)")
        parser.add_argument("--no-advice", action="store_true", help="do not try what might be faster")
        parser.add_argument("--json", action="store_true", help="print the numbers as JSON")

    def run(self, arguments: argparse.Namespace) -> int:
        """Measure and print."""
        from drivetrain import ConfigError, DrivetrainError, load_training_config
        from drivetrain_bench.measure import bench

        if arguments.steps < 1 or arguments.turns < 1:
            raise DrivetrainError("--steps and --turns must be at least 1.")
        config = load_training_config(arguments.file, overrides=arguments.overrides)
        try:
            with _terminated_like_ctrl_c(), _compiling_anew():
                report = bench(
                    config,
                    steps=arguments.steps,
                    turns=arguments.turns,
                    advice=not arguments.no_advice,
                    say=lambda text: print(text, file=sys.stderr, flush=True),
                )
        except ConfigError as error:  # what only shows when a run is put together
            error.source = arguments.file
            raise
        print(json.dumps(report.plain(), indent=1) if arguments.json else report)
        return 0


@contextmanager
def _compiling_anew() -> Iterator[None]:
    """Within the block compiled code is kept in a temporary directory, so that compiling takes as long as the first time. Not for callers
    from Python: torch remembers files in it as long as the process lives."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix="drivetrain-bench-", ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


@contextmanager
def _terminated_like_ctrl_c() -> Iterator[None]:
    """Within the block SIGTERM is a `KeyboardInterrupt` too, so that the temporary folders go; one that is ignored still is."""
    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
