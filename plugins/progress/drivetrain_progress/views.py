"""Two ways to show a run: a bar that stays on its line, and plain lines."""

from __future__ import annotations

import os
import re
import sys
import warnings
from threading import RLock
from typing import Any, Protocol, TextIO

from drivetrain_progress import terminal, text

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a notebook without ipywidgets gets the text bar, which needs no warning
    from tqdm.auto import tqdm

PACE = 0.2  # seconds between two drawings, each of which costs about 0.2 ms
NARROWEST = 10  # columns of the bar; values make room for it
WIDE = "─╾━"  # nothing, half a column, a column
PLAIN = "-="


class View(Protocol):
    """How a run is shown."""

    live: bool  # whether drawing again replaces what was drawn
    pace: float  # least seconds between two drawings
    patience: float  # seconds of an evaluation before it is shown

    def draw(self, left: str, fraction: float | None, values: list[str], last: str) -> None:
        """Show the position as text and as a fraction (None when there is no end), values, and the time."""

    def evaluating(self, step: int, batches: int, total: int | None) -> None:
        """Show that so many batches have been evaluated; `total` is None when it is not known."""

    def say(self, line: str) -> None:
        """Write a line that stays."""

    def close(self) -> None:
        """Leave the stream in order."""


class _Tqdm(tqdm):  # type: ignore[type-arg]  # generic for type checkers only
    """tqdm without its two side effects on the process: a watching thread, and a multiprocessing lock."""

    monitor_interval = 0


class _Coloured(_Tqdm):
    """What is done in cyan, what is left faint; tqdm's own colour takes both alike. Its widths do not count the sequences."""

    def __str__(self) -> str:
        done = re.sub("[━╾]+", "\x1b[36m\\g<0>\x1b[0m", super().__str__())
        return re.sub("─+", "\x1b[2m\\g<0>\x1b[0m", done)


_Tqdm.set_lock(RLock())
NOTEBOOK = any(cls.__module__ == "tqdm.notebook" for cls in _Tqdm.__mro__)


def view_of(seconds: float) -> View | None:
    """The view that suits the standard error stream, None if there is none; in a notebook, the output below the cell."""
    if NOTEBOOK:
        return BarView(sys.stdout)
    stream = terminal.raw(sys.stderr)
    if stream is None:  # a process that was started without one
        return None
    moves = stream.isatty() and os.environ.get("TERM") != "dumb"
    return BarView(stream) if moves else LinesView(stream, seconds)


class BarView:
    """One line that is drawn over and over, through tqdm."""

    live, pace, patience = True, PACE, 0.5  # an evaluation that is over sooner would only flicker

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._encoding = getattr(stream, "encoding", None) or "ascii"
        self._marks = WIDE if _shows(self._encoding, WIDE) else PLAIN
        self._coloured = not NOTEBOOK and os.name == "posix" and not os.environ.get("NO_COLOR")  # no-color.org
        self._bar: Any = None
        self._inner: Any = None
        self._visible = False
        self._printed = [] if NOTEBOOK else terminal.install(self._clear)

    def draw(self, left: str, fraction: float | None, values: list[str], last: str) -> None:
        """Draw the line anew."""
        width = self._width()
        percent = f"{int(100 * fraction):3}%" if fraction is not None else ""  # rounded down: 100 % means done
        line = _fitted(left, percent, values, last, (width or 120) - (NARROWEST + 1 if percent else 0))
        self._bar = self._drawn(self._bar, line, fraction, width, leave=True)

    def evaluating(self, step: int, batches: int, total: int | None) -> None:
        """Draw a second line, below."""
        line = f"evaluating  {batches} batches" if total is None else f"evaluating {{bar}} {batches}/{total} batches"
        self._inner = self._drawn(self._inner, line, batches / total if total else None, self._width(), leave=False)

    def say(self, line: str) -> None:
        """Write a line above the bar."""
        self._close_inner()
        self._finish_line()
        _Tqdm.write(text.clean(line, self._encoding), file=self._stream, nolock=True)

    def close(self) -> None:
        """Leave the bar as it is and go to the next line."""
        terminal.remove(self._printed)
        self._close_inner()
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def _close_inner(self) -> None:
        if self._inner is not None:
            self._inner.close()
        self._inner = None

    def _drawn(self, bar: Any, line: str, fraction: float | None, width: int | None, leave: bool) -> Any:
        """The tqdm bar, made on first use, showing `line`, in which `{bar}` stands for the bar itself."""
        self._finish_line()
        self._visible = True
        total = None if fraction is None else 1.0
        if bar is None:
            given: dict[str, Any] = {"ascii": self._marks, "file": self._stream, "leave": leave}
            kind = _Coloured if self._coloured else _Tqdm
            return kind(total=total, initial=fraction or 0, ncols=width, bar_format=line, **given)
        bar.n, bar.ncols, bar.bar_format = fraction or 0, width, line
        bar.refresh(nolock=True)  # tqdm would keep its lock for ever when the stream fails
        return bar

    def _clear(self) -> None:
        """Take the bars away, for somebody who is about to print."""
        if self._visible:
            self._visible = False
            for bar in (self._inner, self._bar):
                if bar is not None:
                    bar.clear(nolock=True)

    def _finish_line(self) -> None:
        """Do not draw over a text that was printed without a newline."""
        for printed in self._printed:
            if printed.mid_line:
                self._stream.write("\n")
                printed.mid_line = False

    def _width(self) -> int | None:
        """Columns to use, without the last one: a full line makes some terminals wrap. None lets a notebook choose."""
        if NOTEBOOK:
            return None
        try:
            return (os.get_terminal_size(self._stream.fileno()).columns or 80) - 1
        except (OSError, ValueError, AttributeError):
            return 79


class LinesView:
    """A line now and then, for files and batch jobs."""

    def __init__(self, stream: TextIO, seconds: float) -> None:
        self._stream = stream
        self._encoding = getattr(stream, "encoding", None) or "ascii"
        self.live = False
        self.pace = self.patience = seconds

    def draw(self, left: str, fraction: float | None, values: list[str], last: str) -> None:
        """Write where the run is."""
        percent = [f"{int(100 * fraction)}%"] if fraction is not None else []
        self.say("  ".join([left, *percent, *values, *([last] if last else [])]))

    def evaluating(self, step: int, batches: int, total: int | None) -> None:
        """Write how far a long evaluation is."""
        self.say(f"step {step}  evaluating  {batches}{f'/{total}' if total else ''} batches")

    def say(self, line: str) -> None:
        """Write a line."""
        self._stream.write(text.clean(line, self._encoding) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing is left open."""


def _fitted(left: str, percent: str, values: list[str], last: str, width: int) -> str:
    """The line as a tqdm format with as many values as fit beside a bar; the least important go first, the time last."""
    for kept in (*(values[:n] for n in range(len(values), -1, -1)), None):
        right = "  ".join([percent, *(kept or []), *([last] if last and kept is not None else [])])
        if len(left) + 1 + len(right) <= width:
            break
    return f"{left} {{bar}} {right}" if percent else f"{left}{right}"


def _shows(encoding: str, characters: str) -> bool:
    try:
        characters.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
