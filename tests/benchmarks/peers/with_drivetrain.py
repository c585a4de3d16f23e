"""Drivetrain, with the checkpoint callback and the command line's handling of signals."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from task import BATCH, EPOCHS, STEPS, Rows, Task, build, finish

from drivetrain import CheckpointCallback, Trainer, TrainingConfig
from drivetrain_checkpoint import find_checkpoints
from drivetrain_cli.interrupt import Interruptible

DISTRIBUTIONS = ("drivetrain-core", "drivetrain-checkpoint")


def train(folder: Path, task: Task) -> int:
    """The same call each time; the exit code is the command line's."""
    model = build(task, folder)
    config = TrainingConfig(
        max_duration=f"{EPOCHS}ep",
        per_device_batch_size=BATCH,
        dataloader={"shuffle": task.shuffle, "num_workers": task.workers},
        output_dir=folder,
        run_name="run",
        standard_callbacks=False,
    )
    trainer = Trainer(
        model,
        config,
        Rows(task),
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        scheduler=lambda position: 1 - position / STEPS,
        callbacks=[CheckpointCallback(every=f"{task.every}st", keep_last=2)],
        device="cpu",
    )
    with Interruptible(trainer.stop):
        output = trainer.train()
    if not output.completed:
        return 75
    finish(model, folder)
    return 0


def newest(folder: Path) -> Path:
    """Where the newest checkpoint is."""
    return find_checkpoints(folder / "run")[0].path


def mend(folder: Path) -> None:
    """What a person would do when the command fails again and again."""
    shutil.rmtree(newest(folder))
