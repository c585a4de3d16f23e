"""The seam: every change to the disk goes through one `Files`, so that tests can record, fail and reorder them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

# Directories that cannot be synced: not opened for reading, or on file systems that do without.
_NO_DIRECTORY_SYNC = {errno.EACCES, errno.EINVAL, errno.ENOTSUP}


class Files:
    """The operations of a checkpoint on a POSIX file system. Each raises `OSError`; none follows a symbolic link at its end."""

    def mkdir(self, path: Path) -> None:
        """Make one directory, which must not exist."""
        path.mkdir()

    def write(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a new file. It is not durable before `fsync`, and neither is its name before `fsync_dir`."""
        with open(path, "xb") as file:
            for chunk in chunks:
                file.write(chunk)

    def fsync(self, path: Path) -> None:
        """Make a file's content durable."""
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def fsync_dir(self, path: Path) -> None:
        """Make the names in a directory durable, where the file system can."""
        if os.name == "nt":
            return
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            if error.errno in _NO_DIRECTORY_SYNC:
                return
            raise
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_DIRECTORY_SYNC:
                raise
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give a directory another name on the same file system, at once or not at all."""
        os.rename(source, target)

    def remove(self, path: Path) -> None:
        """Remove a file, or a symbolic link itself."""
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        """Remove an empty directory."""
        os.rmdir(path)
