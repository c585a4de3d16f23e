"""Disks that refuse, real ones and simulated: tried again, then raised or warned of as configured; the old ones stay whole."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from drivetrain import Callback, CheckpointCallback, ConfigError, component
from drivetrain_checkpoint import (
    CheckpointError,
    Files,
    Store,
    find_checkpoints,
    read_checkpoint,
    store,
    verify,
    write_checkpoint,
)
from drivetrain_checkpoint.store import probe


class Refusing(Files):
    """Refuses the given attempts to write a checkpoint, counted from 1."""

    def __init__(self, number: int, *bad: int) -> None:
        self.number, self.bad, self.count = number, bad, 0

    def write(self, path, chunks):
        if path.name == "state.json":
            self.count += 1
            if self.count in self.bad:
                raise OSError(self.number, os.strerror(self.number))
        super().write(path, chunks)


def with_files(files: Files, **options) -> CheckpointCallback:
    callback = CheckpointCallback(**{"every": "2st", "keep_last": None, **options})
    callback.files = files
    return callback


def steps_in(run_dir: Path) -> list[int]:
    assert all(verify(c.path) == [] for c in find_checkpoints(run_dir))
    assert not [p for p in (run_dir / "checkpoints").iterdir() if p.name.startswith(".")]
    return sorted(c.step for c in find_checkpoints(run_dir))


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The seconds slept between attempts, which are not slept here."""
    slept = []
    monkeypatch.setattr(store.time, "sleep", slept.append)
    return slept


# -- retries -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.EAGAIN, errno.ESTALE])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_transient_error_is_tried_again_with_growing_pauses(trainer, tmp_path, pauses, number, asynchronous):
    """Case 47 and F7."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(with_files(Refusing(number, 1, 2, 3), asynchronous=asynchronous)).train()
    assert steps_in(tmp_path / "run") == [2, 4, 6, 8]
    assert [p for p in pauses if p] == pytest.approx([0.2, 0.8, 3.2])


@pytest.mark.parametrize(("number", "attempts"), [(errno.EIO, 3), (errno.ENOSPC, 1), (errno.EROFS, 1), (errno.EDQUOT, 1)])
def test_then_the_policy(trainer, tmp_path, number, attempts):
    files = Refusing(number, *range(2, 99))
    with pytest.raises(CheckpointError, match=rf"checkpoint of step 4 could not be written: {os.strerror(number)}") as caught:
        trainer(with_files(files, retries=2)).train()
    assert files.count == 1 + attempts and ("(3 attempts)" in str(caught.value)) is (attempts == 3)
    assert steps_in(tmp_path / "run") == [2]


def test_what_could_not_be_removed_a_moment_ago_is_removed_at_the_next_attempt(tmp_path):
    class Sick(Refusing):
        def remove(self, path):
            self.refused.append(path)
            if len(self.refused) == 1:
                raise OSError(errno.EIO, "sick")
            super().remove(path)

    Sick.refused = []
    one = Store(tmp_path, Sick(errno.EIO, 1), retries=1)
    one.save({"a": 1}, 5)
    assert len(Sick.refused) > 1 and steps_in(tmp_path) == [5]


def test_options_are_checked(trainer):
    with pytest.raises(ConfigError, match="on_error"):
        trainer(CheckpointCallback(on_error="ignore"))
    with pytest.raises(ConfigError, match="retries: must be at least 0"):
        CheckpointCallback(retries=-1)


# -- warn --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False])
def test_warn_goes_on_and_says_each_failure_once(trainer, tmp_path, asynchronous):
    files = Refusing(errno.ENOSPC, 2, 3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        output = trainer(with_files(files, on_error="warn", asynchronous=asynchronous, keep_last=1), steps=9).train()
    assert output.completed and steps_in(tmp_path / "run") == [9]
    assert [str(w.message).split("could")[0].split(": ")[-1] for w in said] == [f"the checkpoint of step {s} " for s in (4, 6)]
    assert "No space left on device" in str(said[0].message) and "The run goes on without it." in str(said[0].message)


def test_warn_until_the_end_keeps_the_old_one_even_with_keep_last_1(trainer, tmp_path):
    """Case 38."""
    with pytest.warns(UserWarning, match="of step 8 could not be written") as said:
        output = trainer(with_files(Refusing(errno.ENOSPC, *range(2, 99)), on_error="warn", keep_last=1)).train()
    assert output.completed and steps_in(tmp_path / "run") == [2] and output.checkpoint.name == "step-00000002"
    assert len([w for w in said if "could not be written" in str(w.message)]) == 4  # the end is tried again: 4, 6, 8, 8


def test_warn_does_not_hide_what_is_no_matter_of_the_disk(trainer):
    @component
    class Odd(Callback):
        def state_dict(self):
            return {"odd": {1, 2}}

    with pytest.raises(CheckpointError, match="a checkpoint cannot hold"):
        trainer(Odd(), CheckpointCallback(on_error="warn")).train()


def test_a_best_that_could_not_be_saved_does_not_push_out_the_best_that_was(trainer, tmp_path):
    @component
    class Scripted(Callback):
        every: str = "2st"

        def on_epoch_start(self, ctx):
            callback.best = "eval/score"  # from here on: the run has no evaluation of its own, which is refused at its start

        def on_every(self, ctx):
            ctx.eval_metrics = {"eval/score": {2: 5.0, 4: 1.0, 6: 7.0, 8: 9.0}[ctx.step]}
            callback.on_evaluate_end(ctx)

    callback = with_files(Refusing(errno.ENOSPC, 2), on_error="warn", keep_last=1)
    with pytest.warns(UserWarning, match="of step 4 could not be written"):
        trainer(Scripted(), callback).train()
    assert (callback.best_step, callback.best_value) == (2, 5.0) and steps_in(tmp_path / "run") == [2, 8]


# -- real disks --------------------------------------------------------------------------------------------------------------


def can_mount(where: Path, options: str) -> bool:
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    where.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)], capture_output=True)
    return done.returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB of its own, where the tests may mount one."""
    where = tmp_path / "disk"
    if not can_mount(where, "size=512k"):
        pytest.skip("mounting a tmpfs is not allowed here")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Fill a disk but for so many bytes."""
    room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    (disk / "ballast").write_bytes(bytes(room - leave))
    return disk / "ballast"


@component
class Fill(Callback):
    """Fills the disk after a step: somebody else's files."""

    disk: str = ""

    def on_step_end(self, ctx):
        if ctx.step == 3:
            fill(Path(self.disk), leave=4096)


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_disk_that_is_really_full(trainer, small_disk, tmp_path, diff, on_error):
    """F5: old ones whole, nothing left of the new one; with room again, the same command ends with the same weights."""
    trainer(name="reference", steps=8).train()
    where = {"output_dir": small_disk}
    save = {"every": "2st", "keep_last": 1, "on_error": on_error, "asynchronous": False}
    run = trainer(Fill(disk=str(small_disk)), CheckpointCallback(**save), **where)
    if on_error == "raise":
        with pytest.raises(CheckpointError, match="checkpoint of step 4 could not be written: No space left on device"):
            run.train()
    else:
        with pytest.warns(UserWarning, match="No space left on device"):
            assert run.train().completed
    assert steps_in(small_disk / "run") == [2]
    (small_disk / "ballast").unlink()
    again = trainer(CheckpointCallback(**save), **where)
    assert again.train().steps == 8 and again.ctx.resumed
    reference = trainer(CheckpointCallback(every="8st"), name="reference")
    reference.train()
    assert diff(dict(reference.model.state_dict()), dict(again.model.state_dict())) == []
    assert steps_in(small_disk / "run") == [8]


