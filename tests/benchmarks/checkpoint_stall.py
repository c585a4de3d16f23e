"""How long a save keeps the training waiting: asynchronous, synchronous, and a plain copy of the same memory.

`python tests/benchmarks/checkpoint_stall.py [--parameters 100e6] [--rounds 5] [--directory DIR]` prints a Markdown table. The
state is that of Adam: the weights and two moments, fp32. A step here is matrix products of a fixed size, so that what a save in
the background takes from the training shows in the steps beside it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from drivetrain_checkpoint.background import Work, in_background
from drivetrain_checkpoint.format import pack
from drivetrain_checkpoint.staging import Staging
from drivetrain_checkpoint.store import Store

LAYER = 1024


def state(parameters: int) -> dict[str, Any]:
    """Weights and the moments of Adam, in square layers of a million."""
    shapes = [(LAYER, LAYER)] * max(1, round(parameters / LAYER**2))
    weights = {f"layers.{i}.weight": torch.randn(shape) for i, shape in enumerate(shapes)}
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": w * 0.1, "exp_avg_sq": w * w} for i, w in enumerate(weights.values())}
    return {"model": weights, "optimizer": {"state": moments, "param_groups": [{"lr": 0.1, "params": list(moments)}]}}


def tensors(tree: Any) -> list[torch.Tensor]:
    """All tensors of a tree."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [tensor for item in items for tensor in tensors(item)]


def seconds(action: Callable[[], Any]) -> float:
    """The time that an action takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def write_now(work: Work, tree: Any) -> None:
    """A synchronous save."""
    work.do(pack(tree))


class Training:
    """Steps of a fixed amount of work."""

    def __init__(self) -> None:
        self.a, self.b = torch.randn(768, 768), torch.randn(768, 768)

    def step(self) -> None:
        for _ in range(4):
            self.a @ self.b

    def rate_until(self, done: Callable[[], bool], at_least: float = 0.0) -> float:
        """Steps a second until something has ended."""
        began, count = time.perf_counter(), 0
        while not done() or time.perf_counter() - began < at_least:
            self.step()
            count += 1
        return count / (time.perf_counter() - began)


def in_a_process(work: Callable[[], Any]) -> Callable[[], bool]:
    """Do `work` in a forked process; the returned function says whether it has ended."""
    if (child := os.fork()) == 0:
        os.nice(5)
        work()
        os._exit(0)
    ended = []

    def done() -> bool:
        if not ended and os.waitpid(child, os.WNOHANG)[0]:
            ended.append(True)
        return bool(ended)

    return done


def measure(parameters: int, rounds: int, directory: Path) -> dict[str, list[float]]:
    """Seconds for each way of saving, and steps a second beside a thread, beside a process and alone; in turns."""
    tree, training, staging = state(parameters), Training(), Staging()
    sources = tensors(tree)
    copies = [torch.zeros_like(tensor) for tensor in sources]
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for turn in range(rounds + 1):
        store = Store(directory / "run")
        work = Work(store, turn, 1, None)
        copy = seconds(lambda: [copy.copy_(tensor) for copy, tensor in zip(copies, sources, strict=True)])
        synchronous = seconds(partial(write_now, work, tree))
        alone = training.rate_until(lambda: True, at_least=1.0)
        began = time.perf_counter()
        staged = staging.copy(pack(tree))
        future = in_background(partial(work.do_staged, staged))
        stall = time.perf_counter() - began
        beside_thread = training.rate_until(future.done)
        future.result()
        written = time.perf_counter() - began
        beside_process = training.rate_until(in_a_process(partial(work.do_staged, staged)))
        if turn == 0:
            note("first", stall)  # the buffers are made
            continue
        for name, value in (
            ("copy", copy),
            ("synchronous", synchronous),
            ("asynchronous", stall),
            ("written", written),
            ("alone", alone),
            ("beside thread", beside_thread / alone),
            ("beside process", beside_process / alone),
        ):
            note(name, value)
    return found


def table(found: dict[str, list[float]], size: int) -> str:
    """The medians as Markdown."""
    middle = {name: statistics.median(values) for name, values in found.items()}
    copy = middle["copy"]
    rows = [
        ("plain copy of the memory", copy),
        ("asynchronous save: the training waits", middle["asynchronous"]),
        ("asynchronous save, the first one (makes its buffers)", middle["first"]),
        ("synchronous save: the training waits", middle["synchronous"]),
        ("asynchronous save: durable after", middle["written"]),
    ]
    lines = [f"State: {size / 1e9:.2f} GB, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads of torch.", ""]
    lines += ["| | seconds | against the copy |", "|---|---:|---:|"]
    lines += [f"| {name} | {value:.3f} | {value / copy:.2f} |" for name, value in rows]
    lines += ["", "| steps a second while it is written | against alone |", "|---|---:|"]
    lines += [f"| by a {kind} | {middle[f'beside {kind}']:.2f} |" for kind in ("thread", "process")]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="measure how long a save keeps the training waiting")
    parser.add_argument("--parameters", type=float, default=100e6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to write; by default a temporary directory")
    given = parser.parse_args()
    directory = Path(tempfile.mkdtemp(dir=given.directory))
    try:
        found = measure(int(given.parameters), given.rounds, directory)
    finally:
        shutil.rmtree(directory)
    print(table(found, sum(tensor.nbytes for tensor in tensors(state(int(given.parameters))))))


if __name__ == "__main__":
    main()
