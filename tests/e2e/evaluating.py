"""Evaluate 53 and 3 samples with several sorts of metrics, under each strategy; rank 0 writes what came out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from torchmetrics.classification import BinaryAUROC, BinaryF1Score

from drivetrain import Loss, ModelError, Precision, Trainer, TrainingConfig
from drivetrain.cluster import detect

PLACE = detect()
WORLD, STRATEGIES = PLACE.world_size, ("mpi",) if PLACE.launcher == "mpi" else ("ddp", "fsdp")


class Seen:
    """Which samples it has seen, and how often: a streaming metric in the shape of torchmetrics'."""

    def reset(self) -> None:
        self.samples: list[float] = []

    def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.samples += targets[:, 1].tolist()

    def merge_state(self, other: Seen) -> None:
        self.samples += other.samples

    def compute(self) -> float:
        assert sorted(self.samples) == [*range(len(self.samples))], "a sample twice, or none"
        return float(len(self.samples))


class Alone(Seen):
    merge_state = None  # type: ignore[assignment]


class Rows(Dataset[Any]):
    def __init__(self, n: int) -> None:
        self.x = torch.randn(n, 4, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], torch.tensor([float(self.x[index].sum() > 0), float(index)])


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], targets[:, 0])


def means(outputs: torch.Tensor, batch: Any) -> dict[str, Any]:
    right = (outputs[:, 0] > 0) == (batch[1][:, 0] > 0)
    return {"accuracy": right.float().mean(), "recall": Loss((right * batch[1][:, 0]).sum(), batch[1][:, 0].sum())}


class F1(BinaryF1Score):
    """Counts that are added up."""

    def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        super().update(outputs[:, 0].sigmoid(), targets[:, 0].long())


class AUROC(BinaryAUROC):
    """Lists of what it has seen."""

    def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        super().update(outputs[:, 0].sigmoid(), targets[:, 0].long())


OBJECTS: dict[str, Any] = {"seen": Seen, "f1": F1, "auroc": AUROC}


def run(strategy: str, metrics: Any, n: int) -> Any:
    torch.manual_seed(0)
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)))
    model = nn.Sequential(nn.Linear(4, 8), blocks, nn.Linear(8, 1))
    model[-1].weight.data.mul_(-10.0)  # or it would say the same of all of them
    model[-1].bias.data.zero_()
    config = TrainingConfig(
        max_duration="1ep", per_device_batch_size=4, standard_callbacks=False, distributed=strategy if WORLD > 1 else "none"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    made = Trainer(
        model, config, Rows(8 * WORLD), Rows(n), loss=loss, optimizer=optimizer, compute_metrics=metrics, precision=Precision()
    )
    try:
        return made.evaluate()
    except ModelError as error:
        return str(error)


if __name__ == "__main__":
    found = {}
    for strategy in STRATEGIES:
        for n in (53, 3):
            found[f"{strategy} means {n}"] = run(strategy, means, n)
            found[f"{strategy} objects {n}"] = run(strategy, {name: made() for name, made in OBJECTS.items()}, n)
        found[f"{strategy} alone"] = run(strategy, {"seen": Alone()}, 5)
    if PLACE.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
