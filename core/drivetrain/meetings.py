"""All ranks come together after the same step when one of them wants to, without a collective and at no cost on other steps.

A rank calls the others over the store in which the processes met. A thread of each answers with the step that its rank is in, beyond
which that rank then does not go before all have answered; they meet after the highest of these steps. A rank that calls stays where it is,
so that one which wants the same after the same step meets the other there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

_NEVER = 1 << 62
_OPEN = 0.002  # seconds between looks at a meeting that has been called


class Meetings:
    """The meetings of one sitting.

    Args:
        store: where the processes talk, under names that nobody else has.
        rank: of this process.
        world_size: how many there are.
        hopeless: whether some process cannot answer any more.
        patience: seconds to wait for answers.
    """

    def __init__(self, store: Any, rank: int, world_size: int, hopeless: Callable[[], bool], patience: float) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._hopeless, self._patience = hopeless, patience
        self._number = 0  # of the next meeting
        self._steps = 0  # that this rank has done
        self._promised: int | None = None  # the step beyond which it does not go before it knows `_at`
        self._at = _NEVER  # the step after which all meet
        self._closed = False
        self._lock, self._wake, self._decided = threading.Lock(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._listen, name="drivetrain-meetings", daemon=True)
        self._thread.start()

    def after_step(self, wanted: bool) -> bool:
        """Whether all meet now; called after each step of this rank."""
        with self._lock:
            self._steps += 1
            if wanted and self._promised is None and not self._closed:
                self._promise(self._steps, call=True)
            promised = self._promised
        if promised is None or self._steps < promised or not self._know() or self._steps < self._at:
            return False
        with self._lock:
            self._number, self._promised, self._at = self._number + 1, None, _NEVER
            self._decided.clear()
        return True

    def leave(self) -> None:
        """The sitting is over on this rank: whoever calls now is not to wait for it."""
        with self._lock:
            self._closed = True
            if self._promised is None:
                self._promise(_NEVER)
        self._wake.set()
        self._thread.join(5.0)

    def _promise(self, step: int, call: bool = False) -> None:
        self._promised = step
        try:
            self._store.set(f"{self._number}/{self._rank}", str(step))
            if call:
                self._store.set(f"{self._number}/call", "")
            if self._closed and self._rank == 0:  # nobody else decides
                self._store.compare_set(f"{self._number}/at", "", str(_NEVER))
        except RuntimeError:  # the store is gone with rank 0: the next collective will say so
            self._closed = True
        self._wake.set()

    def _know(self) -> bool:
        """Wait until it is known where all meet; False when it cannot be, which the next collective will say better."""
        end = time.monotonic() + self._patience
        while not self._decided.wait(0.2):
            if self._closed or self._hopeless() or time.monotonic() > end:
                self._closed = True
                return False
        return True

    def _listen(self) -> None:
        pause = max(0.05, self._world_size / 5000)  # not more than 5000 questions in a second for the store
        while not self._closed:
            self._wake.wait(_OPEN if self._promised is not None and not self._decided.is_set() else pause)
            self._wake.clear()
            try:
                self._look()
            except RuntimeError:
                self._closed = True

    def _look(self) -> None:
        if self._promised is None:
            if not self._store.check([f"{self._number}/call"]):
                return
            with self._lock:
                if self._promised is None:
                    self._promise(self._steps + 1)
        if self._decided.is_set():
            return
        answers = [f"{self._number}/{rank}" for rank in range(self._world_size)]
        if self._rank == 0 and self._store.check(answers):
            last = max(int(self._store.get(key)) for key in answers)
            self._store.compare_set(f"{self._number}/at", "", str(last))
        if self._store.check([f"{self._number}/at"]):
            self._at = int(self._store.get(f"{self._number}/at"))
            self._decided.set()
