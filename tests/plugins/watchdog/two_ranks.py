"""One of two processes that train until the second one stands still, in the environment that torchrun sets: `two_ranks.py FOLDER HOW`."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drivetrain import Precision, ProcessGroupStrategy, Trainer, TrainingConfig
from drivetrain_watchdog.callback import Watchdog


class Averaging(ProcessGroupStrategy):
    """Gradients by one reduction each, so that this test needs no other plugin."""

    name = "averaging"

    def reduce_gradients(self, parameters) -> None:
        for parameter in parameters:
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.world_size


class Stands(nn.Module):
    def __init__(self, rank: int, how: str) -> None:
        super().__init__()
        self.line, self.seen, self.rank, self.how = nn.Linear(4, 1), 0, rank, how

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        if self.seen == 4 and self.rank == 1:
            print("standing", flush=True)
            if self.how == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            self.stand_still()
        return self.line(x)

    def stand_still(self) -> None:
        time.sleep(1000)


def main(folder: str, how: str) -> None:
    rank = int(os.environ["RANK"])
    model, data = Stands(rank, how), TensorDataset(torch.ones(64, 4), torch.ones(64, 1))
    config = TrainingConfig(max_duration="9st", standard_callbacks=False, output_dir=folder, run_name="a", eval_interval=None)
    strategy, optimizer = Averaging(timeout=6.0), torch.optim.SGD(model.parameters(), lr=0.1)
    parts = {"strategy": strategy, "optimizer": optimizer, "precision": Precision(), "callbacks": [Watchdog(after=3.0)]}
    Trainer(model, config, data, loss=nn.MSELoss(), device="cpu", **parts).train()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
