"""A process that trains again and again while things go wrong: `soaked.py FOLDER SECONDS RUNS [LEAK …]`; one JSON line a run.

Each run is made of sittings in this very process, as in a notebook, each with data workers and a save in the background. They end by
a full disk at a random operation of a save (F5), by a random signal at a random instant (F8), or in a forked process by SIGKILL at a
random instant (F1), until the run is complete: it must be equal to the uninterrupted one, and this process as large as before. It
goes on for SECONDS, and for RUNS at least. LEAK, the negative control, names what is lost in every run.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drivetrain import CheckpointCallback, Trainer, TrainingConfig
from drivetrain_checkpoint import CheckpointError, Files, find_checkpoints, read_checkpoint
from drivetrain_cli.interrupt import Interruptible

STEPS = 8
OPERATIONS = ("mkdir", "write", "fsync", "fsync_dir", "rename")
SHARED = Path("/dev/shm")
LOST: list[Any] = []


class Samples(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((8,), index / 30) + 0.1 * torch.randn(8), torch.tensor([index % 7 / 7])


class FullDisk(Files):
    """Has no room from a certain operation on."""

    def __init__(self, left: int) -> None:
        for name in OPERATIONS:
            setattr(self, name, self._limited(getattr(super(), name)))
        self.left = left

    def _limited(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def limited(*given: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return operation(*given)

        return limited


def sit(folder: Path, files: Files | None = None) -> bool:
    """One sitting of the same call; whether the run is complete."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 256), nn.Tanh(), nn.Dropout(0.3), nn.Linear(256, 256), nn.Linear(256, 1))
    saving = CheckpointCallback(every="1st", keep_last=2)
    saving.files = files or saving.files
    config = TrainingConfig(
        max_duration=f"{STEPS}st",
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        eval_interval="3st",
        output_dir=folder.parent,
        run_name=folder.name,
        standard_callbacks=False,
        dataloader={"num_workers": 2, "timeout": 120.0},
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    parts = {"loss": nn.MSELoss(), "optimizer": optimizer, "callbacks": [saving], "device": "cpu"}
    trainer = Trainer(model, config, Samples(), Samples(), scheduler=lambda position: 1 - position / STEPS, **parts)
    with Interruptible(trainer.stop, speaks=False):
        return trainer.train().completed


def with_a_full_disk(folder: Path, chance: random.Random, count: Counter[str]) -> bool:
    try:
        return sit(folder, FullDisk(chance.randrange(70)))
    except CheckpointError:
        count["full disk"] += 1
        return False


def with_a_signal(folder: Path, chance: random.Random, count: Counter[str], longest: float) -> bool:
    """The handler of before is that of the process itself: a signal that comes after the sitting must not end it."""
    number = chance.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
    before = signal.signal(number, lambda *_: None)
    timer = threading.Timer(chance.uniform(0, longest), os.kill, (os.getpid(), number))
    timer.start()
    try:
        complete = sit(folder)
    finally:
        timer.cancel()
        timer.join()
        signal.signal(number, before)
    count["signal"] += not complete
    return complete


def with_a_kill(folder: Path, chance: random.Random, count: Counter[str], longest: float) -> bool:
    """In a process of its own, whose workers must end as well."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        try:
            os._exit(0 if sit(folder) else 1)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(3)
    with suppress(OSError):
        os.setpgid(child, child)
    time.sleep(chance.uniform(0, longest))
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    count["killed"] += code != 0
    end = time.monotonic() + 120
    with suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(child, 0)
            time.sleep(0.02)
        raise AssertionError("workers have outlived their process for two minutes")
    return code == 0


def final(folder: Path) -> dict[str, torch.Tensor]:
    state = read_checkpoint(find_checkpoints(folder)[0].path)
    moments = {f"{n} {key}": value for n, one in state["optimizer"]["state"].items() for key, value in one.items()}
    return state["model"] | moments  # type: ignore[no-any-return]


def one_run(folder: Path, chance: random.Random, count: Counter[str], longest: float, whole: dict[str, torch.Tensor]) -> None:
    """Sittings until it is complete, equal, and nothing left over."""
    complete = False
    for _ in range(chance.randrange(1, 5)):
        if not complete:
            kind = chance.choice(("disk", "signal", "kill"))
            if kind == "disk":
                complete = with_a_full_disk(folder, chance, count)
            else:
                complete = (with_a_signal if kind == "signal" else with_a_kill)(folder, chance, count, longest)
    while not complete:
        complete = sit(folder)
    found = final(folder)
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    assert not [path for path in (folder / "checkpoints").iterdir() if not path.name.startswith("step-")]
    shutil.rmtree(folder)


def size(shared_before: set[str]) -> dict[str, int]:
    """Of this process: open files, threads, resident bytes, child processes; and shared memory that torch has left behind."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # when glibc itself gives back what is free in its heaps, 16 MB at a time here, is chance
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    left = {name for name in os.listdir(SHARED) if name.startswith("torch_")} - shared_before if SHARED.is_dir() else set()
    return {
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "rss": int(status["VmRSS"].split()[0]) * 1024,
        "children": len(children),
        "shared": len([name for name in left if not _is_used(name)]),
    }


def _is_used(name: str) -> bool:
    """Whether the process that made it lives: other tests may run at the same time."""
    return Path(f"/proc/{name.split('_')[1]}").exists() and int(name.split("_")[1]) != os.getpid()


def lose(what: str, number: int) -> None:
    """The negative control."""
    if what == "fds":
        LOST.append(Path(os.devnull).open())  # noqa: SIM115
    elif what == "threads":
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    elif what == "rss":
        LOST.append(torch.ones(1 << 22))
    elif what == "children":
        LOST.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
    elif what == "shared":
        LOST.append(SHARED / f"torch_{os.getpid()}_lost_{number}")
        LOST[-1].touch()


def take_back() -> None:
    for one in LOST:
        if isinstance(one, Path):
            one.unlink()
        elif isinstance(one, subprocess.Popen):
            one.kill()


def main(folder: Path, seconds: float, runs: int, leaks: list[str]) -> None:
    chance, count, shared = random.Random("soak"), Counter[str](), set(os.listdir(SHARED)) if SHARED.is_dir() else set()
    assert sit(folder / "whole") and sit(folder / "again")
    began = time.monotonic()
    assert sit(folder / "timed")
    longest, whole = time.monotonic() - began, final(folder / "whole")
    number, end = 0, time.monotonic() + seconds
    while number < runs or time.monotonic() < end:
        one_run(folder / "run", chance, count, longest, whole)
        for leak in leaks:
            lose(leak, number)
        number += 1
        print(json.dumps(size(shared) | {"run": number} | count), flush=True)
    take_back()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
