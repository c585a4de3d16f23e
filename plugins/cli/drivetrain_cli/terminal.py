"""Text for a terminal: free of control characters, bold only where a person looks, in columns."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

# Escape sequences with what belongs to them (a colour, a window title), so that no "[2J" is left behind ...
_SEQUENCE = re.compile(r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[ -/]*[0-~]")
# ... and single characters that move the cursor, start a line, or turn the direction of writing (CWE-150).
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def clean(text: object) -> str:
    """`text` on one line, without anything a terminal would obey: configurations, plugin names and errors are foreign text."""
    return clean_lines(text).replace("\n", " ")


def clean_lines(text: object) -> str:
    """Like `clean`, for text that may have several lines."""
    plain = _SEQUENCE.sub("", str(text)).replace("\r\n", "\n").replace("\t", " ")
    return _CONTROL.sub("", plain)


def shown_path(path: Path) -> str:
    """A path as it can be pasted into a shell, from the current directory where it lies below that."""
    absolute, here = path.absolute(), Path.cwd()
    return clean(shlex.quote(str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)))


def bold(text: str, stream: TextIO) -> str:
    """`text` in bold when `stream` is a terminal and NO_COLOR (no-color.org) is not set."""
    return f"\x1b[1m{text}\x1b[0m" if _is_styled(stream) else text


def faint(text: str, stream: TextIO) -> str:
    """`text` less bright, under the same conditions as `bold`."""
    return f"\x1b[2m{text}\x1b[0m" if _is_styled(stream) else text


def _is_styled(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def wrapped(line: str, stream: TextIO) -> str:
    """A line that is longer than a terminal is wide broken between words, its last part ("… · plugins: …") apart and faint.

    Elsewhere, where it may be searched for, it is left as it is.
    """
    width = shutil.get_terminal_size((100, 24)).columns - 1
    if not stream.isatty() or len(_SEQUENCE.sub("", line)) <= width:
        return line
    first, _, last = line.rpartition(" · ")
    lines = textwrap.wrap(last, width, initial_indent="  " * bool(first), subsequent_indent="  ", **_WORDS)
    return "\n".join([*textwrap.wrap(first, width, subsequent_indent="  ", **_WORDS), *(faint(part, stream) for part in lines)])


def columns(rows: Sequence[Sequence[str]], wrap_last: bool = False) -> list[str]:
    """Rows as lines with aligned columns; with `wrap_last` the last cell is kept within the terminal's width."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    indent = sum(widths) + 2 * len(widths)
    room = max(24, shutil.get_terminal_size((100, 24)).columns - indent - 1)
    lines = []
    for *cells, last in rows:
        start = "".join(f"{cell:<{width}}  " for cell, width in zip(cells, widths, strict=True))
        first, *rest = (textwrap.wrap(last, room) if wrap_last else [last]) or [""]
        lines += [f"{start}{first}".rstrip(), *(" " * indent + line for line in rest)]
    return lines
