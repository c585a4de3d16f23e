"""Kill real training processes at random instants, start them again, and compare the end with an uninterrupted run.

Run as a program: `python kill_trials.py DIRECTORY TRIALS KILLS SEED`. It imports torch once and forks each training process, which
makes a start cost milliseconds. It prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from drivetrain import CheckpointCallback, Trainer, TrainingConfig

STEPS = 16


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 30

    def __getitem__(self, index):
        return torch.full((8,), index / 30) + 0.1 * torch.randn(8), torch.tensor([index % 7 / 7])


def train(output_dir: Path, run_name: str) -> None:
    """The same command each time."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 512), nn.Tanh(), nn.Dropout(0.3), nn.Linear(512, 512), nn.Linear(512, 1))
    config = TrainingConfig(
        max_duration=f"{STEPS}st",
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        output_dir=output_dir,
        run_name=run_name,
        standard_callbacks=False,
    )
    Trainer(
        model,
        config,
        Samples(),
        loss=nn.MSELoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        scheduler=lambda position: 1 - position / STEPS,
        callbacks=[CheckpointCallback(every="1st", keep_last=2)],
        device="cpu",
    ).train()


def start(output_dir: Path, run_name: str) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            train(output_dir, run_name)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def final_weights(output_dir: Path, run_name: str) -> bytes:
    return (output_dir / run_name / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors").read_bytes()


def main(output_dir: Path, trials: int, kills: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    warm = nn.Parameter(torch.zeros(1))
    warm.grad = torch.zeros(1)
    torch.optim.AdamW([warm]).step()  # imports what every child would import anew
    began = time.monotonic()
    ended = os.waitstatus_to_exitcode(os.waitpid(start(output_dir, "reference"), 0)[1])
    duration = time.monotonic() - began
    assert ended == 0
    count = {"trials": trials, "killed": 0, "unfinished_saves": 0, "failed": 0, "equal": 0, "tidy": 0}
    for trial in range(trials):
        name = f"trial-{trial}"
        root = output_dir / name / "checkpoints"
        for _ in range(kills):
            pid = start(output_dir, name)
            time.sleep(rng.uniform(0.0, duration * 0.8))
            os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            count["killed"] += code == -signal.SIGKILL
            count["failed"] += code > 0
            count["unfinished_saves"] += root.exists() and any(p.name.startswith(".") for p in root.iterdir())
        code = os.waitstatus_to_exitcode(os.waitpid(start(output_dir, name), 0)[1])
        count["failed"] += code != 0
        if code == 0:
            count["equal"] += final_weights(output_dir, name) == final_weights(output_dir, "reference")
            left = sorted(os.listdir(root))  # one more when the kill fell between the last save and its rotation
            count["tidy"] += left[-2:] == [f"step-{step:08d}" for step in (STEPS - 1, STEPS)] and len(left) <= 3
    return count


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))))
