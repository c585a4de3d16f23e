"""The program `drivetrain` without the time to start: a server that has imported torch forks a process for each call.

The forked process runs `drivetrain_cli.main` with the words, the variables and the directory it is told, in a process group of its
own, and leaves as a program does, with the program's exit code. `python served.py` is the server; `Served` is the tests' end of it.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from attrs import define, field

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGXFSZ)


@define
class Ended:
    """What came of a call.

    Attributes:
        code: the exit code; negative for a signal.
        out: what it said on standard output.
        err: what it said on standard error.
        seconds: CPU time.
        memory: the most bytes that were resident at a time, those shared with the server included.
    """

    code: int
    out: str
    err: str
    seconds: float
    memory: int


@define
class Served:
    """Calls of the program in one directory, one at a time.

    Attributes:
        folder: where they run.
        variables: of their environment; SERVED_IMPORTS names modules that the server imports for all of them.
    """

    folder: Path
    variables: Mapping[str, str] = field(factory=dict)
    _server: Any = None
    _process: int = 0

    def __enter__(self) -> Served:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | self.variables,
        )
        assert self._server.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.kill()
        self._server.wait()

    def start(self, *words: str, largest_file: int = 0, memory: int = 0, **variables: str) -> int:
        """Begin a call; the process's id, which is its group's too.

        Args:
            largest_file: bytes that a file may have (RLIMIT_FSIZE); 0 for any number.
            memory: bytes of address space beyond what the server has (RLIMIT_AS); 0 for any number.
        """
        order = {"words": words, "folder": str(self.folder), "variables": variables, "largest": largest_file, "memory": memory}
        self._server.stdin.write(f"{json.dumps(order)}\n")
        self._server.stdin.flush()
        self._process = int(self._server.stdout.readline())
        return self._process

    def has_ended(self) -> bool:
        """Whether the call is over."""
        return bool(select.select([self._server.stdout], [], [], 0)[0])

    def wait(self, seconds: float = 300.0) -> Ended:
        """Wait for the end of the call; after so many seconds kill it and fail."""
        if not select.select([self._server.stdout], [], [], seconds)[0]:
            os.killpg(self._process, signal.SIGKILL)
            self._server.stdout.readline()
            raise AssertionError(f"hung for {seconds} s:\n{self._said('err')}")
        code, cpu, memory = self._server.stdout.readline().split()
        return Ended(int(code), self._said("out"), self._said("err"), float(cpu), int(memory))

    def call(self, *words: str, **more: Any) -> Ended:
        """A whole call."""
        self.start(*words, **more)
        return self.wait()

    def _said(self, what: str) -> str:
        return (self.folder / f"{what}.txt").read_text(errors="replace")


def _child(order: Mapping[str, Any], main: Callable[[Sequence[str]], int]) -> None:
    """Become the program."""
    os.setpgid(0, 0)
    for number in HANDLED:
        signal.signal(number, signal.SIG_IGN if number == signal.SIGXFSZ else signal.SIG_DFL)
    os.chdir(order["folder"])
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(order["variables"])
    tempfile.tempdir = None
    if order["largest"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest"],) * 2)
    if order["memory"]:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + order["memory"],) * 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as from the interpreter's start on, which takes longer than this
    _leave(main(order["words"]))


def _leave(code: int) -> NoReturn:
    """End as the interpreter does, but for taking its memory apart, which costs more than most calls: threads, handlers, buffers."""
    for finish in (threading._shutdown, atexit._run_exitfuncs):  # type: ignore[attr-defined]  # first waits for a save in the background
        with suppress(KeyboardInterrupt):  # which the interpreter only mentions then
            finish()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _remember_metadata() -> None:
    """Read the metadata of what is installed once for all calls: it takes a third of a short one's time."""
    from drivetrain import registry

    read, known = registry._candidate, {}

    def remembered(kind: str, entry: Any) -> Any:
        if id(entry) not in known:
            known[id(entry)] = entry, read(kind, entry)
        return known[id(entry)][1]

    registry._candidate = remembered
    for group in registry._entry_points(registry._path_state()).groups:
        if group.startswith("drivetrain."):
            registry.candidates(group.removeprefix("drivetrain."))


def _serve() -> None:
    import torch

    import drivetrain_cli.session  # noqa: F401
    from drivetrain import CheckpointCallback  # noqa: F401
    from drivetrain_cli import main

    _remember_metadata()
    for module in filter(None, os.environ.get("SERVED_IMPORTS", "").split(",")):
        import_module(module)

    warm = torch.nn.Parameter(torch.zeros(1))
    warm.grad = torch.zeros(1)
    torch.optim.AdamW([warm]).step()  # imports what every call would import anew
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # also for a call that has been forked and has not begun
    print("ready", flush=True)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            try:
                _child(json.loads(line), main)
            except SystemExit as end:  # how argparse leaves
                _leave(end.code if isinstance(end.code, int) else 1)
            except BaseException:
                traceback.print_exc()
                _leave(1)
        with suppress(OSError):  # it may have done so itself
            os.setpgid(process, process)
        print(process, flush=True)
        _, status, used = os.wait4(process, 0)
        print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, flush=True)


if __name__ == "__main__":
    _serve()
