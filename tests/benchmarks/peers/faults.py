"""The same faults for Drivetrain and its peers: which runs end by themselves, with the same weights, and what is silently wrong.

    python faults.py --trials 20 drivetrain hf lightning ignite

prints a Markdown table, and one line of JSON for each trainer to standard error. Each trainer runs in a process of its own, from
which every sitting of a run is forked, so that a start costs no import. requirements.txt beside this file lists the peers.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from task import BALLAST, STEPS, Task

PEERS = ("drivetrain", "hf", "lightning", "ignite")
PAGE = 4096
LONGEST = 120.0  # seconds of one sitting; a longer one hangs
ELSEWHERE: list[Path] = []  # a directory on another file system, while TMPDIR is to be there


# -- sittings ----------------------------------------------------------------------------------------------------------------


def start(peer: Any, folder: Path, task: Task) -> int:
    """Begin a sitting: a process that makes the same call as all others of its run."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary_of(folder).mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid == 0:
        _sit(peer, folder, task)
    return pid


def _sit(peer: Any, folder: Path, task: Task) -> NoReturn:
    code = 1
    with open(folder / "log", "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    tempfile.tempdir = os.environ["TMPDIR"] = str(temporary_of(folder))
    try:
        code = peer.train(folder, task)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def temporary_of(folder: Path) -> Path:
    """A run's TMPDIR: beside its files, or on the file system that was asked for."""
    return ELSEWHERE[0] / folder.name if ELSEWHERE else folder / "tmp"


def wait(pid: int) -> int:
    """The exit code, negative for a signal; -9 also for a process that hangs and is ended here."""
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def to_the_end(peer: Any, folder: Path, task: Task) -> int:
    """Give the same command until it ends well; returns how often a person had to do something by hand for that."""
    for by_hand in range(4):
        if wait(start(peer, folder, task)) == 0:
            return by_hand
        try:
            peer.mend(folder)
        except (OSError, ValueError, IndexError):
            shutil.rmtree(folder / "run", ignore_errors=True)  # begin anew
    return 99


def weights(folder: Path) -> Any:
    return torch.load(folder / "weights.pt", weights_only=True)


def equal(one: Path, other: Path) -> bool:
    """Whether two runs have the same weights, bit for bit."""
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def passes(folder: Path) -> int:
    """How many steps all processes of a run have begun."""
    return (folder / "passes").stat().st_size


# -- faults ------------------------------------------------------------------------------------------------------------------


def kills(peer: Any, folder: Path, trials: int, in_saves: bool) -> Counter[str]:
    """SIGKILL twice at random instants, or at random instants of a save, then the same command until it is done."""
    chance, task = random.Random(f"kill {in_saves}"), Task()
    began = time.monotonic()
    assert to_the_end(peer, folder / "reference", task) == 0
    duration = time.monotonic() - began
    count: Counter[str] = Counter(trials=trials)
    for trial in range(trials):
        run, code, by_hand = folder / f"{trial}", -1, 0
        for _ in range(2):
            if code == 0:  # it was faster than the kill
                break
            pid = start(peer, run, task)
            if in_saves:
                _wait_for_a_save(run / "run", pid, chance)
            else:
                time.sleep(chance.uniform(0.0, 0.7 * duration))
            os.kill(pid, signal.SIGKILL)
            code = wait(pid)
            count["killed"] += code == -signal.SIGKILL
        if code != 0:
            by_hand = to_the_end(peer, run, task)
        count["by_itself"] += by_hand == 0
        count["equal"] += equal(run, folder / "reference")
        count["equal_by_itself"] += by_hand == 0 and equal(run, folder / "reference")
        count["left_MB"] += _left_over(run) // 1_000_000
        shutil.rmtree(run)
    return count


def _wait_for_a_save(where: Path, pid: int, chance: random.Random) -> None:
    """Until something changes in the run's directory for the n-th time; then a little longer, as a save may take."""
    changes, before, deadline = chance.randint(2, 12), _look(where), time.monotonic() + 20
    while changes and time.monotonic() < deadline and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.002)
        now = _look(where)
        changes, before = changes - (now != before), now
    time.sleep(chance.uniform(0.0, 0.03))


