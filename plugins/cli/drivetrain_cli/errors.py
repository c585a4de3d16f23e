"""What a person sees when something goes wrong: a few lines on standard error; the traceback only with `--debug`."""

from __future__ import annotations

import platform
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from drivetrain.cluster import Cluster, detect
from drivetrain.errors import ConfigError, DrivetrainError, PeerFailure, RunError
from drivetrain_cli.terminal import bold, clean, clean_lines

FAILED, USER_ERROR = 1, 2
_LONGEST = 8  # lines of one message: torch can write pages
_LONGEST_WARNING = 40  # every change of a run that goes on is listed
_PATIENCE = 1.0  # seconds
_USERS_FILES = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def exit_code(error: Exception) -> int:
    """2 for a mistake in what was asked for (a `DrivetrainError`, a file that cannot be read), 1 for a failure inside a run
    (a `RunError` among the former)."""
    return USER_ERROR if _is_mistake(error) else FAILED


def explain(error: Exception, debug: bool) -> None:
    """Print `error` to standard error, unless another process of the run says the same."""
    if (said := getattr(error, "drivetrain_said", None)) or (said is None and _may_be_said_elsewhere(error)):
        time.sleep(_PATIENCE)  # a launcher ends all processes when the first one ends: let the other speak
        if said:
            return
    if debug:
        print(clean_lines("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        return
    lines = list(_lines(error))
    if not _is_mistake(error) and not isinstance(error, RunError):
        lines.append("  run again with --debug for the traceback")
    print("\n".join(lines), file=sys.stderr)


@contextmanager
def warnings_as_lines(debug: bool) -> Iterator[None]:
    """Within the block, print each warning once and without a place in the sources, which `debug` adds; filters stay as they are."""
    said = set()

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
        if (text := str(message)) in said:
            return
        said.add(text)
        lines = list(_message(text, bold("warning:", sys.stderr), _LONGEST_WARNING))
        print("\n".join([*lines, *([f"  {clean(filename)}:{lineno}: {category.__name__}"] if debug else [])]), file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _may_be_said_elsewhere(error: Exception) -> bool:
    """Before the processes have met nobody knows what rank 0 met. When the launcher lets this process live, it is alone with it."""
    return _is_mistake(error) and _place().local_rank > 0


def _place() -> Cluster:
    try:
        return detect()
    except ConfigError:
        return Cluster("none")


def _is_mistake(error: Exception) -> bool:
    return (isinstance(error, DrivetrainError) and not isinstance(error, RunError)) or (
        isinstance(error, _USERS_FILES) and error.filename is not None
    )


def _lines(error: BaseException) -> Iterator[str]:
    if isinstance(error, ConfigError):
        yield from _config_error(error)
    elif isinstance(error, _USERS_FILES) and error.filename is not None:
        yield f"{_head()} {clean(error.filename)}: {clean(error.strerror)}"
    elif isinstance(error, DrivetrainError):
        yield from _message(str(error))
    elif isinstance(error, PeerFailure):
        yield f"{bold('error:', sys.stderr)} {clean(error)}"
    elif isinstance(error, BaseExceptionGroup):
        yield f"{_head()} {clean(error)}"
        for inner in error.exceptions:
            yield from (f"  {line}" for line in _lines(inner))
    else:
        yield from _message(f"{type(error).__name__}: {error}")
    for note in getattr(error, "__notes__", ()):
        yield from (f"  {line}" for line in clean_lines(note).splitlines())


def _config_error(error: ConfigError) -> Iterator[str]:
    """The source and each problem on a line of its own; a value with a line break in it cannot pretend to be a line."""
    count = len(error.problems)
    if _place().rank:  # what only this process has met; its first line says all
        yield f"{_head()} {clean(error.source)}: {clean(error.problems[0])}"
    else:
        yield bold(clean(f"{error.source}: {count} problem{'s' if count != 1 else ''}"), sys.stderr)
    for problem in error.problems[1 if _place().rank else 0 :]:
        yield f"  {clean(problem)}"


def _message(text: str, head: str = "", longest: int = _LONGEST) -> Iterator[str]:
    first, *lines = clean_lines(text).strip().split("\n")
    yield f"{head or _head()} {first}"
    yield from (f"  {line}" for line in lines[:longest])
    if len(lines) > longest:
        yield f"  … and {len(lines) - longest} more lines"


def _head() -> str:
    place = _place()
    return bold("error:" if place.world_size == 1 else f"{_rank(place)} failed:", sys.stderr)


def _rank(place: Cluster) -> str:
    return f"rank {place.rank} on {platform.node()}"
