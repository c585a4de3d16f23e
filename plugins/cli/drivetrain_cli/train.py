"""`drivetrain train` and `drivetrain resume`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from drivetrain.errors import ConfigError, DrivetrainError, suggest
from drivetrain_cli.config import OVERRIDES
from drivetrain_cli.names import SAVED_CONFIG, name_run
from drivetrain_cli.terminal import shown_path


class Train:
    """Train from a configuration file; the same command goes on with the same run, a changed configuration starts another."""

    help = "train from a configuration file"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("file", metavar="FILE", help="the configuration (TOML, JSON, YAML with drivetrain-yaml)")
        parser.add_argument("overrides", metavar="key=value", nargs="*", help=OVERRIDES)
        parser.add_argument("--run-name", metavar="NAME", help="by default two words that follow from the configuration")
        parser.add_argument(
            "--resume", metavar="auto|never|PATH", help="go on from the newest checkpoint (auto), from PATH, or begin anew"
        )
        parser.add_argument(
            "--audit",
            action="store_true",
            help="name each plugin and line that makes an ordinary step wait, write a file or communicate (drivetrain-audit); "
            "callbacks.audit.fail=true makes that an error",
        )

    def run(self, arguments: argparse.Namespace) -> int:
        """Train; the exit code says whether the run is complete."""
        given = {"run_name": arguments.run_name, "resume": arguments.resume}
        asked = arguments.audit and not any(text.startswith("callbacks.audit.") for text in arguments.overrides)
        audit = ["callbacks.audit.show=true"] if asked else []  # after a list of callbacks, which it adds itself to
        return _train(Path(arguments.file), [*arguments.overrides, *audit, *_overrides(given)])


class Resume:
    """Go on with a run from its directory, with the configuration it began with."""

    help = "go on with a run from its directory"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the run's directory, such as runs/tidy-otter")
        parser.add_argument("overrides", metavar="key=value", nargs="*", help=f"{OVERRIDES} (not kept for the next time)")

    def run(self, arguments: argparse.Namespace) -> int:
        """Train from the newest checkpoint on."""
        where = Path(os.path.abspath(arguments.run_dir))  # not resolve(): a link to a run keeps the name it is called by
        if not (where / SAVED_CONFIG).is_file():
            raise DrivetrainError(f"{arguments.run_dir} is no run of drivetrain train (no {SAVED_CONFIG}).{_runs_near(where)}")
        given = {"output_dir": str(where.parent), "run_name": where.name}  # it may have been moved
        return _train(where / SAVED_CONFIG, [*_overrides({"resume": "auto"}), *arguments.overrides, *_overrides(given)])


def _train(file: Path, overrides: Sequence[str]) -> int:
    from drivetrain import load_training_config

    config = load_training_config(file, overrides=overrides)
    if config.run_name is None:
        config.run_name = name_run(config)
    from drivetrain_cli.session import train  # torch, which a mistake in the file need not wait for

    try:
        return train(config)
    except ConfigError as error:  # what only shows when the run is put together
        error.source = str(file)
        raise


def _overrides(values: Mapping[str, str | None]) -> list[str]:
    """Options as overrides; quoted, so that a name such as 2024 stays a text."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]


def _runs_near(where: Path) -> str:
    """The runs below or beside a directory that is none, for `runs` itself or a mistyped name."""
    for parent in (where, where.parent):
        if runs := sorted(found.parent.name for found in parent.glob(f"*/{SAVED_CONFIG}")):
            said = f" Runs in {shown_path(parent)}: {', '.join(runs[:8])}{', …' if len(runs) > 8 else '.'}"
            return suggest(where.name, runs) or said
    return ""
