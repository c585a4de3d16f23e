"""Ctrl-C, SIGTERM and SIGUSR1 while training: the first asks the run to stop after its step, a second one ends the process at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_STANDARD_ERROR = 2
_REASONS = {signal.SIGINT: "interrupted by Ctrl-C", signal.SIGTERM: "interrupted by SIGTERM"}
if hasattr(signal, "SIGUSR1"):
    _REASONS[signal.SIGUSR1] = "interrupted by SIGUSR1"  # a cluster's word that the job's time is nearly over


class Interruptible:
    """Within the `with` block the signals call `stop(reason)`; afterwards the handlers are those from before.

    Attributes:
        reason: what the signal was, None while there was none.
    """

    def __init__(self, stop: Callable[[str], None], speaks: bool = True) -> None:
        self.reason: str | None = None
        self._stop, self._speaks = stop, speaks
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruptible:
        for number in _REASONS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # a shell script's background job ignores Ctrl-C on purpose
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            _in_forked_worker(number)
        elif self.reason is not None:
            self._say("ended at once")
            os._exit(128 + number)
        else:
            self.reason = _REASONS[signal.Signals(number)]
            self._say(f"{self.reason}: stopping after this step (once more to end at once)")
            self._stop(self.reason)

    def _say(self, text: str) -> None:
        """Write past Python's buffers: the signal may have arrived in the middle of a write to them."""
        if self._speaks:
            os.write(_STANDARD_ERROR, f"\n{text}\n".encode())


def _in_forked_worker(number: int) -> None:
    """Data workers inherit the handler, and the terminal sends Ctrl-C to them too.

    They live on, because the step in progress still needs their batches; the training process ends them. SIGTERM ends them
    as ever.
    """
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