def test_a_disk_that_is_really_read_only_is_found_before_training(trainer, small_disk):
    """F6, as an administrator does it."""
    assert trainer(CheckpointCallback(every="2st"), output_dir=small_disk, steps=4).train().completed
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for callback in (CheckpointCallback(), CheckpointCallback(asynchronous=False)):
        run = trainer(callback, output_dir=small_disk)
        with pytest.raises(CheckpointError, match="Read-only file system"):
            run.train()
        assert run.ctx.step == 4  # as restored: no step was made
    with pytest.warns(UserWarning, match="Read-only file system"):
        assert trainer(CheckpointCallback(on_error="warn"), output_dir=small_disk).train().steps == 8
    assert steps_in(small_disk / "run") == [2, 4]


def said_in_a_child(action) -> str:
    """What a checkpoint error says that `action` meets in a forked process, whose rights and limits are its own."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            action()
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(write)
    with open(read) as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_directory_without_permission_is_found_before_training(tmp_path):
    """F6, as a user."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs").chmod(0o555)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o777 == 0o700:  # as pytest makes its own
            folder.chmod(0o755)

    def action():
        if os.geteuid() == 0:
            os.setuid(65534)
        probe(tmp_path / "runs", Files())

    assert "CheckpointError: " in (said := said_in_a_child(action)) and "cannot be written here: Permission denied" in said


def test_a_run_directory_that_vanishes_is_made_anew(trainer, tmp_path):
    @component
    class Vanish(Callback):
        def on_step_end(self, ctx):
            if ctx.step == 5:
                shutil.rmtree(ctx.run_dir)

    trainer(Vanish(), CheckpointCallback(every="2st", asynchronous=False)).train()
    assert steps_in(tmp_path / "run") == [6, 8]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_limit_on_file_sizes(tmp_path):
    """F5 without root: the kernel cuts the write short and says EFBIG."""
    import resource

    write_checkpoint(tmp_path, {"w": torch.zeros(10)}, 1)

    def action():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        write_checkpoint(tmp_path, {"w": torch.zeros(10_000)}, 2)

    assert "CheckpointFailure: " in (said := said_in_a_child(action)) and "step 2 could not be written: File too large" in said
    assert steps_in(tmp_path) == [1] and read_checkpoint(find_checkpoints(tmp_path)[0].path)["w"].sum() == 0
