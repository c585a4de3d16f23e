"""Keeping a bar and what others print to the same terminal apart."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

STREAMS = ("stdout", "stderr")


class BesideBar:
    """A standard stream of a terminal that a bar is drawn to: what is printed gets lines of its own.

    Without it the text of a `print` or a warning begins at the end of the bar. `clear` takes the bar away before text is
    written; it comes back when it is next drawn, below. Everything else is the stream's own.
    """

    def __init__(self, stream: TextIO, clear: Callable[[], None]) -> None:
        self.stream, self._clear = stream, clear
        self.mid_line = False  # text without a newline stands where the bar would be drawn

    def write(self, text: str) -> int:
        """Write, on a clear line."""
        if text:
            with suppress(OSError, ValueError):  # the bar's trouble is not the printer's
                self._clear()
            self.mid_line = not text.endswith("\n")
        return self.stream.write(text)

    def writelines(self, lines: Any) -> None:
        """Write several."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def raw(stream: Any) -> Any:
    """The stream itself, if another run's bar has taken its place."""
    return stream.stream if isinstance(stream, BesideBar) else stream


def install(clear: Callable[[], None]) -> list[BesideBar]:
    """Put `BesideBar` in place of the standard streams that are terminals, as long as no other run has."""
    made = []
    for name in STREAMS:
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, BesideBar) and stream.isatty():
            made.append(BesideBar(stream, clear))
            setattr(sys, name, made[-1])
    return made


def remove(installed: list[BesideBar]) -> None:
    """Put the streams back, unless somebody has replaced them since."""
    for name in STREAMS:
        if (current := getattr(sys, name)) in installed:
            setattr(sys, name, current.stream)
