"""`drivetrain verify-resume`: the promise, tried on one's own configuration."""

from __future__ import annotations

import argparse
import sys

from drivetrain import DrivetrainError


class VerifyResume:
    """Kill a run for real and see whether it ends the same."""

    help = "kill a run of your configuration at random instants, resume it, and compare it bit by bit"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("file", metavar="FILE", help="the configuration")
        parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that replace those of the file")
        parser.add_argument("--steps", metavar="N", type=int, default=20, help="how long the run is (20)")
        parser.add_argument("--kills", metavar="K", type=int, default=3, help="how often it is killed (3)")
        parser.add_argument("--seed", type=int, default=0, help="chooses the instants (0)")

    def run(self, arguments: argparse.Namespace) -> int:
        """Print what was found; 0 when all was equal, else 1."""
        from drivetrain_verify.trial import verify_resume

        if arguments.steps < 2 or arguments.kills < 1:
            raise DrivetrainError("at least two steps and one kill are needed to verify anything.")
        report = verify_resume(
            arguments.file,
            arguments.overrides,
            steps=arguments.steps,
            kills=arguments.kills,
            seed=arguments.seed,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
        print(report)
        return 0 if report.passed else 1
