"""Every built-in callback at once, as a run could have them: what the tests and the benchmark of their cost share."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn

CALLBACKS: dict[str, dict[str, Any]] = {  # in no step of a test are those due whose period is 100000st
    "goodput": {"show": False},
    "throughput": {},
    "progress": {},
    "logging": {"trackers": ["jsonl", "csv", "tensorboard"]},
    "checkpoint": {"every": "100000st", "save_at_end": False},
    "early_stopping": {"monitor": "train/loss", "patience": 100000},
    "ema": {},
    "anomaly": {"nonfinite": "rollback", "spike": "skip", "warmup": 5},
    "ledger": {},
    "gc": {},
    "gradient_stats": {"steps": 100000},
    "profiler": {"start": [50000]},
    "watchdog": {},
    "sample_text": {"every": "100000st", "length": 1},
    "batch_size_finder": {},
    "lr_finder": {"steps": 10},
    "workers_finder": {"most": 0},
}
LEFT_OUT = {  # each has its own tests, those of killed runs included where it has a say in the training
    "audit": "for a run that is to be examined: it intercepts every reading",
    "cuda_graphs": "it records steps in which nobody takes part, on a GPU",
    "optimizer_in_backward": "it cannot be had with those that look at gradients",
    "sample_prompts": "for models of transformers, where its own tests are; it has no state",
}


def built_in() -> set[str]:
    """The names of all callbacks that distributions of this workspace bring."""
    return {e.name for e in entry_points(group="drivetrain.callback") if e.dist is not None and _ours(e.dist.name)}


def _ours(distribution: str) -> bool:
    return distribution.startswith("drivetrain") and distribution != "drivetrain-testing"


def tables(*without: str) -> list[Any]:
    """The configuration's `callbacks`."""
    return [{"use": name, **options} for name, options in CALLBACKS.items() if name not in without]


class Net(nn.Sequential):
    """Layers of one width, and what `sample_text` asks of a model."""

    vocab_size = 256

    def __init__(self, width: int, depth: int) -> None:
        layers = [nn.Linear(4, width), nn.Tanh()]
        for _ in range(depth):
            layers += [nn.Linear(width, width), nn.Tanh()]
        super().__init__(*layers, nn.Linear(width, 1))

    def generate(self, ids: Tensor, length: int, **options: Any) -> Tensor:
        """Bytes of no meaning."""
        return torch.cat([ids, ids[:, :1].expand(-1, length)], dim=1)
