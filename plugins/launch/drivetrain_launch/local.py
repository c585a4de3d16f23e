"""Several processes on this machine, started and watched by torchrun's agent."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from drivetrain import DrivetrainError
from drivetrain_launch.records import Records

MISTAKE, PREEMPTED = 2, 75
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def launch(command: list[str], processes: int | None, max_restarts: int, grace: int) -> int:
    """Run `command` in several processes and return the exit code of the run.

    Args:
        processes: how many; None for one on each device.
        max_restarts: how often to start all again after one has failed.
        grace: seconds to save and end after a signal.

    Returns:
        0 when complete, 75 when interrupted in good order, 2 for a mistake in what was asked for, else that of the first process
        to fail (128 + n for one killed by signal n).
    """
    count = processes or _devices()
    with tempfile.TemporaryDirectory(prefix="drivetrain-launch-") as folder, _quiet(), _threads(count):
        records = Records(Path(folder))
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",  # the agent's own store, on a port that the system chooses
            local_addr="127.0.0.1",
            max_restarts=max_restarts,
            signals_to_handle=_SIGNALS,
            shutdown_timeout=grace,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "drivetrain_launch.worker", folder, *command)
        except ChildFailedError as error:
            return _of_failure(error, records)
        except SignalException as error:
            return _of_signal(error.sigval, records, count)
        return _of_all(records)


def _devices() -> int:
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if count == 0:
        raise DrivetrainError("this machine has no accelerator to count; say how many processes: --nproc 2")
    return int(count)


def _of_failure(error: ChildFailedError, records: Records) -> int:
    rank, failure = error.get_first_failure()
    code = records.newest().get(rank)
    if code is None:  # it did not come to the end of its program, so it has said nothing
        how = f"was killed by {signal.Signals(-failure.exitcode).name}" if failure.exitcode < 0 else "left without a word"
        print(f"rank {rank} on {platform.node()} {how} (process {failure.pid}, exit code {failure.exitcode})", file=sys.stderr)
        code = 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode
    return code


def _of_signal(number: signal.Signals, records: Records, processes: int) -> int:
    """The agent has passed the signal on and waited; after a second one it has not, so that is done here."""
    for again in (signal.SIGTERM, signal.SIGKILL):
        left = records.alive()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, again)  # the agent gives each its own process group
        end = time.monotonic() + 5.0
        while records.alive() and time.monotonic() < end:
            time.sleep(0.05)
    codes = records.newest()
    if len(codes) < processes:  # some were killed before their end
        return 128 + number
    failed = set(codes.values()) - {0, MISTAKE, PREEMPTED}
    return max(failed) if failed else _of_all(records)


def _of_all(records: Records) -> int:
    """Every process has ended in good order."""
    codes = set(records.newest().values())
    return next((code for code in (MISTAKE, PREEMPTED) if code in codes), 0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The agent's log lines, which name processes by number, would stand before the error that matters."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _threads(processes: int) -> Iterator[None]:
    """Divide the cores among the processes, unless the caller has said how many threads each is to have."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // processes))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
