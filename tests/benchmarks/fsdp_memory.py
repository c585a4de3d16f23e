"""How much memory each of several processes needs for parameters, gradients and optimizer state, against one process.

    torchrun --standalone --nproc-per-node 4 tests/benchmarks/fsdp_memory.py

Trains a small GPT with AdamW by Trainer under fsdp, and the same model by a plain loop in one process. Everything is measured: the
bytes of the tensors that stay between steps, the gradients as they are when the optimizer reads them; and at every operation of every
step which memory is in use, by torch's FSDPMemTracker, which follows each tensor from its making to its end.

What must be expected at most at once, on n processes, is

    (parameters + gradients + optimizer state of one process) / n  +  A + 3 B

A is the parameters that lie around the blocks, gathered as long as the model runs; B the parameters of one block: while its backward
runs they are gathered (B), its whole gradient is there (B), and so is the copy of it that is being reduced (B). On GPUs the next
block's parameters are fetched meanwhile, which makes it 4 B.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

from drivetrain import Callback, CallbackContext, Trainer, TrainingConfig
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


class Gradients(Callback):
    """Notes the bytes of all gradients when the optimizer is about to read them."""

    def __init__(self) -> None:
        self.nbytes = 0

    def on_clipped(self, ctx: CallbackContext) -> None:
        self.nbytes = nbytes(p.grad for p in ctx.model.parameters() if p.grad is not None)


def held(parameters: list[nn.Parameter], gradients: int, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """What stays between steps, in bytes."""
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return {"parameters": nbytes(parameters), "gradients": gradients, "optimizer": nbytes(state)}


def data() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 256, (64, 33), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row[:-1], "labels": row[1:]} for row in ids]


def whole() -> dict[str, int]:
    """What one process has after a step of a plain loop."""
    model = GPT(**SIZES)
    optimizer = torch.optim.AdamW(model.parameters())
    found: Any = model(**{name: value[None] for name, value in data()[0].items()})
    getattr(found, "total", found).backward()
    optimizer.step()
    return held(list(model.parameters()), nbytes(p.grad for p in model.parameters()), optimizer)


def gathered() -> int:
    """A + 3 B, in bytes: see above."""
    with torch.device("meta"):
        model = GPT(**SIZES)
    block = sum(p.numel() for p in model.blocks[0].parameters()) * 4
    around = sum(p.numel() for p in model.parameters()) * 4 - len(model.blocks) * block
    return around + 3 * block


def train() -> tuple[Trainer, dict[str, int], dict[str, int]]:
    """A run of four steps, what stays between them, and the most that was in use at once, by sort."""
    torch.manual_seed(0)
    config = TrainingConfig(
        max_duration="4st",
        per_device_batch_size=1,
        precision="fp32",
        optimizer="adamw",
        standard_callbacks=False,
        distributed="fsdp",
    )
    gradients = Gradients()
    trainer = Trainer(GPT(**SIZES), config, data(), callbacks=[gradients])
    tracker = Tracker(trainer.ctx.model, trainer.ctx.optimizer)
    with tracker:
        for _ in trainer.steps():
            tracker.reset_mod_stats()  # what it keeps for each module is for one step
    return trainer, held(list(trainer.ctx.model.parameters()), gradients.nbytes, trainer.ctx.optimizer), tracker.most


def main(target: str | None) -> None:
    trainer, stays, most = train()
    everywhere = trainer.ctx.strategy.gather((stays, sum(most.values())))
    ranks = trainer.ctx.strategy.world_size
    if not trainer.ctx.is_main:
        return
    alone = whole()
    print(f"{'KiB':24}{'one process':>14}{f'/ {ranks}':>12}{'measured':>12}{'':>8}")
    total = sum(alone.values())
    lines = [(name, size, size / ranks, stays[name]) for name, size in alone.items()]
    lines += [("together", total, total / ranks, sum(stays.values()))]
    lines += [("most at once", total, total / ranks + gathered(), sum(most.values()))]
    for name, one, expected, measured in lines:
        print(f"{name:24}{one / 1024:14.0f}{expected / 1024:12.0f}{measured / 1024:12.0f}{measured / expected:8.1%}")
    print(f"of the most at once, A + 3 B = {gathered() / 1024:.0f} KiB are expected for what is gathered")
    if target is not None:
        expected = {name: size / ranks for name, size in alone.items()} | {"most": total / ranks + gathered()}
        found = [{**one, "most": most_of_it} for one, most_of_it in everywhere]
        Path(target).write_text(json.dumps({"expected": expected, "gathered": gathered(), "ranks": found}))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
