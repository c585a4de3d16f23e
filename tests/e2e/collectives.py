"""Count the collectives of each step, of Trainer and of a script without it, by a process group that wraps gloo's."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from drivetrain import Callback, CallbackContext, Loss, Precision, Trainer, TrainingConfig

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
COUNTS: Counter[str] = Counter()
STEPS, WINDOW, CLIP = 6, 2, 0.5
# every collective a process group has; names differ between releases of torch
KINDS = [
    n
    for n in dir(dist.ProcessGroup)
    if any(word in n for word in ("gather", "reduce", "scatter", "broadcast", "alltoall", "barrier"))
]
KINDS = [name for name in KINDS if not name.startswith("__")]


class Counting(dist.ProcessGroup):
    """Every collective is counted and left to another group."""

    def __init__(self, inner: dist.ProcessGroup) -> None:
        super().__init__(inner.rank(), inner.size())
        self.inner = inner

    def getBackendName(self) -> str:  # torch's name
        return "counting"

    group_name = property(lambda self: "counting")
    group_desc = property(lambda self: "counting")


def counted(kind: str) -> Callable[..., Any]:
    def call(self: Counting, *args: Any, **kwargs: Any) -> Any:
        COUNTS[kind] += 1
        return getattr(self.inner, kind)(*args, **kwargs)

    return call


for _kind in KINDS:
    setattr(Counting, _kind, counted(_kind))


def join() -> None:
    def make(store: Any, rank: int, size: int, timeout: timedelta) -> Counting:
        inner = dist.ProcessGroup(store, rank, size)
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        inner._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        return Counting(inner)

    dist.Backend.register_backend("counting", make, devices=["cpu"])
    dist.init_process_group("counting", timeout=timedelta(seconds=60))
    dist.distributed_c10d._register_process_group("counting", dist.group.WORLD)


def model() -> nn.Module:
    torch.manual_seed(0)
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))
    return nn.Sequential(nn.Linear(4, 8), blocks, nn.Linear(8, 1))


INPUTS = torch.randn(STEPS * WINDOW * WORLD * 2, 4, generator=torch.Generator().manual_seed(1))


def mean_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).square().mean()


def weighted_loss(outputs: torch.Tensor, targets: torch.Tensor) -> Loss:
    return Loss((outputs - targets).square().sum(), torch.tensor(float(len(targets))))


class PerStep(Callback):
    """What each step cost, from its start to its end; the last one logs."""

    def __init__(self) -> None:
        self.steps: list[dict[str, int]] = []
        self.reductions: list[int] = []

    def on_step_start(self, ctx: CallbackContext) -> None:
        COUNTS.clear()

    def on_backward(self, ctx: CallbackContext) -> None:
        self.reductions.append(sum(COUNTS[k] for k in COUNTS if "reduce" in k))

    def on_step_end(self, ctx: CallbackContext) -> None:
        self.steps.append(dict(COUNTS))


def by_trainer(strategy: str, loss: Any) -> tuple[list[dict[str, int]], list[int]]:
    module, seen = model(), PerStep()
    config = TrainingConfig(
        max_duration=f"{STEPS}st",
        per_device_batch_size=2,
        gradient_accumulation_steps=WINDOW,
        log_interval=f"{STEPS + 1}st",
        standard_callbacks=False,
        max_grad_norm=CLIP,
        distributed=strategy,
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    data = TensorDataset(INPUTS, INPUTS[:, :1])
    Trainer(module, config, data, loss=loss, optimizer=optimizer, callbacks=[seen], precision=Precision()).train()
    return seen.steps, seen.reductions


def by_script(strategy: str, weighted: bool) -> list[dict[str, int]]:
    """What a person would write: blocks sharded, no reduction before a window's last microbatch, clipping; with unequal weights
    their sum as well."""
    module: Any = model()
    if strategy == "ddp":
        module = DistributedDataParallel(module, gradient_as_bucket_view=True)
    else:
        for index, block in enumerate(module[1]):
            fully_shard(block, reshard_after_forward=index < 2)
        fully_shard(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    steps = []
    for window in windows():
        COUNTS.clear()
        for index, batch in enumerate(window):
            last = index == WINDOW - 1
            if strategy == "ddp":
                module.require_backward_grad_sync = last
            else:
                module.set_requires_gradient_sync(last)
            (mean_loss(module(batch), batch[:, :1]) / WINDOW).backward()
        if weighted:
            dist.all_reduce(torch.tensor(float(sum(map(len, window)))))
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(dict(COUNTS))
    return steps


def windows() -> Iterator[list[torch.Tensor]]:
    mine = INPUTS.view(STEPS, WINDOW, WORLD, 2, 4)[:, :, RANK]
    yield from ([*step] for step in mine)


if __name__ == "__main__":
    join()
    found = {}
    for strategy in ("ddp", "fsdp"):
        for name, loss in (("mean", mean_loss), ("weighted", weighted_loss)):
            trainer, reductions = by_trainer(strategy, loss)
            found[f"{strategy} {name}"] = {
                "trainer": trainer,
                "reductions": reductions,
                "script": by_script(strategy, name == "weighted"),
            }
    if RANK == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()
