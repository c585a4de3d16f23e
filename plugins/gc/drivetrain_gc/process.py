"""Settings of the whole process: made by the first run that asks, unmade when the last of them ends."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

# mallopt(3): two parameters, and the values that glibc's own adapting ends at (DEFAULT_MMAP_THRESHOLD_MAX, and twice that)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_ADAPTED_MMAP, _ADAPTED_TRIM = 32 << 20, 64 << 20
_LARGEST, _NEVER = (1 << 31) - 1, -1
_BLOCK = 1 << 30  # of address space at a time; below `_LARGEST`, so that it belongs to the heap
_HUGE = 2 << 20  # bytes of a huge page; with another size there is only some of the heap's end left out


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
    """glibc hands no freed memory back to the system, and the heap may lie in huge pages, whose addresses the processor finds faster.

    A process that has once set its thresholds adapts them no more: in the end it gets those that adapting ends at.
    """

    def _make(self) -> None:
        self._libc = _glibc()
        if self._libc is not None:
            if not self._libc.mallopt(_MMAP_THRESHOLD, _LARGEST):  # older ones take no more than they adapt to
                self._libc.mallopt(_MMAP_THRESHOLD, _ADAPTED_MMAP)
            self._libc.mallopt(_TRIM_THRESHOLD, _NEVER)
            self._huge = _huge_pages_are_on_request() and _addresses_are_free()
            if self._huge:
                _grow_heap(self._libc)
                _advise_heap(self._libc, mmap.MADV_HUGEPAGE)

    def _unmake(self) -> None:
        if self._libc is not None:
            if self._huge:
                _advise_heap(self._libc, mmap.MADV_NOHUGEPAGE)
            self._libc.mallopt(_MMAP_THRESHOLD, _ADAPTED_MMAP)
            self._libc.mallopt(_TRIM_THRESHOLD, _ADAPTED_TRIM)
            self._libc.malloc_trim(0)


def _huge_pages_are_on_request() -> bool:
    """Whether Linux gives huge pages to those who ask (madvise(2)), and not to all or none."""
    try:
        return "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
    except OSError:
        return False


def _grow_heap(libc: ctypes.CDLL) -> None:
    """Give the heap addresses for a quarter of the machine's memory: what is not there yet cannot be asked for in huge pages.

    No memory is taken until something is written there.
    """
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for block in [libc.malloc(_BLOCK) for _ in range(max(1, memory // 4 // _BLOCK))]:
        libc.free(block)  # which takes NULL, where there was no more, for nothing


def _advise_heap(libc: ctypes.CDLL, advice: int) -> None:
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for begin, end in _heaps():
        begin = -(-begin // _HUGE) * _HUGE
        libc.madvise(begin, max(0, end - begin) // _HUGE * _HUGE, advice)


def _addresses_are_free() -> bool:
    """Whether addresses are given without memory to back them: nobody limits them (setrlimit(2)), and Linux does not count them."""
    import resource  # Unix only

    try:
        counted = Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip() == "2"
    except OSError:
        counted = True
    return not counted and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def _heaps() -> Iterator[tuple[int, int]]:
    """First address of each part of the process's heap, and that after the last one."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            for begin, end in re.findall(r"^(\w+)-(\w+) .*\[heap\]$", maps.read(), re.MULTILINE):
                yield int(begin, 16), int(end, 16)
    except OSError:
        return


def _glibc() -> ctypes.CDLL | None:
    """The C library, unless it is another one or the environment sets its allocator up."""
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if os.name != "posix" or chosen:
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


COLLECTOR_OFF, MEMORY_KEPT = CollectorOff(), MemoryKept()
