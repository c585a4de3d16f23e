"""One process per run directory.

The lock is the operating system's (`lockf`), so it ends with the process, however that ends: a file left by a killed one is
no obstacle. `lockf` and not `flock`, which forked loader workers would inherit and hold on to. It knows processes only, so
two runs within one process are told apart here.
"""

from __future__ import annotations

import errno
import os
import socket
import warnings
from contextlib import suppress
from pathlib import Path

from attrs import define, field

from drivetrain_checkpoint.errors import CheckpointError, CheckpointFailure

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".drivetrain-lock"
_TAKEN = {errno.EACCES, errno.EAGAIN}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}
_held: set[tuple[int, str]] = set()  # (process, file); by process, because a forked one holds nothing


@define
class RunLock:
    """The lock of one run directory: `acquire`, then `release`."""

    run_dir: Path
    _descriptor: int | None = field(default=None, init=False)

    @property
    def path(self) -> Path:
        """The lock's file."""
        return self.run_dir / LOCK_FILE

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            CheckpointError: naming the host and process that hold it, or why it cannot be taken.
        """
        if self._key() in _held:
            raise CheckpointError(self._refusal(f"another run in this process (pid {os.getpid()})"))
        try:
            while self._descriptor is None:
                self._descriptor = self._attempt()
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
        except OSError as error:
            self._close()
            raise CheckpointFailure(f"{self.path}: the run cannot be locked: {error.strerror or error}") from error
        _held.add(self._key())

    def release(self) -> None:
        """Give the lock back, if it is held, and remove its file."""
        if self._descriptor is None:
            return
        with suppress(OSError):
            if _same(self._descriptor, self.path):
                os.unlink(self.path)  # before the lock is given up: whoever waits at this file sees that it has gone
        _held.discard(self._key())
        self._close()

    def _attempt(self) -> int | None:
        """The locked file's descriptor; None when another process removed the file meanwhile."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if not _lock(descriptor):
                raise CheckpointError(self._refusal(_owner(descriptor) or "another process"))
            if fcntl is None or _same(descriptor, self.path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def _refusal(self, owner: str) -> str:
        return (
            f"{self.run_dir} is in use by {owner}: two processes would write over each other. "
            "Wait for it to end or end it, or give another run_name."
        )

    def _key(self) -> tuple[int, str]:
        return os.getpid(), os.path.realpath(self.path)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None


def _lock(descriptor: int) -> bool:
    """Lock a file, or find that another process has. Without locks, what the file says has to do."""
    if fcntl is not None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            if error.errno not in _NO_LOCKS:
                raise
    host, pid = _written(descriptor)
    if host == socket.gethostname():
        return not _is_alive(pid)
    if host:
        warnings.warn(
            f"the file system has no locks, and process {pid} on {host} has used this run before: make sure that it has ended",
            stacklevel=4,
        )
    return True


def _written(descriptor: int) -> tuple[str, int]:
    """Host and process in the file; ("", 0) when it names none."""
    host, _, pid = os.pread(descriptor, 1000, 0).decode("ascii", "replace").strip().partition(" ")
    return (host, int(pid)) if pid.isdecimal() and len(pid) < 10 and host.isprintable() else ("", 0)


def _owner(descriptor: int) -> str:
    host, pid = _written(descriptor)
    return f"process {pid} on {host}" if host else ""


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def _same(descriptor: int, path: Path) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
