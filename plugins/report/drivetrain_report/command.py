"""`drivetrain report` and `drivetrain runs`."""

from __future__ import annotations

import argparse
from pathlib import Path

from drivetrain import DrivetrainError

RUNS = Path("runs")


class Report:
    """Write a page on one run, or on several side by side."""

    help = "write a page on one run or several: curves, goodput, evaluations, events, configuration"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's directory, or its name below runs/")
        where = "by default report.html in the run's directory, or beside the first one's when there are several"
        parser.add_argument("--output", metavar="FILE", type=Path, help=f"the HTML file to write; {where}")

    def run(self, arguments: argparse.Namespace) -> int:
        """Write the page and say where it is."""
        from drivetrain_report.page import page
        from drivetrain_report.reading import read_run

        paths = list(dict.fromkeys(find(name) for name in arguments.runs))
        output = arguments.output or (paths[0] if len(paths) == 1 else paths[0].parent) / "report.html"
        if output.is_dir():
            raise DrivetrainError(f"{output} is a directory; name a file, such as --output {output / 'report.html'}.")
        text = page([read_run(path) for path in paths])
        replacement = output.with_name(f"{output.name}.tmp")
        replacement.write_bytes(text.encode("utf-8", "replace"))
        replacement.replace(output)
        print(f"{output}  ({len(text) / 1e6:.1f} MB, opens in any browser, offline)")
        return 0


class Runs:
    """List runs, or compare two."""

    help = "list runs, or compare two of them"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare `list` and `compare`."""
        actions = parser.add_subparsers(metavar="ACTION", required=True)
        text = "the runs of a directory, the newest first"
        listing = actions.add_parser("list", help=text, description=f"List {text}.")
        listing.add_argument("directory", metavar="DIR", type=Path, nargs="?", default=RUNS, help="where runs are kept (runs)")
        listing.add_argument("--json", action="store_true", help="as JSON, for programs")
        listing.set_defaults(action=_list)
        text = "results, configuration and environment of two runs"
        compare = actions.add_parser("compare", help=text, description=f"Compare {text}.")
        for name in ("a", "b"):
            compare.add_argument(name, metavar=name.upper(), help="a run's directory, or its name below runs/")
        compare.add_argument("--all", action="store_true", help="also what is the same in both")
        compare.set_defaults(action=_compare)

    def run(self, arguments: argparse.Namespace) -> int:
        """Print the list or the comparison."""
        return int(arguments.action(arguments))


def find(name: str) -> Path:
    """The directory of a run that is given by its path, or by its name below `runs`."""
    path = Path(name)
    return RUNS / name if not path.exists() and (RUNS / name).is_dir() else path


def _list(arguments: argparse.Namespace) -> int:
    from drivetrain_report.listing import as_json, lines, look

    if not arguments.directory.is_dir():
        raise DrivetrainError(
            f"{arguments.directory} is no directory. Name the one that keeps your runs: drivetrain runs list DIR"
        )
    found = look(arguments.directory)
    if arguments.json:
        print(as_json(found))
    elif not found:
        print(f"no runs in {arguments.directory}")
    else:
        print("\n".join(lines(found)))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from drivetrain_report.comparing import compared
    from drivetrain_report.reading import read_run

    one, other = (read_run(find(name)) for name in (arguments.a, arguments.b))
    print("\n".join(compared(one, other, everything=arguments.all)))
    return 0
