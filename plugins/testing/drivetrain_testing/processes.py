"""Real processes for tests: ranks that meet over gloo, and a run that is killed and goes on.

Functions and arguments go to the processes by pickle: functions at a module's top, classes that a module can import. The
processes are forked from a server that has imported torch, so that all but the first start in a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from drivetrain import Callback, CallbackContext, GradientSynchronizer, ProcessGroupStrategy, Trainer, component, hook, option
from drivetrain_testing.harness import Restore, final_state

WAIT = 60.0  # seconds that a rank waits for another
_PRELOADED = ["drivetrain_testing.processes", "drivetrain_testing.warm"]


class ProcessError(AssertionError):
    """A process failed; the message ends with its traceback."""


class GlooStrategy(ProcessGroupStrategy):
    """Data parallelism in its plainest form, for tests that have no strategy of their own."""

    name = "gloo"

    def wrap(self, model: nn.Module) -> nn.Module:
        self.synchronizer = GradientSynchronizer(model.parameters())
        return model

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any] | None:
        return self.synchronizer.no_sync()

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        self.synchronizer.reduce()


def run_processes(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], timeout: float = 2 * WAIT, may_die: bool = False
) -> list[Any]:
    """Call `function(*arguments)` in one process for each of `calls`, all at once; returns what they returned.

    Args:
        timeout: seconds after which those that are left are killed.
        may_die: a process that kills itself gives None instead of an error.

    Raises:
        ProcessError: when one fails, is killed or does not end.
    """
    context = _context()
    with tempfile.TemporaryDirectory(prefix="drivetrain-testing-") as folder:
        files = [Path(folder) / f"{index}.pt" for index in range(len(calls))]
        given = [(str(file), dict(os.environ), os.getcwd(), function, call) for file, call in zip(files, calls, strict=True)]
        workers = [context.Process(target=_work, args=arguments, daemon=True) for arguments in given]
        for worker in workers:
            worker.start()
        _wait(workers, files, time.monotonic() + timeout)
        found = [torch.load(file, weights_only=True) if file.exists() else None for file in files]
    failed = [(index, result["error"]) for index, result in enumerate(found) if result and "error" in result]
    if failed:
        raise ProcessError("\n".join(f"process {index} failed:\n{text}" for index, text in failed))
    for index, (worker, result) in enumerate(zip(workers, found, strict=True)):
        if result is None and not (may_die and worker.exitcode == -signal.SIGKILL):
            raise ProcessError(
                f"process {index} gave no result: it hung for {timeout:.0f} s or died, exit code {worker.exitcode}"
            )
    return [None if result is None else result["result"] for result in found]


def spawn_ranks(function: Callable[..., Any], *arguments: Any, world_size: int = 2) -> list[Any]:
    """Call `function(*arguments)` on ranks that have joined a gloo process group; returns each rank's result.

    The ranks see the environment of a launcher, so that `distributed = "auto"` and any strategy that joins an existing group
    work. A collective that a rank does not join fails after a minute.
    """
    with tempfile.TemporaryDirectory(prefix="drivetrain-ranks-") as folder:
        calls = [(f"{folder}/meeting", rank, world_size, function, arguments) for rank in range(world_size)]
        return run_processes(_rank, calls)


def _rank(meeting: str, rank: int, world_size: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_PORT": "1"}  # nothing listens there: the group exists
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size, timeout=timedelta(seconds=WAIT / 2)
    )
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()


@frozen
class Interrupted:
    """What `kill_and_resume` found: the final state of a run that was killed and went on, and of one that was not."""

    resumed: dict[str, Any]
    straight: dict[str, Any]


def kill_and_resume(build: Callable[..., Trainer], *arguments: Any, saved_at: int = 4, killed_at: int = 6) -> Interrupted:
    """Train in a process that is killed (SIGKILL) in the middle of a step, go on in another from the state saved before.

    Args:
        build: makes the trainer: `build(*arguments, callbacks=(...))`; the callbacks are to be added to the run.
        saved_at: the step after which the state is written.
        killed_at: the step in whose backward the process is killed.
    """
    with tempfile.TemporaryDirectory(prefix="drivetrain-killed-") as folder:
        file = f"{folder}/state.pt"
        run_processes(_train_until_killed, [(build, arguments, file, saved_at, killed_at)], may_die=True)
        if not Path(file).exists():
            raise ProcessError(f"the run ended or was killed before step {saved_at}")
        resumed, straight = run_processes(_train, [(build, arguments, file), (build, arguments, None)])
    return Interrupted(resumed, straight)


@component
class _SaveThenDie(Callback):
    file: str = option(help="where the state is written")
    saved_at: int = option(help="the step after which it is written")
    killed_at: int = option(help="the step that does not end")

    @hook(trylast=True)
    def on_step_end(self, ctx: CallbackContext) -> None:
        if ctx.step == self.saved_at:
            torch.save(_apart(ctx.state_dict()), self.file)

    @hook(trylast=True)
    def on_backward(self, ctx: CallbackContext) -> None:
        if ctx.step + 1 == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)


def _train_until_killed(
    build: Callable[..., Trainer], arguments: tuple[Any, ...], file: str, saved_at: int, killed_at: int
) -> None:
    build(*arguments, callbacks=(_SaveThenDie(file=file, saved_at=saved_at, killed_at=killed_at),)).train()


def _train(build: Callable[..., Trainer], arguments: tuple[Any, ...], file: str | None) -> dict[str, Any]:
    callbacks = () if file is None else (Restore(saved=torch.load(file, weights_only=True)),)
    trainer = build(*arguments, callbacks=callbacks)
    trainer.train()
    return final_state(trainer)


def _apart(value: Any) -> Any:
    """Tensors of their own in place of those that share memory, under different types even, which torch.save does not take."""
    return tree_map(lambda part: part.detach().clone() if isinstance(part, Tensor) else part, value)


def _context() -> Any:
    """Forked from a clean server where the system has one, else started anew."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _wait(workers: list[Any], files: list[Path], end: float) -> None:
    """Wait for all. When one has failed, give the others a moment: they may wait for it for ever."""
    while any(worker.is_alive() for worker in workers):
        if any(worker.exitcode for worker in workers):
            end = min(end, time.monotonic() + 5)
        if time.monotonic() > end:
            for worker in workers:
                worker.kill()
            break
        for worker in workers:
            worker.join(0.05)
    for worker in workers:
        worker.join()


def _work(
    file: str, environment: dict[str, str], folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.clear()  # the server's is that of an earlier moment
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    try:
        outcome = {"result": function(*arguments)}
    except BaseException as error:
        notes = traceback.format_exception(error)
        outcome = {"error": "".join(notes)[-4000:]}
    torch.save(_apart(outcome), f"{file}.part")
    os.replace(f"{file}.part", file)
    if "error" in outcome:
        sys.exit(1)
