"""Trials by the dozen, each run in processes forked from this one: `python trials.py DIRECTORY SEED WHAT=TRIALS …`.

WHAT is `kill` (SIGKILL at random instants, two a run) or `signal` (SIGTERM, SIGINT or SIGUSR1 at random instants, through the command
line's own handling; now and then a second one soon after). Each run is started by the same call until it is complete, then
compared with an uninterrupted one. One line of JSON for each WHAT says what came of it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from drivetrain import CheckpointCallback, Trainer, TrainingConfig
from drivetrain_checkpoint import read_checkpoint
from drivetrain_cli.interrupt import Interruptible

STEPS, PREEMPTED = 8, 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Samples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((8,), index / 30) + 0.1 * torch.randn(8), torch.tensor([index % 7 / 7])


def train(output_dir: Path, run_name: str) -> int:
    """The same call each time; the exit code is the command line's."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 256), nn.Tanh(), nn.Dropout(0.3), nn.Linear(256, 1))
    config = TrainingConfig(
        max_duration=f"{STEPS}st",
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        eval_interval="3st",
        output_dir=output_dir,
        run_name=run_name,
        standard_callbacks=False,
    )
    trainer = Trainer(
        model,
        config,
        Samples(),
        Samples(),
        loss=nn.MSELoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        scheduler=lambda position: 1 - position / STEPS,
        callbacks=[CheckpointCallback(every="1st", keep_last=2)],
        device="cpu",
    )
    with Interruptible(trainer.stop):
        output = trainer.train()
    return 0 if output.completed else PREEMPTED


def start(output_dir: Path, run_name: str) -> int:
    pid = os.fork()
    if pid == 0:
        _child(output_dir, run_name)
    return pid


def _child(output_dir: Path, run_name: str) -> NoReturn:
    code = 1
    try:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = train(output_dir, run_name)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def final(output_dir: Path, run_name: str) -> Any:
    """The state at the end, without clocks and places."""
    state = read_checkpoint(output_dir / run_name / "checkpoints" / f"step-{STEPS:08d}")
    del state["manifest"], state["progress"]["seconds"]
    return state


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def hit(pid: int, what: str, chance: random.Random, duration: float) -> None:
    """Send what the trial is about, at a random instant."""
    time.sleep(chance.uniform(0.0, duration * 0.8))
    os.kill(pid, signal.SIGKILL if what == "kill" else chance.choice(SIGNALS))
    if what == "signal" and chance.random() < 0.3:
        time.sleep(chance.uniform(0.0, 0.02))
        os.kill(pid, chance.choice(SIGNALS))


def expected(what: str) -> set[int]:
    """The exit codes that are in order after a hit; a signal before the handlers are there ends the process by itself."""
    if what == "kill":
        return {0, -signal.SIGKILL}
    return {0, PREEMPTED, *(128 + number for number in SIGNALS), *(-number for number in SIGNALS)}


def main(what: str, output_dir: Path, trials: int, seed: int) -> dict[str, int]:
    chance = random.Random(f"{what} {seed}")
    warm = nn.Parameter(torch.zeros(1))
    warm.grad = torch.zeros(1)
    torch.optim.AdamW([warm]).step()  # imports what every child would import anew
    began = time.monotonic()
    assert wait(start(output_dir, "reference")) == 0
    duration = time.monotonic() - began
    count = {"trials": trials, "hit": 0, "preempted": 0, "failed": 0, "equal": 0, "tidy": 0}
    for trial in range(trials):
        name = f"trial-{trial}"
        for _ in range(2):
            pid = start(output_dir, name)
            hit(pid, what, chance, duration)
            code = wait(pid)
            count["hit"] += code != 0
            count["preempted"] += code == PREEMPTED
            count["failed"] += code not in expected(what)
        if wait(start(output_dir, name)) != 0:
            count["failed"] += 1
            continue
        count["equal"] += equal(final(output_dir, name), final(output_dir, "reference"))
        left = [path.name for path in (output_dir / name / "checkpoints").iterdir() if path.name.startswith("step-")]
        hidden = [path.name for path in (output_dir / name / "checkpoints").iterdir() if path.name.startswith(".drivetrain-")]
        count["tidy"] += len(left) <= 3 and not hidden
    return count


if __name__ == "__main__":
    for argument in sys.argv[3:]:
        kind, _, number = argument.partition("=")
        print(json.dumps(main(kind, Path(sys.argv[1]) / kind, int(number), int(sys.argv[2]))))
