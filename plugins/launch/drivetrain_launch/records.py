"""What the launched processes leave for their launcher: that they live, and with which code they ended."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path


class Records:
    """A folder with a file for each process of each attempt. torchrun's agent knows only success and failure."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, env: Mapping[str, str]) -> None:
        """This process has begun."""
        self._file(env, "pid").write_text(str(os.getpid()))

    def end(self, env: Mapping[str, str], code: int) -> None:
        """This process ends with a code."""
        self._file(env, "code").write_text(str(code))

    def codes(self) -> set[int]:
        """The exit codes of all attempts so far."""
        return {int(text) for path in self.folder.glob("*.code") if (text := path.read_text())}

    def newest(self) -> dict[int, int]:
        """The exit codes of the newest attempt by rank; those that were killed have none."""
        last = max((path.name.partition("-")[0] for path in self.folder.glob("*.pid")), key=int, default="0")
        return {int(path.stem.partition("-")[2]): int(path.read_text()) for path in self.folder.glob(f"{last}-*.code")}

    def alive(self) -> list[int]:
        """The processes that still run."""
        pids = [int(path.read_text() or 0) for path in self.folder.glob("*.pid")]
        return [pid for pid in pids if pid and _exists(pid)]

    def _file(self, env: Mapping[str, str], suffix: str) -> Path:
        return self.folder / f"{env.get('TORCHELASTIC_RESTART_COUNT', '0')}-{env['RANK']}.{suffix}"


def _exists(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # a child that has ended exists until somebody has asked
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