def _look(where: Path) -> list[tuple[str, int]]:
    found = []
    for folder, _, names in os.walk(where):
        for name in [".", *names]:
            try:
                found.append((f"{folder}/{name}", os.stat(f"{folder}/{name}").st_size))
            except FileNotFoundError:
                found.append((name, -1))
    return sorted(found)


def _left_over(run: Path) -> int:
    """Bytes of files with a temporary's name, beside the run and in the directory for temporaries."""
    places = [*run.rglob(".*"), *run.rglob("tmp*"), *run.rglob("*tmp"), temporary_of(run)]
    files = {file for place in places for file in ([place] if place.is_file() else place.rglob("*"))}
    return sum(file.stat().st_size for file in files if file.is_file())


def full_disks(peer: Any, folder: Path, trials: int) -> Counter[str]:
    """From a random step on somebody else's file leaves room for a part of a checkpoint; when it is gone, the same command."""
    chance, task = random.Random(7), Task()
    assert to_the_end(peer, folder / "reference", task) == 0
    count: Counter[str] = Counter(trials=trials)
    for trial in range(trials):
        run = folder / f"{trial}"
        disk = run / "run"
        disk.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(disk)], check=True)
        ELSEWHERE.append(disk)  # the directory for temporaries is on that disk as well
        try:
            fault = replace(task, at=chance.randint(2, STEPS - 4), room=chance.randrange(12_000_000))
            code = wait(start(peer, run, fault))
            (disk / BALLAST).unlink()
            by_itself = code == 0 or to_the_end(peer, run, task) == 0
        finally:
            ELSEWHERE.clear()
        count[f"exit {code}"] += 1
        count["by_itself"] += by_itself
        count["equal_by_itself"] += by_itself and equal(run, folder / "reference")
        count["left_MB"] += _left_over(run) // 1_000_000
        subprocess.run(["umount", str(disk)], check=True)
    return count


