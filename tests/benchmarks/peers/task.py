"""What every trainer is given: the same model, data and faults. Nothing here belongs to one of them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

ROWS, BATCH, EPOCHS = 128, 8, 2
BALLAST = "ballast"
STEPS = ROWS // BATCH * EPOCHS


@dataclass(frozen=True)
class Task:
    """One training, and the fault that meets it.

    Attributes:
        shuffle, dropout, augment: what makes going on in the middle of an epoch hard; without them only the crash safety counts.
        width: of the model: 8 for a small one, 1024 for checkpoints of about 13 MB.
        every: steps between two checkpoints.
        pause: seconds that each step takes at least.
        number: the signal that the process gets in the middle of a step; 0 for none.
        at: that step, counted from 1 within the process.
        room: bytes that somebody else's growing file leaves free from that step on where the run's files are; below 0 for no such file.
    """

    shuffle: bool = False
    dropout: bool = False
    augment: bool = False
    workers: int = 0
    width: int = 1024
    every: int = 2
    pause: float = 0.0
    number: int = 0
    at: int = 0
    room: int = -1


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Every row another one; with noise from torch's global generator when the task augments."""

    def __init__(self, task: Task) -> None:
        self.augment = task.augment

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        noise = 0.1 * torch.rand(16) if self.augment else torch.zeros(16)
        return {"x": noise + torch.sin(torch.arange(16) * (index + 1.0)), "labels": torch.tensor([index % 7 / 7])}


class Net(nn.Module):
    """Three layers; counts its forward passes in a file, and is where the signal arrives."""

    def __init__(self, task: Task, folder: Path) -> None:
        super().__init__()
        drop, width = 0.3 if task.dropout else 0.0, task.width
        self.layers = nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Dropout(drop), nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, 1)
        self.task, self.folder, self.passes = task, folder, 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.count()
        return {"loss": nn.functional.mse_loss(self.head(self.layers(x)), labels)}

    def count(self) -> None:
        """Once for each step."""
        self.passes += 1
        with open(self.folder / "passes", "ab") as file:
            file.write(b".")
        time.sleep(self.task.pause)
        if self.task.number and self.passes == self.task.at:
            if self.task.number == signal.SIGKILL:
                time.sleep(0.5)  # whoever writes in the background has written by now
            os.kill(os.getpid(), self.task.number)
        if (
            self.task.room >= 0 and self.passes >= self.task.at
        ):  # what a trainer frees by removing an old checkpoint is taken too
            free = os.statvfs(self.folder / "run")
            with open(self.folder / "run" / BALLAST, "ab") as file, contextlib.suppress(OSError):
                file.write(bytes(max(0, free.f_bavail * free.f_bsize - self.task.room)))


def build(task: Task, folder: Path) -> Net:
    """The model with its first weights."""
    torch.manual_seed(1)
    return Net(task, folder)


def finish(model: nn.Module, folder: Path) -> None:
    """What a person's script does after the training: keep the weights."""
    torch.save(model.state_dict(), folder / "partial.pt")
    os.replace(folder / "partial.pt", folder / "weights.pt")
