"""How long a save keeps the training waiting: the checkpoint callback's own time in real runs, against a plain copy of the same memory.

`python tests/benchmarks/checkpoint_stall.py [--parameters 100e6] [--rounds 5] [--directory DIR]` prints a Markdown table; by torchrun
with several processes, the same for FSDP, each process with its part of the state.

The state is that of AdamW: the weights and two moments, fp32. Three runs of the same training save every few steps: in the background
by a thread (what the callback does), in the background by a forked process, and at once. In each of them, just before every save, the
tensors of the state are copied to memory that has been used before, as the least that an asynchronous save must do. What is measured
is the time that the training's thread spends in the callback, from the event that makes it save to the next step, everything
included. A save begins when the one before it has ended.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import drivetrain_checkpoint.callback as product
from drivetrain import Callback, CallbackContext, CheckpointCallback, Trainer, TrainingConfig
from drivetrain_checkpoint.background import Saved, in_background

LAYER = 1024
EVERY = 3  # steps between saves
WAYS = ("thread", "process", "synchronous")
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
Found = dict[str, list[float]]


class Layers(nn.Module):
    """Square layers of a million parameters."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(LAYER, LAYER, bias=False) for _ in range(max(1, round(parameters / LAYER**2))))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


class Timed(CheckpointCallback):
    """The callback, with the time that each of its events takes of the training's thread."""

    spent = 0.0  # seconds since the last copy or step

    def timed(self, event: Callable[[CallbackContext], None], ctx: CallbackContext) -> None:
        began = time.perf_counter()
        event(ctx)
        self.spent += time.perf_counter() - began

    def on_every(self, ctx: CallbackContext) -> None:
        self.timed(super().on_every, ctx)

    def on_step_start(self, ctx: CallbackContext) -> None:
        self.timed(super().on_step_start, ctx)

    def on_clipped(self, ctx: CallbackContext) -> None:
        self.timed(super().on_clipped, ctx)

    @property
    def is_writing(self) -> bool:
        return self._in_flight is not None and not self._in_flight.has_ended


