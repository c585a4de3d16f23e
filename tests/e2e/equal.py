"""What one process of test_equal does: `equal.py TARGET STRATEGY…`. Rank 0 writes the losses and gradients of each step.

The data come in global batches of 24 microbatch places; 53 samples make a last window of 5, so that with 4 ranks and 2 microbatches some
have no sample at all. Rows have between 1 and 5 targets, so that ranks have unequal numbers of tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drivetrain import Callback, CallbackContext, Loss, Precision, Trainer, TrainingConfig
from drivetrain.cluster import detect

PLACE = detect()
WORLD = PLACE.world_size
SAMPLES, BATCH = 53, 24


class Words(nn.Module):
    """Repeated blocks, for FSDP to find; `weighted=False` is the control that gives every process's mean the same weight."""

    def __init__(self, weighted: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 8)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)))
        self.head, self.weighted = nn.Linear(8, 5), weighted

    def forward(self, x: Tensor, labels: Tensor) -> Loss | Tensor:
        logits = self.head(self.blocks(self.body(x).tanh())).flatten(0, 1)
        total = nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
        count = (labels != -100).sum()
        return Loss(total, count) if self.weighted else total / count


def words() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 5, (SAMPLES, 6), generator=generator)
    for row in range(SAMPLES):
        labels[row, 1 + row % 5 :] = -100
    return [{"x": torch.randn(6, 4, generator=generator), "labels": labels[row]} for row in range(SAMPLES)]


def numbers() -> TensorDataset:
    rows = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(7))
    return TensorDataset(rows, rows.sum(1, keepdim=True))


def mlp() -> nn.Module:
    torch.manual_seed(1)
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)))
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), blocks, nn.Linear(8, 1))


class Record(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[list[list[float]]] = []

    def on_gradients(self, ctx: CallbackContext) -> None:
        parts = [p.grad for p in ctx.model.parameters()]
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in parts]
        self.gradients.append([g.reshape(-1).tolist() for g in whole])

    def on_log(self, ctx: CallbackContext) -> None:
        self.losses.append(ctx.metrics["train/loss"])


def run(model: nn.Module, data: Any, strategy: str, accumulation: int) -> dict[str, Any]:
    record = Record()
    config = TrainingConfig(
        max_duration="2ep",
        per_device_batch_size=BATCH // WORLD // accumulation,
        gradient_accumulation_steps=accumulation,
        log_interval="1st",
        standard_callbacks=False,
        distributed=strategy,
    )
    parts = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "callbacks": [record], "precision": Precision()}
    Trainer(model, config, data, loss=nn.MSELoss() if data is PAIRS else None, **parts).train()
    return {"losses": record.losses, "gradients": record.gradients}


PAIRS = numbers()
CASES = {
    "means": (mlp, PAIRS, 1),
    "means, accumulated": (mlp, PAIRS, 2),
    "tokens": (Words, words(), 1),
    "tokens, accumulated": (Words, words(), 3),
    "without weights": (lambda: Words(weighted=False), words(), 1),
}


if __name__ == "__main__":
    target, *strategies = sys.argv[1:]
    found = {
        strategy: {name: run(make(), data, strategy, accumulation) for name, (make, data, accumulation) in CASES.items()}
        for strategy in strategies
    }
    if PLACE.rank == 0:
        Path(target).write_text(json.dumps(found))
