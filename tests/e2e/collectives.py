"""Count the collectives of each step and the values read from tensors, of Trainer and of a script without it.

Collectives by a process group that wraps gloo's, reads by wrapped methods of torch.Tensor. A step is counted from its start to the next
one's, so that what is done between steps counts as well.
"""

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
from torch.utils.data import IterableDataset, TensorDataset

from drivetrain import Callback, CallbackContext, Duration, Loss, Precision, Trainer, TrainingConfig, at_hand, component, option

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


at_hand.__code__ = (lambda value: None).__code__  # a CPU's numbers are, a device's are not


def read(name: str) -> Callable[..., Any]:
    original = getattr(torch.Tensor, name)

    def call(self: torch.Tensor, *args: Any) -> Any:
        COUNTS["reads"] += self.is_floating_point()  # whole numbers are orders of samples, which a loader reads on the host
        return original(self, *args)

    return call


for _name in ("item", "tolist", "__float__", "__bool__", "__int__"):
    setattr(torch.Tensor, _name, read(_name))


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


WORDS = [{"input_ids": torch.randint(0, 9, (6,), generator=torch.Generator().manual_seed(n))} for n in range(len(INPUTS))]


class Words(nn.Module):
    """Predicts the sum of a row of token numbers; a `Loss` with a weight for each row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body = nn.Embedding(9, 4), model()

    def forward(self, input_ids: torch.Tensor) -> Loss:
        return weighted_loss(self.body(self.table(input_ids).mean(1)), input_ids.sum(1, keepdim=True).float())


def mean_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).square().mean()


def weighted_loss(outputs: torch.Tensor, targets: torch.Tensor) -> Loss:
    return Loss((outputs - targets).square().sum(), torch.tensor(float(len(targets))))


class Stream(IterableDataset[Any]):
    """Samples without a length."""

    def __iter__(self) -> Iterator[Any]:
        yield from zip(INPUTS, INPUTS[:, :1], strict=True)


class PerStep(Callback):
    """What each step cost, from its start to the next one's; the end of the last one is the end of the run, which logs."""

    def __init__(self) -> None:
        self.steps: list[dict[str, int]] = []
        self.reductions: list[int] = []

    def on_step_start(self, ctx: CallbackContext) -> None:
        if ctx.step > 0:
            self.steps.append(dict(COUNTS))
        COUNTS.clear()

    def on_backward(self, ctx: CallbackContext) -> None:
        self.reductions.append(sum(COUNTS[k] for k in COUNTS if "reduce" in k))


@component
class Hourly(Callback):
    """Has a period that is not counted in steps."""

    every: Duration = option(default=Duration(3600, "s"), help="how often")

    def on_every(self, ctx: CallbackContext) -> None:
        raise AssertionError("not within this test")


PAIRS = TensorDataset(INPUTS, INPUTS[:, :1])
# what is trained, how the losses are averaged, and what of the configuration is not counted in steps
CASES: dict[str, tuple[Any, Any, dict[str, Any], list[Any]]] = {
    "mean": (PAIRS, mean_loss, {}, []),
    "weighted": (PAIRS, weighted_loss, {}, []),
    "hours": (PAIRS, mean_loss, {"max_duration": "1h"}, [Hourly()]),
    "stream": (Stream(), mean_loss, {"max_duration": "1ep", "eval_interval": "1ep"}, []),
    "tokens": (WORDS, None, {"max_duration": f"{6 * len(WORDS)}tok"}, []),
}


def by_trainer(strategy: str, case: str) -> tuple[list[dict[str, int]], list[int]]:
    data, loss, given, callbacks = CASES[case]
    module, seen = Words() if loss is None else model(), PerStep()
    settings = {
        "max_duration": f"{STEPS}st",
        "per_device_batch_size": 2,
        "gradient_accumulation_steps": WINDOW,
        "log_interval": f"{STEPS + 9}st",
        "standard_callbacks": False,
        "max_grad_norm": CLIP,
        "distributed": strategy,
    }
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    parts = {"loss": loss, "optimizer": optimizer, "callbacks": [seen, *callbacks], "precision": Precision()}
    trainer = Trainer(module, TrainingConfig(**settings | given), data, data, **parts)
    for step in trainer.steps():
        if step.number == STEPS:
            break
    return seen.steps, seen.reductions


def by_script(strategy: str, case: str) -> list[dict[str, int]]:
    """What a person would write: blocks sharded, no reduction before a window's last microbatch, clipping; with unequal weights
    their sum as well, and to end after a number of tokens theirs with it, which has to be read."""
    module: Any = Words() if case == "tokens" else model()
    blocks = (module.body if case == "tokens" else module)[1]
    if strategy == "ddp":
        module = DistributedDataParallel(module, gradient_as_bucket_view=True)
    else:
        for index, block in enumerate(blocks):
            fully_shard(block, reshard_after_forward=index < 2)
        fully_shard(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    steps = []
    for window in windows(case):
        COUNTS.clear()
        for index, batch in enumerate(window):
            last = index == WINDOW - 1
            if strategy == "ddp":
                module.require_backward_grad_sync = last
            else:
                module.set_requires_gradient_sync(last)
            loss = module(batch).total if case == "tokens" else mean_loss(module(batch), batch[:, :1])
            (loss / WINDOW).backward()
        if case == "weighted":
            dist.all_reduce(torch.tensor(float(sum(map(len, window)))))
        if case == "tokens":
            numbers = torch.tensor([float(sum(map(len, window))), float(sum(map(torch.numel, window)))])
            dist.all_reduce(numbers)
            int(numbers[1])
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(dict(COUNTS))
    return steps[:-1]


def windows(case: str) -> Iterator[list[torch.Tensor]]:
    rows = torch.stack([row["input_ids"] for row in WORDS]) if case == "tokens" else INPUTS
    mine = rows.view(STEPS, WINDOW, WORLD, 2, -1)[:, :, RANK]
    yield from ([*step] for step in mine)


if __name__ == "__main__":
    join()
    found = {}
    for strategy in ("ddp", "fsdp"):
        for case in CASES:
            trainer, reductions = by_trainer(strategy, case)
            found[f"{strategy} {case}"] = {"trainer": trainer, "reductions": reductions, "script": by_script(strategy, case)}
    if RANK == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()
