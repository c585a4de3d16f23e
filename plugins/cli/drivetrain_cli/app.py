"""The program: find the command that was named, run it, and turn whatever it raises into a line and an exit code.

Exit codes: 0 done, 1 something failed inside a run, 2 a mistake in what was asked for, 75 interrupted but resumable (run the
same command again), 130 interrupted at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast

from drivetrain import __version__
from drivetrain.commands import Command
from drivetrain.errors import DrivetrainError, PluginError, suggest
from drivetrain.registry import Candidate, candidates, find
from drivetrain_cli.config import Config
from drivetrain_cli.errors import USER_ERROR, exit_code, explain, warnings_as_lines
from drivetrain_cli.plugins import Plugins
from drivetrain_cli.terminal import clean, clean_lines, columns
from drivetrain_cli.train import Resume, Train

DISTRIBUTION = "drivetrain-cli"
OWN: Mapping[str, type[Command]] = {"train": Train, "resume": Resume, "plugins": Plugins, "config": Config}
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `drivetrain` program and return its exit code; usage errors and `--help` leave by SystemExit, as in argparse."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show "·" must not end a training
            stream.reconfigure(errors="replace")
    debug, words = _split_debug(sys.argv[1:] if argv is None else argv)
    try:
        try:
            with warnings_as_lines(debug):
                return _run(words)
        finally:
            sys.stdout.flush()  # here, so that a closed pipe is met inside the `try`
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not hasattr(error, "__notes__"):
            return _reader_has_gone()
        explain(error, debug)
        return exit_code(error)


def _split_debug(words: Sequence[str]) -> tuple[bool, list[str]]:
    """Take `--debug` out, wherever it stands before a `--`."""
    end = words.index("--") if "--" in words else len(words)
    return "--debug" in words[:end], [word for i, word in enumerate(words) if word != "--debug" or i >= end]


def _run(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        parser = _top_parser()
        parser.parse_args(words)
        parser.print_help()
        return 0
    name, *rest = words
    command = _find(name)
    parser = _Parser(prog=f"drivetrain {name}", description=_sentence(command.help), allow_abbrev=False)
    command.add_arguments(parser)
    return int(command.run(_parse(parser, rest)) or 0)


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Parse with options allowed between the key=value words, where argparse can."""
    if "--" in words:  # which its other way of parsing forgets
        return parser.parse_args(words)
    try:
        return parser.parse_intermixed_args(words)
    except AttributeError as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # which came before what its clean-up relies on (Python 3.11)
            raise error.__context__ from None
        raise
    except TypeError:  # its refusal for parsers with subcommands, before it looked at any word
        return _with_later_words(parser, words)


def _with_later_words(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Parse, with key=value words after options as well as before."""
    arguments, others = parser.parse_known_args(words)
    if others and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in others)):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if others:
        arguments.overrides += others
    return arguments


def _find(name: str) -> Command:
    """The command called `name`; imports its distribution and no other.

    Our own are known without metadata, so they run with DRIVETRAIN_PLUGINS=off. When another distribution claims the name of
    one of ours, `find` says so instead of choosing.
    """
    if name in OWN and all(c.distribution == DISTRIBUTION for c in candidates("command").get(name, [])):
        return OWN[name]()
    if ":" not in name and name not in candidates("command"):
        raise DrivetrainError(_unknown(name))
    candidate = find("command", name)
    loaded = candidate.load()
    command = loaded() if isinstance(loaded, type) else loaded
    if missing := [part for part in ("help", "add_arguments", "run") if not hasattr(command, part)]:
        raise PluginError(f"plugin {candidate} is no command: it has no {' and no '.join(missing)} (see drivetrain.commands).")
    return cast(Command, command)


def _unknown(name: str) -> str:
    if os.path.isfile(name):
        return f"no command named {name!r}. To train from that file: drivetrain train {name}"
    return f"no command named {name!r}.{suggest(name, {*OWN, *candidates('command')})} See drivetrain --help."


def _top_parser() -> argparse.ArgumentParser:
    rows = [(f"  {name}", own.help) for name, own in OWN.items()]
    rows += [(f"  {clean(c.name)}", clean(f"from {c.distribution} {c.version}")) for c in _of_others()]
    about = "Train PyTorch models; every part of a run is a plugin."
    parser = _Parser(
        prog="drivetrain",
        usage="drivetrain COMMAND …",
        description="\n".join([about, "", "commands:", *columns(rows)]),
        epilog="drivetrain COMMAND --help says more about one command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"drivetrain {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks; may stand anywhere on the line")
    return parser


def _of_others() -> list[Candidate]:
    """The commands of other distributions, listed but not imported: a broken one cannot break `--help`."""
    installed = [c for group in candidates("command").values() for c in group]
    return [c for c in installed if c.distribution != DISTRIBUTION and c.name not in OWN]


class _Parser(argparse.ArgumentParser):
    def add_argument(self, *names: Any, **given: Any) -> argparse.Action:
        """As ever, but words of which there may be none are not called required, as argparse does of those without a default."""
        if given.get("nargs") == "*" and names and not names[0].startswith("-"):
            given.setdefault("default", [])
        return super().add_argument(*names, **given)

    def error(self, message: str) -> NoReturn:
        """Add the remedy for a habit from other trainers: `--optimizer.lr=1e-3`."""
        if "unrecognized arguments: --" in message and "=" in message:
            message += "\n(configuration values are written without dashes: optimizer.lr=1e-3)"
        self.print_usage(sys.stderr)
        self.exit(USER_ERROR, f"error: {clean_lines(message)}\n")


def _sentence(text: str) -> str:
    text = clean(text)
    return f"{text[:1].upper()}{text[1:]}."


def _reader_has_gone() -> int:
    """Standard output was closed by its reader (`| head`): end quietly, as the shell's own tools do (128 + SIGPIPE)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
    return 141
