"""Disks that are full, and limits on files, met by `drivetrain train FILE` itself: what it says, its exit code, and going on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.faults.served import Ended
from tests.faults.trials import Trials, leftovers

from drivetrain_checkpoint import find_checkpoints, verify

pytestmark = [pytest.mark.skipif(not hasattr(os, "fork"), reason="forks"), pytest.mark.timeout(900)]
KIB = 1024


@pytest.fixture(scope="module")
def trials(tmp_path_factory: Any) -> Iterator[Trials]:
    """A run whose checkpoint has 76 KB: weights, and twice as much of Adam's."""
    with Trials(tmp_path_factory.mktemp("disks"), width=72) as trials:
        yield trials


def steps_in(run: Path) -> list[int]:
    """The checkpoints, every one whole and nothing beside them."""
    assert all(verify(c.path) == [] for c in find_checkpoints(run))
    assert leftovers(run) == []
    return sorted(c.step for c in find_checkpoints(run))


def check_failure(ended: Ended, said: str) -> None:
    """1: nothing was wrong with what was asked for."""
    assert ended.code == 1, ended.err
    assert said in ended.err and "Traceback" not in ended.err
    assert "go on with: drivetrain resume" in ended.err and "--debug" not in ended.err


# -- a limit on the size of files, without root --------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_limit_on_file_sizes_in_a_run(trials: Trials, asynchronous: str) -> None:
    """EFBIG in the middle of a file that is larger than those before it, as by a quota: the first sitting made some checkpoints."""
    name, given = f"limit-{asynchronous}", [f"callbacks.checkpoint.asynchronous={asynchronous}"]
    trials.call(name, *given, FAULT="on_step_end:4:kill")
    before = steps_in_killed(trials.run(name))
    assert before
    ended = trials.call(name, *given, largest_file=30 * KIB)
    check_failure(ended, f"could not be written: {os.strerror(errno.EFBIG)}")
    assert steps_in(trials.run(name)) == before
    trials.finish(name, *given)


def steps_in_killed(run: Path) -> list[int]:
    return sorted(c.step for c in find_checkpoints(run))


def test_a_limit_on_file_sizes_with_warnings(trials: Trials) -> None:
    """The policy "warn": the run ends, complete; no checkpoint was possible."""
    ended = trials.call("warned", "callbacks.checkpoint.on_error=warn", largest_file=30 * KIB)
    assert ended.code == 0, ended.err
    assert "warning: checkpoint:" in ended.err and "The run goes on without it." in ended.err
    assert steps_in(trials.run("warned")) == []
    trials.finish("warned", "callbacks.checkpoint.on_error=warn")  # begun anew, with room


# -- a file system of its own --------------------------------------------------------------------------------------------------


def namespaced() -> list[str]:
    """How a process gets a mount namespace in which it may mount: as root in a new one, else as root of a user namespace."""
    for words in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        try:
            if subprocess.run([*words, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0:
                return words
        except OSError:
            break
    return []


ON_A_SMALL_DISK = """
import subprocess, sys
from pathlib import Path
from tests.faults.trials import Trials
from tests.faults.test_disks import check_failure, fill, steps_in
folder, asynchronous = Path(sys.argv[1]), sys.argv[2]
(folder / "disk").mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder / "disk")], check=True)
given = [f"callbacks.checkpoint.asynchronous={asynchronous}", f'output_dir="{folder / "disk"}"']
with Trials(folder / "trials", width=72) as trials:
    run = trials.places["a"] = folder / "disk" / "a"
    # not in the background: what that had left to rotate or to remove, the next sitting would, and have its room
    at_once = ["callbacks.checkpoint.asynchronous=false", *given[1:]]
    assert trials.call("a", *at_once, FAULT="on_step_end:4:kill").code == -9
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert before == ["step-00000002", "step-00000003"], before
    ballast = fill(folder / "disk", leave=40_000)
    check_failure(trials.call("a", *given), "could not be written: No space left on device")
    assert [f"step-{step:08d}" for step in steps_in(run)] == before
    ballast.unlink()
    trials.finish("a", *given)
    again = fill(folder / "disk", leave=0)
    ended = trials.call("full", *given)
    assert ended.code == 1 and "Traceback" not in ended.err and "No space left on device" in ended.err, ended.err
print("done")
"""


def fill(disk: Path, leave: int) -> Path:
    """Fill a disk but for so many bytes: somebody else's file."""
    room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    (disk / "ballast").write_bytes(bytes(max(0, room - leave)))
    return disk / "ballast"


@pytest.mark.parametrize("asynchronous", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_full_disk(tmp_path: Path, asynchronous: str) -> None:
    """F5: a tmpfs of 512 KiB, with the default, saving in the background. Old checkpoints whole; with room the same words go on."""
    words = namespaced()
    if not words:
        pytest.skip("mounting a tmpfs is not allowed here, not even in a namespace of its own")
    program = [*words, sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path), asynchronous]
    root = Path(__file__).parents[2]
    done = subprocess.run(program, capture_output=True, text=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
