"""One process per run directory: the second is refused with a name, and no killed one is in anybody's way."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext

import pytest

from drivetrain import Callback, CheckpointCallback, component
from drivetrain_checkpoint import CheckpointError, find_checkpoints, lock
from drivetrain_checkpoint.lock import LOCK_FILE, RunLock

HOLD = """
import sys, time
from pathlib import Path
from drivetrain_checkpoint.lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a run directory; it imports no torch."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_process_is_refused_and_told_by_whom(tmp_path, holder):
    """F18."""
    with pytest.raises(CheckpointError, match=f"in use by process {holder.pid} on {socket.gethostname()}: .* run_name"):
        RunLock(tmp_path).acquire()


def test_a_killed_process_is_no_obstacle(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK_FILE).read_text() == f"{socket.gethostname()} {holder.pid}\n"
    mine = RunLock(tmp_path)
    mine.acquire()
    assert (tmp_path / LOCK_FILE).read_text() == f"{socket.gethostname()} {os.getpid()}\n"
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_two_runs_in_one_process_are_told_apart(tmp_path):
    """Which the operating system does not do."""
    (tmp_path / "link").symlink_to(tmp_path)
    first, second = RunLock(tmp_path), RunLock(tmp_path / "link")
    first.acquire()
    with pytest.raises(CheckpointError, match=rf"another run in this process \(pid {os.getpid()}\)"):
        second.acquire()
    second.release()
    assert first.held and (tmp_path / LOCK_FILE).exists()
    first.release()
    second.acquire()
    second.release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    mine = RunLock(tmp_path)
    mine.acquire()
    read, write = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(write)
        os.read(read, 1)  # alive until the test closes its end
        os._exit(0)
    os.close(read)
    mine.release()
    mine.acquire()
    mine.release()
    check = "import sys; from pathlib import Path; from drivetrain_checkpoint.lock import RunLock; RunLock(Path(sys.argv[1])).acquire()"
    subprocess.run([sys.executable, "-c", check, str(tmp_path)], check=True, timeout=30)
    os.close(write)
    os.waitpid(worker, 0)


def test_a_lock_file_that_is_removed_while_it_is_taken_is_not_the_lock(tmp_path, monkeypatch):
    """Between opening and locking, the one before removed it: the file behind the descriptor is nobody's any more."""
    take, times = lock._lock, []

    def removed_meanwhile(descriptor):
        if not times:
            (tmp_path / LOCK_FILE).unlink()
        times.append(descriptor)
        return take(descriptor)

    monkeypatch.setattr(lock, "_lock", removed_meanwhile)
    mine = RunLock(tmp_path)
    mine.acquire()
    assert len(times) == 2 and (tmp_path / LOCK_FILE).exists()
    mine.release()


@pytest.mark.parametrize("content", ["", "garbage", "host not-a-number\n", "\0\xff", "x" * 5000])
def test_what_the_file_says_does_not_matter_where_there_are_locks(tmp_path, content):
    (tmp_path / LOCK_FILE).write_text(content)
    mine = RunLock(tmp_path)
    mine.acquire()
    mine.release()


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("text")
    (tmp_path / LOCK_FILE).symlink_to("precious")
    with pytest.raises(CheckpointError, match="the run cannot be locked"):
        RunLock(tmp_path).acquire()
    assert (tmp_path / "precious").read_text() == "text"


def test_where_the_file_system_has_no_locks_the_file_decides(tmp_path, monkeypatch, holder):
    def unsupported(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", unsupported)
    with pytest.raises(CheckpointError, match=f"in use by process {holder.pid}"):
        RunLock(tmp_path).acquire()
    holder.kill()
    holder.wait()
    mine = RunLock(tmp_path)
    mine.acquire()
    mine.release()
    (tmp_path / LOCK_FILE).write_text("another-host 1\n")
    with pytest.warns(UserWarning, match="process 1 on another-host has used this run before: make sure that it has ended"):
        mine.acquire()
    mine.release()


# -- in runs -----------------------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_before_its_first_step(trainer, tmp_path):
    """New or not; and refused without a trace in the directory."""
    refused = []

    @component
    class Second(Callback):
        def on_step_end(self, ctx):
            if ctx.step in (1, 5):
                other = trainer(CheckpointCallback())
                with pytest.raises(CheckpointError, match="is in use by"):
                    other.train()
                refused.append(other.ctx.step)

    trainer(Second(), CheckpointCallback(every="3st", asynchronous=False)).train()
    assert refused == [0, 3]  # the second had restored the checkpoint of step 3
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoints"]  # the lock's file is gone


def test_two_new_runs_of_one_name_meet_at_the_first_step(trainer, tmp_path):
    first, second = trainer(CheckpointCallback()).steps(), trainer(CheckpointCallback())
    next(first)
    assert not (tmp_path / "run" / "checkpoints").exists()
    with pytest.raises(CheckpointError, match="is in use by another run in this process"):
        second.train()
    first.close()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_run_gives_the_lock_back(trainer, error):
    @component
    class Broken(Callback):
        def on_step_end(self, ctx):
            raise error("broken")

    with pytest.raises(error) if error is ValueError else nullcontext():  # Ctrl-C ends `train` without an error
        trainer(Broken(), CheckpointCallback()).train()
    assert trainer(CheckpointCallback()).train().completed


def test_a_run_that_restored_before_another_one_went_on_is_refused(trainer, tmp_path):
    """It would go on from an old state, beside newer checkpoints."""
    run = trainer(CheckpointCallback(every="3st"))
    for step in run.steps():
        if step.number == 3:
            break

    @component
    class Meanwhile(Callback):
        def on_restore(self, ctx):
            trainer(CheckpointCallback(every="3st")).train()

    with pytest.raises(CheckpointError, match="has come further meanwhile, to step-00000008: another process was at work"):
        trainer(CheckpointCallback(), Meanwhile()).train()
    assert trainer(CheckpointCallback()).train().steps == 8
    assert [c.step for c in find_checkpoints(tmp_path / "run")] == [8, 6, 3]


def test_reading_a_run_in_use_is_allowed(trainer):
    @component
    class Look(Callback):
        def on_step_end(self, ctx):
            if ctx.step == 5:
                assert trainer(CheckpointCallback()).restore() == 3

    trainer(Look(), CheckpointCallback(every="3st", asynchronous=False)).train()