class Measure(Callback):
    """Copies the state before each save, and notes what the steps and the saves take."""

    def __init__(self, saving: Timed) -> None:
        self.saving, self.found, self.copies = saving, Found(), list[Tensor]()
        self.began, self.wrote = time.perf_counter(), False

    def note(self, name: str, value: float) -> None:
        self.found.setdefault(name, []).append(value)

    def on_step_start(self, ctx: CallbackContext) -> None:
        """The callback's own event has just been: what it has spent since the last step's end is the stall."""
        if ctx.step and ctx.step % EVERY == 0:
            self.note("stall", self.saving.spent)
        self.began, self.wrote, self.saving.spent = time.perf_counter(), self.saving.is_writing, 0.0

    def on_step_end(self, ctx: CallbackContext) -> None:
        if self.wrote == self.saving.is_writing and ctx.step > 1:
            self.note("step beside" if self.wrote else "step alone", time.perf_counter() - self.began)
        if ctx.step % EVERY == 0 or ctx.step == 1:
            self.copy(ctx)

    def copy(self, ctx: CallbackContext) -> None:
        """The same tensors, copied; not while a save is still being written."""
        while self.saving.is_writing:
            time.sleep(0.01)
        ctx.strategy.barrier()
        state = [v for entry in ctx.optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
        sources = [local(t) for t in (*ctx.model.parameters(), *state)]
        if not self.copies:
            self.copies = [torch.zeros_like(source) for source in sources]
            return
        began = time.perf_counter()
        for to, source in zip(self.copies, sources, strict=True):
            to.copy_(source)
        self.note("copy", time.perf_counter() - began)
        self.saving.spent = 0.0

    def on_checkpoint_saved(self, ctx: CallbackContext) -> None:
        self.note("size", float(sum(copy.nbytes for copy in self.copies)))


def local(tensor: Tensor) -> Tensor:
    """This process's part."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def in_a_process(work: Callable[[], Saved]) -> Future[Any]:
    """In the place of `in_background`: `work` in a forked process, which a thread waits for."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.nice(5)
            work()
            code = 0
        finally:
            os._exit(code)
    future: Future[Any] = Future()

    def wait() -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        newest = max(Path(work.func.__self__.store.root).glob("step-*"))  # type: ignore[attr-defined]
        future.set_result(Saved(newest)) if code == 0 else future.set_exception(RuntimeError(f"the process ended with {code}"))

    threading.Thread(target=wait).start()
    return future


@contextmanager
def writing(way: str, durations: list[float]) -> Iterator[None]:
    """Let the callback write in a certain way, and note how long each save takes to be durable."""

    def noted(work: Any) -> Future[Any]:
        began = time.perf_counter()
        future = (in_a_process if way == "process" else in_background)(work)
        future.add_done_callback(lambda _: durations.append(time.perf_counter() - began))
        return future

    before, product.in_background = product.in_background, noted
    try:
        yield
    finally:
        product.in_background = before


def measure(parameters: int, rounds: int, directory: Path, way: str) -> Found:
    """Seconds of the training's waiting and of a copy for each save, the first one apart; seconds of each step."""
    torch.manual_seed(0)
    rows = torch.randn(64, LAYER)
    config = TrainingConfig(
        max_duration=f"{EVERY * (rounds + 1) + 1}st",
        per_device_batch_size=4,
        output_dir=directory,
        run_name=way,
        standard_callbacks=False,
        log_interval="1000st",
        precision="fp32",
        scheduler="constant",
        distributed="fsdp" if WORLD > 1 else "none",
        device="cpu",
    )
    saving = Timed(every=f"{EVERY}st", keep_last=1, asynchronous=way != "synchronous", save_at_end=False)
    watch, durable = Measure(saving), list[float]()
    with writing(way, durable):
        model = Layers(parameters)
        given: dict[str, Any] = {"loss": nn.MSELoss(), "callbacks": [saving, watch]}
        given["optimizer"] = torch.optim.AdamW(model.parameters(), fused=True)  # without memory of its own for each step
        trainer = Trainer(model, config, TensorDataset(rows, rows), **given)
        trainer.train()
    found = watch.found
    first, *found["stall"] = found["stall"]
    found |= {"first": [first], "durable": durable[1:] or found["stall"], "copy": found["copy"][1:]}
    worst = trainer.ctx.strategy.gather({name: found[name] for name in ("stall", "first", "copy")})
    return found | {name: [max(values) for values in zip(*(w[name] for w in worst), strict=True)] for name in worst[0]}


def table(found: dict[str, Found]) -> str:
    """The medians as Markdown."""
    middle = {way: {name: statistics.median(values) for name, values in one.items()} for way, one in found.items()}
    rows = [
        ("in the background, by a thread (the callback's way)", "thread", "stall"),
        ("the same, the first save of the run", "thread", "first"),
        ("in the background, by a process", "process", "stall"),
        ("at once", "synchronous", "stall"),
        ("thread: durable after", "thread", "durable"),
        ("process: durable after", "process", "durable"),
    ]
    size = middle["thread"]["size"]
    divided = f" in each of {WORLD} processes, FSDP" if WORLD > 1 else ""
    lines = [f"State: {size / 1e9:.2f} GB{divided}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads of torch.", ""]
    lines += ["| the training waits | seconds | a plain copy in the same run | ratio |", "|---|---:|---:|---:|"]
    for text, way, name in rows:
        value, copy = middle[way][name], middle[way]["copy"]
        lines.append(f"| {text} | {value:.3f} | {copy:.3f} | {value / copy:.2f} |")
    lines += ["", "| a step while a save is written | seconds | alone | ratio |", "|---|---:|---:|---:|"]
    for way in ("thread", "process"):
        beside, alone = (middle[way].get(f"step {which}", float("nan")) for which in ("beside", "alone"))
        lines.append(f"| by a {way} | {beside:.3f} | {alone:.3f} | {beside / alone:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description="measure how long a save keeps the training waiting")
    parser.add_argument("--parameters", type=float, default=100e6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()), help="where to write; by default where TMPDIR says"
    )
    given = parser.parse_args(arguments)
    job = os.environ.get("TORCHELASTIC_RUN_ID", "") + os.environ.get("MASTER_PORT", "") or str(os.getpid())
    directory = given.directory / f"checkpoint-stall-{job}"
    try:
        found = {way: measure(int(given.parameters), given.rounds, directory, way) for way in WAYS}
    finally:
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(directory, ignore_errors=True)
    return table(found)


if __name__ == "__main__":
    text = main()
    if os.environ.get("RANK", "0") == "0":
        print(text)
