"""One save, in a thread that gives way to the training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from attrs import define, field, frozen

from drivetrain_checkpoint.find import find_checkpoints
from drivetrain_checkpoint.format import Packed
from drivetrain_checkpoint.staging import Staged, give_way
from drivetrain_checkpoint.store import Store

if TYPE_CHECKING:
    from drivetrain_checkpoint.together import Together

T = TypeVar("T")


@frozen
class Saved:
    """What came of a save: its durable directory, and what went wrong afterwards without harm."""

    path: Path
    complaint: str = ""


@frozen
class Work:
    """One save and the rotation after it; with `together`, what this process does of a save by all."""

    store: Store
    step: int
    keep_last: int | None
    best_step: int | None
    together: Together | None = None

    def do(self, packed: Packed) -> Saved:
        """Write, then remove what has become too old."""
        path = self.store.save_packed(packed, self.step) if self.together is None else self.together.write(packed)
        if self.keep_last is None or (self.together is not None and self.together.rank):
            return Saved(path)
        best = [c.path for c in find_checkpoints(self.store.run_dir) if c.step == self.best_step][:1]
        return Saved(path, self.store.rotate_quietly(self.keep_last, keep={path, *best}))

    def do_staged(self, staged: Staged) -> Saved:
        """The same from copies that may still be on their way."""
        staged.wait()
        return self.do(staged.packed)


@define
class InFlight:
    """A save that has begun, as the training sees it. On ranks that write nothing it has neither copies nor a future."""

    step: int
    staged: Staged | None = None
    future: Future[Saved] = field(factory=Future)
    together: Together | None = None  # a save in which every rank writes

    @property
    def has_ended(self) -> bool:
        """Whether its outcome is known."""
        return self.future.done()

    def let_change(self) -> None:
        """Called before parameters or the optimizer's state change."""
        if self.staged is not None:
            self.staged.let_change()


def at_once(work: Callable[[], T]) -> Future[T]:
    """Do `work` now."""
    future: Future[T] = Future()
    _settle(future, work)
    return future


def in_background(work: Callable[[], T]) -> Future[T]:
    """Do `work` in a thread. Hashing and writing release the interpreter's lock, so the training runs beside them.

    The interpreter waits for the thread before it ends, so a save that has begun is completed.
    """
    future: Future[T] = Future()

    def run() -> None:
        give_way()
        _settle(future, work)

    threading.Thread(target=run, name="drivetrain-checkpoint", daemon=False).start()
    return future


def _settle(future: Future[T], work: Callable[[], T]) -> None:
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
        if not isinstance(error, Exception) and threading.current_thread() is threading.main_thread():
            raise  # Ctrl-C
    else:
        future.set_result(result)
