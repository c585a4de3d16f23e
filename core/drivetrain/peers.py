"""The other processes of a run: which they are, what has become of them, and whose failure ends this one."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from attrs import frozen

from drivetrain.errors import PeerFailure

_PATIENCE = 3.0  # seconds in which the culprit may say what has happened, or its process may end
_STORE_TIMEOUT = timedelta(seconds=5)
_LONGEST = 1000
_rounds = itertools.count()  # every process of a run makes its parts in the same order, so this number is the same on all
_STATES = {"T": "stopped", "t": "stopped", "Z": "gone", "X": "gone"}


@frozen
class Peer:
    """One process of a run.

    Attributes:
        rank: its number.
        host: the name of its machine.
        pid: its number there.
        device: what tells its device from the others of the machine; empty for the CPU.
    """

    rank: int
    host: str
    pid: int
    device: str = ""

    @classmethod
    def here(cls, rank: int, device: str = "") -> Peer:
        """This process."""
        return cls(rank, platform.node(), os.getpid(), device)

    @property
    def state(self) -> str:
        """ "running", "stopped" or "gone"; "unknown" for processes on other machines."""
        if self.host != platform.node() or not Path("/proc/self/stat").exists():
            return "unknown"
        try:
            return _STATES.get(thread_state(Path(f"/proc/{self.pid}/stat")), "running")
        except OSError:
            return "gone"

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def thread_state(stat: Path) -> str:
    """The letter of a process's or thread's state, proc(5): "R" for one that runs or could, "S" for one that sleeps, …"""
    return stat.read_text().rpartition(")")[2].split()[0]


class Blame:
    """Find out whose failure is the cause of all others, over the store in which the processes met.

    A process that fails by itself says so there before its connections close. One whose collective fails looks there; when nobody has
    said anything, a process was killed, left without a word, or is frozen.
    """

    def __init__(self, store: Any, me: Peer) -> None:
        with contextlib.suppress(Exception):  # not every store can be cloned; a client of its own waits less long
            store = store.clone()
            store.set_timeout(_STORE_TIMEOUT)
        self.store: Any = dist.PrefixStore(f"drivetrain/{next(_rounds)}", store)  # type: ignore[attr-defined]
        self.me = me

    def judge(self, error: BaseException, peers: Iterable[Peer]) -> BaseException:
        """The error to raise in place of `error`: a `PeerFailure` when the cause is another process, else `error` itself."""
        if isinstance(error, PeerFailure):
            return error
        if is_of_a_collective(error):
            return self._culprit(error, peers)
        text = summary(error)
        self._say("failed", f"{self.me} failed: {text}")
        said = False
        if self.me.rank == 0:
            self._say("rank 0", text)
            self._wait_for_readers(peers)
        else:
            said = self._rank_0_says() in text
            self._say(f"read/{self.me.rank}", "yes")
        error.drivetrain_said = said  # type: ignore[attr-defined]  # a program that prints errors leaves these to rank 0
        return error

    def _culprit(self, error: BaseException, peers: Iterable[Peer]) -> BaseException:
        others = [peer for peer in peers if peer.rank != self.me.rank]
        self._say(f"waits/{self.me.rank}", "")
        end = time.monotonic() + _PATIENCE
        try:
            while not (found := self._heard() or _gone(others)) and time.monotonic() < end:
                time.sleep(0.05)
            found = found or self._silent(others)
        except RuntimeError:  # the store is in the process of rank 0 unless torchrun keeps it
            found = _gone(others) or "rank 0 does not answer: its process is gone, frozen or cannot be reached"
        if not found:
            return error
        self._say("culprit", found)
        return PeerFailure(f"{found} (noticed by {self.me})")

    def _heard(self) -> str:
        """What the one that failed has said, or else what another that has looked found out."""
        return self._read("failed") or self._read("culprit")

    def _silent(self, others: list[Peer]) -> str:
        """Those that are frozen; else those that did not notice anything, because they are busy elsewhere or cannot be reached."""
        if stopped := [peer for peer in others if peer.state == "stopped"]:
            return f"{_names(stopped)} does not answer: its process {stopped[0].pid} is stopped"
        missing = [peer for peer in others if not self.store.check([f"waits/{peer.rank}"])]
        if not missing or len(missing) == len(others) > 1:
            return ""
        if missing[0].state == "unknown":
            return f"{_names(missing)} does not answer: its process {missing[0].pid} is gone, frozen or out of reach"
        return f"{_names(missing)} did not come to the collective (process {missing[0].pid}: {missing[0].state})"

    def _rank_0_says(self) -> str:
        said, end = "", time.monotonic() + 1.0
        with contextlib.suppress(RuntimeError):
            while not (said := self._read("rank 0")) and time.monotonic() < end:
                time.sleep(0.02)
        return said or "\0"  # in no text

    def _wait_for_readers(self, peers: Iterable[Peer]) -> None:
        """Where all fail alike the others look for these words; the store that holds them may end with this process."""
        keys, end = [f"read/{peer.rank}" for peer in peers if peer.rank != 0], time.monotonic() + 1.0
        with contextlib.suppress(RuntimeError):
            while keys and not self.store.check(keys) and time.monotonic() < end:
                time.sleep(0.02)

    def _read(self, key: str) -> str:
        return str(self.store.get(key).decode()) if self.store.check([key]) else ""

    def _say(self, key: str, text: str) -> None:
        with contextlib.suppress(RuntimeError):  # the store may be gone with rank 0
            self.store.compare_set(key, "", text)


def hopeless(peers: Iterable[Peer]) -> bool:
    """Whether one of the processes is known to be gone or stopped."""
    return any(peer.state in ("gone", "stopped") for peer in peers)


def _gone(others: list[Peer]) -> str:
    found = [peer for peer in others if peer.state == "gone"]
    return f"{_names(found)} is gone: process {found[0].pid} was killed or left without a word" if found else ""


def _names(peers: list[Peer]) -> str:
    return ", ".join(map(str, peers[:8])) + (f" and {len(peers) - 8} more" if len(peers) > 8 else "")


def is_of_a_collective(error: BaseException) -> bool:
    """Whether an error is one of the communication between processes: what the others did, or did not do."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo/", "NCCL", "Gloo "))


def summary(error: BaseException) -> str:
    """Type and message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONGEST]


def announce_failures(me: Peer) -> None:
    """Let an uncaught error begin with the line that says whose it is, before its traceback; once in a process."""
    if not hasattr(sys.excepthook, "drivetrain_rank"):
        sys.excepthook = _Announcer(me.rank, str(me))


class _Announcer:
    def __init__(self, rank: int, name: str) -> None:
        self.drivetrain_rank, self.name, self.before = rank, name, sys.excepthook

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if getattr(error, "drivetrain_said", False):
            time.sleep(1.0)  # a launcher ends all when the first one ends: let rank 0 speak
            return
        if isinstance(error, PeerFailure):
            print(error, file=sys.stderr, flush=True)
        else:
            print(f"{self.name} failed: {summary(error)}", file=sys.stderr, flush=True)
        self.before(kind, error, trace)
