"""`drivetrain config`: what a configuration comes to, where its values come from, and the learning rate it gives."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain.errors import ConfigError
from drivetrain_cli.terminal import clean, clean_lines, columns, faint

if TYPE_CHECKING:
    from drivetrain import TrainingConfig

OVERRIDES = "values that replace those of the file: optimizer.lr=6e-4, callbacks.checkpoint.every=100st"
HERE = "also what this machine makes of what is left open, and why; makes model and data, as a run does"


class Config:
    """Show, explain or plot a configuration without training."""

    help = "show a configuration, where its values come from, or its learning rate"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare `show`, `explain` and `plot`."""
        actions, parsers = parser.add_subparsers(metavar="ACTION", required=True), {}
        for name, action, help in (
            ("show", _show, "the resolved configuration, defaults included, as TOML"),
            ("explain", _explain, "every value with its origin: default, the file, or override"),
            ("plot", _plot, "the learning rate over the run, as a curve"),
        ):
            one = parsers[name] = actions.add_parser(name, help=help, description=f"Print {help}.")
            one.add_argument("file", metavar="FILE", help="the configuration (TOML, JSON, YAML with drivetrain-yaml)")
            one.add_argument("overrides", metavar="key=value", nargs="*", help=OVERRIDES)
            one.set_defaults(action=action)
        parsers["explain"].add_argument("--here", action="store_true", help=HERE)
        parsers["plot"].add_argument(
            "--output", metavar="FILE", type=Path, help="draw into lr.png (or .svg, .pdf) with matplotlib"
        )

    def run(self, arguments: argparse.Namespace) -> int:
        """Print the configuration, or what was asked about it."""
        from drivetrain import load_training_config

        arguments.action(load_training_config(arguments.file, overrides=arguments.overrides), arguments)
        return 0


def _plot(config: TrainingConfig, arguments: argparse.Namespace) -> None:
    from drivetrain_cli.plot import plot  # torch, which a mistake in the file need not wait for

    try:
        plot(config, arguments.output)
    except ConfigError as error:  # what only shows when the schedule is made
        error.source = arguments.file
        raise


def _show(config: TrainingConfig, arguments: argparse.Namespace) -> None:
    full = config.to_dict(full=True, secrets=False)
    print(clean_lines("\n".join(toml_lines({key: full.get(key) for key in config.to_dict()}))))


def _explain(config: TrainingConfig, arguments: argparse.Namespace) -> None:
    for key, value, origin in _aligned(config.explain()):
        print(faint(f"{key}  {value}  {origin}", sys.stdout) if origin == "default" else f"{key}  {value}  {origin}")
    if arguments.here:
        print("\nhere:", *_here(config, arguments.file), sep="\n")


def _here(config: TrainingConfig, file: str) -> list[str]:
    from drivetrain import Trainer

    try:
        chosen = Trainer(args=config).choices()
    except ConfigError as error:  # what only shows when the run is put together
        error.source = file
        raise
    rows = [(clean(key), clean(_written(value)), clean(why.removeprefix(f"{value}: "))) for key, value, why in chosen]
    return columns(rows, wrap_last=sys.stdout.isatty())


def _aligned(rows: list[tuple[str, Any, str]]) -> list[tuple[str, str, str]]:
    """Key and value padded to common widths; a value that is much longer than the others only moves its own line."""
    cells = [(clean(key), clean(_written(value)), clean(origin)) for key, value, origin in rows]
    key_width = max(len(key) for key, _, _ in cells)
    value_width = min(32, max(len(value) for _, value, _ in cells))
    return [(f"{key:<{key_width}}", f"{value:<{value_width}}", origin) for key, value, origin in cells]


def _written(value: Any) -> str:
    """A value as it would be written in a file; TOML has no word for None."""
    from drivetrain.formats import toml_value

    return "none" if value is None else toml_value(value)


def toml_lines(table: dict[str, Any]) -> list[str]:
    """A configuration as TOML: plain values, then the list of callbacks with a line for each, then tables.

    Keys without a value stand as comments, so that a reader sees that they exist.
    """
    from drivetrain.formats import to_toml, toml_value

    plain = {key: value for key, value in table.items() if not isinstance(value, dict | list)}
    lists = {key: value for key, value in table.items() if isinstance(value, list)}
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    lines = [f"# {key} is not set" if value is None else f"{key} = {toml_value(value)}" for key, value in plain.items()]
    for key, items in lists.items():
        lines += [f"{key} = [", *(f"  {toml_value(item)}," for item in items), "]"] if items else [f"{key} = []"]
    return [*lines, *to_toml(tables).splitlines()]