def namespaced() -> list[str]:
    """How a process gets a mount namespace in which it may mount a disk; an empty list where it may not."""
    for words in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        with contextlib.suppress(OSError):
            if subprocess.run([*words, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0:
                return words
    return []


def terms(peer: Any, folder: Path, trials: int) -> Counter[str]:
    """SIGTERM in the middle of a random step; steps take 0.2 s, so that a handler that waits for three has the time."""
    chance, task = random.Random(3), Task(width=64, every=8, shuffle=True, dropout=True)
    assert to_the_end(peer, folder / "reference", task) == 0
    count: Counter[str] = Counter(trials=trials)
    for trial in range(trials):
        run, at = folder / f"{trial}", chance.randint(2, STEPS - 18)
        code = wait(start(peer, run, replace(task, pause=0.2, number=signal.SIGTERM, at=at)))
        count[f"exit {code}"] += 1
        by_hand = to_the_end(peer, run, task)
        count["steps_lost"] += passes(run) - STEPS
        count["by_itself"] += by_hand == 0
        count["equal"] += equal(run, folder / "reference")
    return count


def resumes(peer: Any, folder: Path, dropout: bool, augment: bool) -> Counter[str]:
    """Killed in the middle of an epoch, once or twice, with shuffled data, without workers and with two."""
    count: Counter[str] = Counter()
    for workers in (0, 2):
        task = Task(shuffle=True, dropout=dropout, augment=augment, workers=workers, width=64, every=3)
        once, again = (folder / f"{name}-{workers}" for name in ("reference", "repeated"))
        for run in (once, again):
            assert to_the_end(peer, run, task) == 0
        assert equal(once, again)  # else nothing could be said of resuming
        for kills, at in ((1, 8), (1, 9), (1, 10), (2, 8), (2, 5)):
            run = folder / f"{workers}-{kills}-{at}"
            for _ in range(kills):
                fault = replace(task, number=signal.SIGKILL, at=at)
                count["unexpected"] += wait(start(peer, run, fault)) != -signal.SIGKILL
            count["trials"] += 1
            count["by_itself"] += to_the_end(peer, run, task) == 0
            count["equal"] += equal(run, once)
    return count


def damages(peer: Any, folder: Path) -> Counter[str]:
    """Every file of the newest checkpoint truncated, with a page of zeros, with a flipped bit, missing; then the same command."""
    chance, task, begun = random.Random(5), Task(width=256, every=4), folder / "begun"
    fault = replace(task, number=signal.SIGKILL, at=STEPS * 3 // 4 - 1)
    assert wait(start(peer, begun, fault)) == -signal.SIGKILL
    undamaged = shutil.copytree(begun, folder / "undamaged", symlinks=True)
    assert to_the_end(peer, undamaged, task) == 0
    count: Counter[str] = Counter()
    newest = peer.newest(begun)
    for file in sorted(path for path in [newest, *newest.rglob("*")] if path.is_file()):
        size = file.stat().st_size
        for what, data in [*_damaged(file.read_bytes(), chance), ("missing", None)]:
            if data is not None and data == file.read_bytes():
                continue
            run = shutil.copytree(begun, folder / "damaged", symlinks=True)
            place = run / file.relative_to(begun)
            place.unlink() if data is None else place.write_bytes(data)
            before = passes(run)
            code = wait(start(peer, run, task))
            result = "error" if code else "silent" if not equal(run, undamaged) else "equal"
            if result == "equal" and passes(run) - before >= STEPS:
                result = "anew"
            count["trials"] += 1
            count[result] += 1
            print(f"{peer.__name__} {file.name} ({size}) {what}: {result}", file=sys.stderr)
            shutil.rmtree(run)
    return count


def _damaged(data: bytes, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    for length in (0, len(data) // 2, len(data) - 1):
        yield f"truncated to {length}", data[:length]
    page = len(data) // 2 // PAGE * PAGE
    yield "a page of zeros", data[:page] + bytes(len(data[page : page + PAGE])) + data[page + PAGE :]
    for _ in range(3):
        flipped = bytearray(data)
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        yield "a flipped bit", bytes(flipped)


# -- the table ---------------------------------------------------------------------------------------------------------------


def trial(name: str, trials: int, only: str, may_mount: bool) -> dict[str, Any]:
    """All faults for one trainer, or only one of them."""
    peer = importlib.import_module(f"with_{name}")
    warm = torch.nn.Parameter(torch.zeros(1))
    warm.grad = torch.zeros(1)
    torch.optim.AdamW([warm]).step()  # imports what every sitting would import anew
    found: dict[str, Any] = {"versions": " ".join(f"{one} {version(one)}" for one in peer.DISTRIBUTIONS)}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        faults = {
            "kill": lambda where: kills(peer, where, trials, in_saves=False),
            "kill in a save": lambda where: kills(peer, where, trials, in_saves=True),
            "kill, TMPDIR elsewhere": lambda where: _elsewhere(peer, where, trials),
            "full disk": lambda where: full_disks(peer, where, trials),
            "resume": lambda where: resumes(peer, where, dropout=False, augment=False),
            "resume, dropout": lambda where: resumes(peer, where, dropout=True, augment=False),
            "resume, augmented": lambda where: resumes(peer, where, dropout=True, augment=True),
            "sigterm": lambda where: terms(peer, where, max(3, trials // 3)),
            "damage": lambda where: damages(peer, where),
        }
        for fault, run in faults.items():
            if (only and fault != only) or (fault == "full disk" and not may_mount):
                continue
            where = Path(folder) / fault.replace(", ", "-")
            where.mkdir()
            began = time.monotonic()
            found[fault] = dict(run(where))
            print(name, fault, found[fault], f"{time.monotonic() - began:.0f} s", file=sys.stderr)
            shutil.rmtree(where)
    return found


def _elsewhere(peer: Any, folder: Path, trials: int) -> Counter[str]:
    """Kills in saves with the directory for temporaries on another file system, as node-local /tmp is on a cluster."""
    if not Path("/dev/shm").is_dir():
        return Counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        ELSEWHERE.append(Path(other))
        try:
            return kills(peer, folder, trials, in_saves=True)
        finally:
            ELSEWHERE.clear()


def table(found: dict[str, dict[str, Any]], only: str = "") -> Iterator[str]:
    """The results as Markdown, a column for each trainer; all rows, or only one."""
    yield f"| | {' | '.join(one['versions'] for one in found.values())} |"
    yield "|---" * (len(found) + 1) + "|"
    for fault, what in ROWS_OF_THE_TABLE:
        if only in ("", fault):
            yield f"| {what} | {' | '.join(_cell(fault, one.get(fault, {})) for one in found.values())} |"


ROWS_OF_THE_TABLE = (
    ("kill", "SIGKILL twice at random instants: ends by itself, with equal weights"),
    ("kill in a save", "SIGKILL twice during a save: the same"),
    ("kill, TMPDIR elsewhere", "the same with TMPDIR on another file system"),
    (
        "full disk",
        "the disk full from a random step on, then room again: exit code when it is full; ends by itself, with equal weights",
    ),
    ("resume", "killed once or twice in mid-epoch, shuffled data, workers 0 and 2: equal weights"),
    ("resume, dropout", "the same with dropout"),
    ("resume, augmented", "the same with dropout and random augmentation in the data set"),
    ("sigterm", "SIGTERM in a random step: exit code; steps made again; equal weights"),
    (
        "damage",
        "the newest checkpoint damaged, each file: **silently other weights**, an error, begun anew, gone on with equal weights",
    ),
)


def _cell(fault: str, count: dict[str, int]) -> str:
    if not count:
        return "not run"
    of = f"of {count['trials']}"
    codes = ", ".join(key.removeprefix("exit ") for key in count if key.startswith("exit "))
    if fault.startswith("kill") or fault == "full disk":
        by_itself, good = count.get("by_itself", 0), count.get("equal_by_itself", 0)
        more = (
            (count["trials"] - by_itself, "stuck until a person helped"),
            (by_itself - good, "**silently other weights**"),
            (count.get("left_MB", 0), "MB left behind"),
        )
        return "; ".join(
            [*([codes] if codes else []), f"{good} {of}", *(f"{number} {what}" for number, what in more if number)]
        )
    if fault == "sigterm":
        return f"{codes}; {count.get('steps_lost', 0) / count['trials']:.1f} steps; {count.get('equal', 0)} {of}"
    if fault == "damage":
        return f"**{count.get('silent', 0)}**, {', '.join(str(count.get(key, 0)) for key in ('error', 'anew', 'equal'))} {of}"
    return f"{count.get('equal', 0)} {of}"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--trials", type=int, default=20, help="runs of each kind of kill")
    parser.add_argument(
        "--only", default="", choices=["", *(fault for fault, _ in ROWS_OF_THE_TABLE)], help="one fault instead of all"
    )
    parser.add_argument("--mount", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(trial(arguments.peers[0], arguments.trials, arguments.only, arguments.mount)))
        return
    found, words = {}, namespaced()
    for name in arguments.peers:
        command = [*words, sys.executable, __file__, name, "--one", "--trials", str(arguments.trials), "--only", arguments.only]
        command += ["--mount"] if words else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        print(name, done.stdout.strip(), file=sys.stderr)
        found[name] = json.loads(done.stdout)
    print("\n".join(table(found, arguments.only)))


if __name__ == "__main__":
    main()
