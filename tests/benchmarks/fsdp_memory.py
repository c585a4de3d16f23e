"""How much memory each of several processes needs for parameters, gradients and optimizer state, against one process.

    torchrun --standalone --nproc-per-node 4 tests/benchmarks/fsdp_memory.py

Trains a small GPT with AdamW by Trainer under fsdp, and looks, at every operation of every step, at which memory is in use: torch's
FSDPMemTracker follows each tensor from its making to its end. What must be expected is stated beside it: a quarter of what one process
has (4 bytes a parameter each for weight and gradient, 8 for AdamW), and the buffers of what is gathered at a time: the parameters that
lie around the blocks, and of one block the parameters, the gradient and the copy of it that is being reduced. (On GPUs one more block's
parameters, fetched ahead.)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

from drivetrain import Trainer, TrainingConfig
from drivetrain_lm.model import GPT

SIZES: dict[str, Any] = {"layers": 12, "heads": 4, "width": 128, "context": 32, "vocab_size": 256}


class Tracker(FSDPMemTracker):
    """Keeps the moment at which parameters, gradients, optimizer state and what is gathered of them took most, activations aside."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.most: dict[str, int] = {}

    def _update_peak_stats(self, *args: Any) -> None:
        super()._update_peak_stats(*args)
        now = {kind.value: size for kind, size in self._curr_mem_snap[torch.device("cpu")].items() if hasattr(kind, "value")}
        now = {kind: size for kind, size in now.items() if kind not in ("Activation", "Temp", "Inputs", "Buffer")}
        if sum(now.values()) > sum(self.most.values()):
            self.most = now


def nbytes(tensors: Any) -> int:
    """Of this process's parts."""
    return sum(getattr(t, "_local_tensor", t).nbytes for t in tensors)


def persistent(trainer: Trainer) -> dict[str, int]:
    """What stays between steps; gradients as they are when the optimizer reads them."""
    parameters = list(trainer.ctx.model.parameters())
    state = [v for entry in trainer.ctx.optimizer.state.values() for k, v in entry.items() if k != "step"]
    return {"parameters": nbytes(parameters), "gradients": nbytes(parameters), "optimizer": nbytes(state)}


def whole() -> dict[str, int]:
    """What one process has, from the model's size."""
    with torch.device("meta"):
        size = sum(p.numel() for p in GPT(**SIZES).parameters()) * 4
    return {"parameters": size, "gradients": size, "optimizer": 2 * size}


def gathered() -> int:
    """The buffers of what is gathered at a time, in bytes: see above."""
    with torch.device("meta"):
        model = GPT(**SIZES)
    block = sum(p.numel() for p in model.blocks[0].parameters()) * 4
    around = sum(p.numel() for p in model.parameters()) * 4 - len(model.blocks) * block
    return around + 3 * block


def train() -> tuple[Trainer, dict[str, int]]:
    """A run of four steps, and the most it had in use at once, by sort."""
    torch.manual_seed(0)
    model: nn.Module = GPT(**SIZES)
    ids = torch.randint(0, 256, (64, 33))
    rows = [{"input_ids": row[:-1], "labels": row[1:]} for row in ids]
    config = TrainingConfig(
        max_duration="4st",
        per_device_batch_size=1,
        precision="fp32",
        optimizer="adamw",
        standard_callbacks=False,
        distributed="fsdp",
    )
    trainer = Trainer(model, config, rows)
    tracker = Tracker(trainer.ctx.model, trainer.ctx.optimizer)
    with tracker:
        for _ in trainer.steps():
            tracker.reset_mod_stats()  # what it keeps for each module is for one step
    return trainer, tracker.most


def main(target: str | None) -> None:
    trainer, most = train()
    ranks = trainer.ctx.strategy.world_size
    stays, alone = persistent(trainer), whole()
    if not trainer.ctx.is_main:
        return
    print(f"{'KiB':24}{'one process':>14}{f'/ {ranks}':>12}{'measured':>12}{'':>8}")
    total = sum(alone.values())
    lines = [(name, size, size / ranks, stays[name]) for name, size in alone.items()]
    lines += [("together", total, total / ranks, sum(stays.values()))]
    lines += [("most at once", total, total / ranks + gathered(), sum(most.values()))]
    for name, one, expected, measured in lines:
        print(f"{name:24}{one / 1024:14.0f}{expected / 1024:12.0f}{measured / 1024:12.0f}{measured / expected:8.1%}")
    print(f"of the most at once, {gathered() / 1024:.0f} KiB are expected for what is gathered")
    if target is not None:
        expected = {"stays": total / ranks, "most": total / ranks + gathered()}
        Path(target).write_text(json.dumps({"expected": expected, "stays": sum(stays.values()), "most": sum(most.values())}))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
