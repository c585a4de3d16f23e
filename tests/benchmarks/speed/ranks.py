"""(f): several processes, Drivetrain against the script that one writes by hand, in turns within the same processes.

    python tests/benchmarks/speed/ranks.py [--launches 6] [--rounds 9] [--out FOLDER]

Starts two processes of one thread each, with torchrun for DDP and FSDP and with mpirun for MPI. Both trainings of a strategy are held open
and take turns of a few steps, with a barrier between turns. Where a process happens to lie in memory makes some percent, so all is
started several times, in turn with the one and with the other built first (the second is often faster); the speed is the geometric
mean of the two orders' medians, and the range of the launches stands beside it. That they send the same collectives is counted by
tests/e2e/test_collectives.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from report import environment, save
from task import Task, build, data
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from drivetrain import Trainer, TrainingConfig

TASKS = {
    "mlp": Task(model="mlp", batch=32, steps=100_000, max_norm=0.0),
    "gpt": Task(model="gpt", batch=4, layers=4, width=256, steps=100_000, max_norm=0.0),
}
TURN = {"mlp": 50, "gpt": 4}
Steps = Iterator[Any]


def batches(task: Task, rank: int, world: int) -> Iterator[list[torch.Tensor]]:
    """This rank's batches for ever."""
    tensors = data(task).tensors
    while True:
        for indices in torch.randperm(len(tensors[0])).split(task.batch * world)[:-1]:
            mine = indices[rank * task.batch : (rank + 1) * task.batch]
            yield [tensor[mine] for tensor in tensors]


def script(task: Task, strategy: str, rank: int, world: int) -> Steps:
    """By hand: wrapped or sharded, fused AdamW."""
    model, loss = build(task)
    wrapped: Any = model
    if strategy == "ddp":
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    elif strategy == "fsdp":
        blocks = list(getattr(model, "blocks", []))
        for index, block in enumerate(blocks):
            fully_shard(block, reshard_after_forward=index < len(blocks) - 1)
        fully_shard(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=task.lr, weight_decay=task.weight_decay, fused=True)
    parameters = list(wrapped.parameters())
    reduce = over_mpi(parameters, world) if strategy == "mpi" else None
    for x, y in batches(task, rank, world):
        loss(wrapped(x), y).backward()
        if reduce is not None:
            reduce()
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        yield


def over_mpi(parameters: list[nn.Parameter], world: int) -> Callable[[], None]:
    """One Allreduce of all gradients after backward, as scripts with mpi4py do."""
    from mpi4py import MPI

    def reduce() -> None:
        flat = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
        MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, flat, op=MPI.SUM)
        for parameter, part in zip(parameters, flat.div_(world).split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    return reduce


def engine(task: Task, strategy: str) -> Steps:
    """The same by Drivetrain."""
    model, loss = build(task)
    # a model without repeated blocks would be sharded in parts, where the script has one
    distributed: Any = {"use": "fsdp", "min_block_parameters": 10_000} if strategy == "fsdp" else strategy
    config = TrainingConfig(
        max_duration=f"{task.steps}st",
        per_device_batch_size=task.batch,
        max_grad_norm=None,
        distributed=distributed,
        precision="fp32",
        device="cpu",
        optimizer={"use": "adamw", "lr": task.lr, "weight_decay": task.weight_decay, "decay": "all"},
        scheduler="constant",
        standard_callbacks=False,
        log_interval=f"{task.steps}st",
        dataloader={"drop_last": True},
    )
    return Trainer(model, config, data(task), loss=loss).steps()


def turns(
    task: Task, strategy: str, rounds: int, barrier: Callable[[], None], rank: int, world: int, order: list[str]
) -> dict[str, list[float]]:
    """Seconds of each turn; `order` is that in which the two are built."""
    make = {"script": lambda: script(task, strategy, rank, world), "drivetrain": lambda: engine(task, strategy)}
    running = {}
    for name in order:
        running[name] = make[name]()
        next(running[name])
    length = TURN[task.model]
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for index in range(rounds + 1):
        for name in running if index % 2 else reversed(running):
            barrier()
            began = time.perf_counter()
            for _ in range(length):
                next(running[name])
            barrier()
            if index:
                seconds[name].append((time.perf_counter() - began) / length)
    return seconds


def work(strategy: str, rounds: int, toy: bool, target: Path, order: list[str]) -> None:
    """One process of several."""
    torch.set_num_threads(1)
    if strategy == "mpi":
        from mpi4py import MPI

        rank, world, barrier = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size(), MPI.COMM_WORLD.Barrier
    else:
        dist.init_process_group("gloo")
        rank, world, barrier = dist.get_rank(), dist.get_world_size(), dist.barrier
    rows = {}
    for name, task in TASKS.items():
        small = replace(task, batch=2, width=32, context=32) if toy else task
        rows[name] = turns(small, strategy, rounds, barrier, rank, world, order)
    if rank == 0:
        target.write_text(json.dumps(rows))
    if dist.is_initialized():
        dist.destroy_process_group()


def start(strategy: str, rounds: int, toy: bool, order: list[str]) -> dict[str, Any]:
    """Two processes of this file; what the first one measured."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "rows.json"
        mine = [str(Path(__file__)), "--work", strategy, "--rounds", str(rounds), "--target", str(target), *(["--toy"] * toy)]
        mine += ["--order", *order]
        if strategy == "mpi":
            mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}") or "mpirun"
            command = [mpirun, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, *mine]
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *mine]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        rows: dict[str, Any] = json.loads(target.read_text())
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=9, help="of each launch")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp", "mpi"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--order", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    rounds = 1 if given.toy else given.rounds
    if given.work:
        work(given.work, rounds, given.toy, given.target, given.order)
        return
    rows: dict[str, Any] = {}
    print(
        "| | model | script, ms/step | drivetrain, ms/step | speed, script = 1 | launches |\n| --- | --- | --- | --- | --- | --- |"
    )
    for strategy in given.strategies:
        orders = [["script", "drivetrain"], ["drivetrain", "script"]]
        launches = [
            start(strategy, rounds, given.toy, orders[index % 2]) for index in range(1 if given.toy else given.launches)
        ]
        for name in TASKS:
            speeds = [_speed(launch[name]) for launch in launches]
            middle = {
                who: 1e3 * statistics.median(second for launch in launches for second in launch[name][who]) for who in orders[0]
            }
            speed = statistics.geometric_mean(statistics.median(some) for some in (speeds[::2], speeds[1::2]) if some)
            rows[f"{strategy} {name}"] = {"ms_per_step": middle, "speed": speed, "launches": speeds}
            times = f"{middle['script']:.2f} | {middle['drivetrain']:.2f}"
            print(f"| {strategy} | {name} | {times} | {speed:.3f} | {min(speeds):.3f} – {max(speeds):.3f} |", flush=True)
    save(given.out, "ranks", {"rows": rows, "rounds": rounds, "environment": environment()})


def _speed(seconds: dict[str, list[float]]) -> float:
    """The script's time over the engine's, turn by turn."""
    return statistics.median(s / d for s, d in zip(seconds["script"], seconds["drivetrain"], strict=True))


if __name__ == "__main__":
    main()
