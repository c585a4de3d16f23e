"""What the built-in callbacks add to a step of about a millisecond: `python -m tests.benchmarks.callbacks [--rounds 40]`, from the root.

A raw loop, the engine alone, the engine with all built-in callbacks, and with each of them alone (`--each`) train in turns, some steps at
a time, each in a process that waits while it is not its turn: whatever else the machine does hits all alike. A round is one
turn of each. The table has the median over the rounds of a step's time, its ratio to the raw loop's of the same round, and what the
callbacks add to the engine alone, in percent of the raw loop's step. The steps are ordinary ones; with `--logging` every tenth one logs, as
by default. `--cpu` measures processor time and takes the quietest tenth of the rounds in place of
the median, for a machine that does other things.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tests.e2e.everything import CALLBACKS, Net
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drivetrain import Callback, CallbackContext, Trainer, TrainingConfig, component, hook

BATCHES, DEPTH = 64, 3


def data(batch: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of 64 batches."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCHES * batch, 4, generator=generator), torch.randn(BATCHES * batch, 1, generator=generator)


def model(width: int) -> Net:
    """The same weights each time."""
    torch.manual_seed(0)
    return Net(width, DEPTH)


class Baton:
    """Lets this process go on when it is its turn, and tells how long its turns took."""

    def __init__(self, parent: Connection, steps: int, clock: Callable[[], float]) -> None:
        self.parent, self.steps, self.clock = parent, steps, clock
        self.count, self.began = steps, 0.0

    def step(self) -> bool:
        """Called before each step; False when it was the last one."""
        if self.count == self.steps:
            self.parent.send((self.clock() - self.began) / self.steps * 1e6)
            if not self.parent.recv():
                return False
            self.count, self.began = 0, self.clock()
        self.count += 1
        return True


@component
class Turns(Callback):
    """Hands the baton on."""

    baton: Any = None

    @hook(tryfirst=True)
    def on_step_start(self, ctx: CallbackContext) -> None:
        """The step belongs to whoever has the baton."""
        if not self.baton.step():
            ctx.stop("measured")


def raw(width: int, batch: int, baton: Baton, fused: bool) -> None:
    """The least that the same training needs: clipping to a norm included, as in the engine."""
    net, loss = model(width), nn.MSELoss()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=fused)
    parameters = list(net.parameters())
    batches = list(zip(*(tensor.split(batch) for tensor in data(batch)), strict=True))
    while True:
        for inputs, targets in batches:
            if not baton.step():
                return
            loss(net(inputs), targets).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()


def engine(width: int, batch: int, baton: Baton, fused: bool, folder: Path, callbacks: list[Any], log_interval: str) -> None:
    """The engine with some callbacks, and its own `adamw`, all parameters in one group as in the raw loop."""
    net = model(width)
    config = TrainingConfig(
        max_duration="1000000st",
        per_device_batch_size=batch,
        log_interval=log_interval,
        eval_interval=False,
        output_dir=folder,
        callbacks=callbacks,
        standard_callbacks=False,
        device="cpu",
        precision="fp32",  # as the raw loop's
        optimizer={"use": "adamw", "lr": 1e-3, "decay": "all", "fused": fused},
        scheduler="constant",
    )
    turns = Turns(baton=baton)
    given = TensorDataset(*data(batch))
    Trainer(net, config, given, loss=nn.MSELoss(), callbacks=[turns]).train()


def work(name: str, given: argparse.Namespace, folder: Path, parent: Connection) -> None:
    """What one process does: the training of this name."""
    torch.set_num_threads(1)
    if not given.verbose:
        sys.stderr = io.StringIO()
    baton = Baton(parent, given.steps, time.process_time if given.cpu else time.perf_counter)
    if name == "raw loop":
        raw(given.width, given.batch, baton, not given.unfused)
        return
    names = {"engine": [], "all": list(CALLBACKS)}.get(name, [name])
    callbacks = [{"use": each, **CALLBACKS[each]} for each in names]
    interval = "10st" if given.logging else "100000st"
    engine(given.width, given.batch, baton, not given.unfused, folder / name, callbacks, interval)


def measure(given: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Microseconds of a step, for each round."""
    names = ["raw loop", "engine", "all", *(CALLBACKS if given.each else ())]
    context = multiprocessing.get_context("spawn")
    ends: dict[str, Connection] = {}
    for name in names:
        ends[name], child = context.Pipe()
        context.Process(target=work, args=(name, given, folder, child), daemon=True).start()
        child.close()
    for end in ends.values():
        end.recv()  # it stands before its first step
    found: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(-3, given.rounds):
        for name in names if round_ % 2 else reversed(names):
            ends[name].send(True)
            micros = ends[name].recv()
            if round_ >= 0:
                found[name].append(micros)
    for end in ends.values():
        end.send(False)
    for process in multiprocessing.active_children():
        process.join(60)
    return found


def table(found: dict[str, list[float]], quietest: bool) -> list[str]:
    """Markdown."""
    lines = ["| | step, µs | against the raw loop | added to the engine |", "|---|---:|---:|---:|"]
    for name in found:
        time_, ratio, added = _compared(found, name, quietest)
        shown = "" if name in ("raw loop", "engine") else f"{added:+.1%}"
        lines.append(f"| {name} | {time_:.0f} | {ratio:.3f} | {shown} |")
    return lines


def _compared(found: dict[str, list[float]], name: str, quietest: bool) -> tuple[float, float, float]:
    times, base, alone = found[name], found["raw loop"], found["engine"]
    if quietest:
        time_, raw_, engine_ = (sorted(values)[len(values) // 10] for values in (times, base, alone))
        return time_, time_ / raw_, (time_ - engine_) / raw_
    rounds = list(zip(times, base, alone, strict=True))
    middle = statistics.median
    return middle(times), middle(t / b for t, b, _ in rounds), middle((t - a) / b for t, b, a in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description="measure what callbacks add to a step")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=200, help="of a turn: the first ones of it find nothing in the caches")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=70)
    parser.add_argument("--each", action="store_true", help="each callback alone as well")
    parser.add_argument(
        "--cpu", action="store_true", help="processor time of the process, for a machine that is busy with other things"
    )
    parser.add_argument("--verbose", action="store_true", help="show what the trainings write")
    parser.add_argument("--logging", action="store_true", help="log every 10 steps")
    parser.add_argument("--unfused", action="store_true", help="an optimizer that is not fused")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        found = measure(given, folder)
    finally:
        shutil.rmtree(folder)
    print(f"width {given.width}, {DEPTH} layers, batch {given.batch}, torch {torch.__version__}, one thread\n")
    print("\n".join(table(found, given.cpu)))


if __name__ == "__main__":
    sys.exit(main())
