"""One of two processes over gloo, in the environment that torchrun sets: `two_ranks.py FOLDER`. Several scenarios, one after another."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

import drivetrain.agreement
from drivetrain import (
    Callback,
    DrivetrainError,
    Loss,
    Precision,
    ProcessGroupStrategy,
    Trainer,
    TrainingConfig,
    component,
    option,
)

RANK = int(os.environ["RANK"])


class Averaging(ProcessGroupStrategy):
    """Gradients by one reduction each."""

    name = "averaging"

    def reduce_gradients(self, parameters) -> None:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.world_size


@component
class Periodic(Callback):
    every: str = option(default="1st")


def versioned(version: str) -> Callback:
    callback = Callback()
    callback.origin = f"mine {version}"
    return callback


def train(samples: int = 8, callbacks: Any = (), width: int = 2, **given: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    model, rows = nn.Linear(2, width), torch.arange(2.0 * samples).reshape(samples, 2)
    config = TrainingConfig(standard_callbacks=False, max_duration="2ep", per_device_batch_size=2, eval_interval=None, **given)
    strategy = Averaging(timeout=30.0, setup_timeout=60.0)
    parts = {"strategy": strategy, "optimizer": torch.optim.SGD(model.parameters(), lr=0.01), "precision": Precision()}
    found: dict[str, Any] = {"error": "", "said": None}
    try:
        trainer = Trainer(
            model, config, TensorDataset(rows, rows), loss=nn.MSELoss(), callbacks=callbacks, device="cpu", **parts
        )
        found["peers"] = [(peer.rank, peer.pid, peer.state) for peer in trainer.ctx.strategy.peers]
        found["before"] = group_timeout()
        trainer.train()
        found["after"], found["weights"] = group_timeout(), model.weight.tolist()
    except DrivetrainError as error:
        found["error"], found["said"] = str(error), error.drivetrain_said
    return found


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 2)

    def forward(self, input_ids: torch.Tensor) -> Loss:
        return Loss(self.table(input_ids).square().sum(), input_ids.numel())


@component
class Rehearse(Callback):
    def on_run_start(self, ctx: Any) -> None:
        with ctx.rehearsal() as step:
            step()


def count_tokens(*callbacks: Callback) -> dict[str, Any]:
    """A run as long as a number of tokens, which travel with the losses' weights."""
    torch.manual_seed(0)
    model, rows = Tokens(), [{"input_ids": (torch.arange(3) + row) % 8} for row in range(16)]
    config = TrainingConfig(standard_callbacks=False, max_duration="60tok", per_device_batch_size=2, eval_interval=None)
    parts = {"strategy": Averaging(), "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "precision": Precision()}
    steps = Trainer(model, config, rows, callbacks=callbacks, device="cpu", **parts).train().steps
    return {"steps": steps, "weights": model.table.weight.tolist()}


def group_timeout() -> float:
    return dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def main(folder: Path) -> None:
    found = {"equal": train(), "pid": os.getpid()}
    found["seed"] = train(seed=RANK)
    found["local"] = train(output_dir=folder / str(RANK))
    found["own callback"] = train(callbacks=[Callback()] if RANK == 0 else [])
    found["own period"] = train(callbacks=[Periodic(every=f"{RANK + 1}st")])
    found["data"] = train(samples=8 + RANK)
    found["model"] = train(width=2 + RANK)
    found["callback's version"] = train(callbacks=[versioned(f"1.{RANK}")])
    found["one sample"] = train(samples=1)
    found["indivisible"] = train(global_batch_size=6)
    found["tokens"], found["tokens after a rehearsal"] = count_tokens(), count_tokens(Rehearse())
    if RANK == 1:
        drivetrain.agreement.__version__ = "0.0.9"
    found["versions"] = train()
    (folder / f"{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
