"""What a command of the `drivetrain` program is: an entry point of the group `drivetrain.command`.

A distribution adds `drivetrain export` with one class and one line of metadata; it depends on the core alone:

    class Export:
        help = "write the model of a run as ONNX"

        def add_arguments(self, parser: argparse.ArgumentParser) -> None:
            parser.add_argument("run_dir", metavar="RUN_DIR")

        def run(self, arguments: argparse.Namespace) -> int:
            ...
            return 0

    [project.entry-points."drivetrain.command"]
    export = "my_package:Export"
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import argparse


class Command(Protocol):
    """One subcommand. The entry point names an object like this, or a class that makes one without arguments.

    It is imported only when it is the command that was asked for, so imports at the module's top cost nobody else.
    """

    help: str  # one line, for people; "write the model of a run as ONNX"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments on the command's own parser."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do the work and return the exit code.

        Raise a `DrivetrainError` for a mistake of the user's: it is printed without a traceback, and the exit code is 2.
        """
        ...
