"""Pairs of processes that make many trainers and end: `many_trainers.py PAIRS`. Forked, so that a pair takes about a second."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import drivetrain_ddp  # noqa: F401  # so that no child has to import it
from drivetrain import Precision, Trainer, TrainingConfig


def train() -> None:
    faulthandler.enable()
    rows = torch.rand(53, 4)
    data = TensorDataset(rows, rows.sum(1, keepdim=True))
    for number in range(12):
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        config = TrainingConfig(max_duration="1ep", standard_callbacks=False, per_device_batch_size=6, distributed="ddp")
        given = DataLoader(data, batch_size=6) if number % 3 == 0 else data
        parts = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "precision": Precision(), "loss": nn.MSELoss()}
        Trainer(model, config, given, given, device="cpu", **parts).train()


def start(rank: int, port: int) -> int:
    pid = os.fork()
    if pid == 0:
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in place.items()})
        train()
        sys.exit(0)  # through the whole end of the interpreter, which is what is tried here
    return pid


def pair() -> list[int]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    pids = [start(rank, port) for rank in (0, 1)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


if __name__ == "__main__":
    torch.set_num_threads(1)
    ended = [code for _ in range(int(sys.argv[1])) for code in pair()]
    sys.exit(f"exit codes {ended}" if any(ended) else 0)
