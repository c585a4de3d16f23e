"""Settings of the whole process: made by the first run that asks, unmade when the last of them ends."""

from __future__ import annotations

import ctypes
import gc
import os
import threading

# mallopt(3): two parameters, and the values that glibc's own adapting ends at (DEFAULT_MMAP_THRESHOLD_MAX, and twice that)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_ADAPTED_MMAP, _ADAPTED_TRIM = 32 << 20, 64 << 20
_LARGEST, _NEVER = (1 << 31) - 1, -1


class WhileAnyRuns:
    """Counts the runs that want a setting, which subclasses make and unmake."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs = 0

    def begin(self) -> None:
        """A run asks for it."""
        with self._lock:
            self._runs += 1
            if self._runs == 1:
                self._make()

    def end(self) -> None:
        """A run that asked for it is over."""
        with self._lock:
            self._runs -= 1
            if self._runs == 0:
                self._unmake()

    def _make(self) -> None:
        raise NotImplementedError

    def _unmake(self) -> None:
        raise NotImplementedError


class CollectorOff(WhileAnyRuns):
    """Python's collector does not come up by itself, and leaves out what there was before."""

    def _make(self) -> None:
        self._was_on, self._froze = gc.isenabled(), gc.get_freeze_count() == 0
        gc.collect()
        gc.disable()
        if self._froze:  # otherwise the program has set aside what it wants to
            gc.freeze()

    def _unmake(self) -> None:
        if self._froze:
            gc.unfreeze()
        if self._was_on:
            gc.enable()


class MemoryKept(WhileAnyRuns):
    """glibc hands no freed memory back to the system.

    A process that has once set its thresholds adapts them no more: in the end it gets those that adapting ends at.
    """

    def _make(self) -> None:
        self._libc = _glibc()
        if self._libc is not None:
            if not self._libc.mallopt(_MMAP_THRESHOLD, _LARGEST):  # older ones take no more than they adapt to
                self._libc.mallopt(_MMAP_THRESHOLD, _ADAPTED_MMAP)
            self._libc.mallopt(_TRIM_THRESHOLD, _NEVER)

    def _unmake(self) -> None:
        if self._libc is not None:
            self._libc.mallopt(_MMAP_THRESHOLD, _ADAPTED_MMAP)
            self._libc.mallopt(_TRIM_THRESHOLD, _ADAPTED_TRIM)
            self._libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library, unless it is another one or the environment sets its allocator up."""
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if os.name != "posix" or chosen:
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


COLLECTOR_OFF, MEMORY_KEPT = CollectorOff(), MemoryKept()
