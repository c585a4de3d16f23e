"""How near `drivetrain plan` comes to the memory that runs really take, as a table for docs/plan.md.

    OMP_NUM_THREADS=1 python tests/benchmarks/plan_memory.py

Each configuration is planned, then trained for three steps in real processes (gloo on this machine). Parameters, gradients and
optimizer state are counted from the tensors of rank 0. What forward leaves for backward, and the peak, are the allocator's own
numbers: the profiler's memory events of the third step, which know nothing of the plan's way of counting. Activations are what forward
leaves without the batch and without what FSDP has gathered, both counted from the tensors that are there. Ends with 1 when one estimate
is off by more than the limits: 1 % for what is counted, 15 % for the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from drivetrain import Callback, CallbackContext, Trainer, TrainingConfig, component

TEXT = argparse.__file__  # some text to train on, the same for every process
MODEL = {"use": "gpt", "layers": 4, "width": 256, "heads": 4, "context": 256}
LORA = {"use": "qlora", "r": 8, "quantize": False}
CONFIGURATIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "activation checkpointing": (1, {"activation_checkpointing": True}),
    "selective checkpointing": (1, {"activation_checkpointing": "selective"}),
    "two microbatches": (1, {"gradient_accumulation_steps": 2}),
    "adamw_8bit": (1, {"optimizer": "adamw_8bit"}),
    "LoRA": (1, {"training_mode": LORA}),
    "QLoRA, bf16": (1, {"training_mode": {"use": "qlora", "r": 8}, "precision": "bf16"}),
    "ddp, 2 ranks": (2, {"distributed": "ddp"}),
    "fsdp, 2 ranks": (2, {"distributed": "fsdp"}),
    "fsdp, 4 ranks": (4, {"distributed": "fsdp"}),
    "fsdp, 2 ranks, checkpointing": (2, {"distributed": "fsdp", "activation_checkpointing": True}),
    "fsdp, 4 ranks, bf16": (4, {"distributed": "fsdp", "precision": "bf16"}),
    "fsdp, 2 ranks, two microbatches": (2, {"distributed": "fsdp", "gradient_accumulation_steps": 2}),
    "hsdp, 2 × 2 ranks": (4, {"distributed": {"use": "fsdp", "shards": 2}}),
    "fsdp × tensor parallel, 2 × 2 ranks": (4, {"distributed": {"use": "fsdp", "tensor_parallel": {"size": 2}}}),
}
KINDS = ("parameters", "gradients", "optimizer state", "activations", "held for backward", "peak")
LIMITS = dict.fromkeys(KINDS[:3], 0.01) | dict.fromkeys(KINDS[3:], 0.15)


def configuration(name: str) -> TrainingConfig:
    """What is planned and trained."""
    table: dict[str, Any] = {
        "model": MODEL,
        "data": {"use": "text", "path": TEXT, "context": 256, "held_out": 0},
        "per_device_batch_size": 4,
        "precision": "fp32",
        "distributed": "none",
        "max_duration": "3st",
        "device": "cpu",
        "standard_callbacks": False,
        "eval_interval": None,
        "output_dir": tempfile.gettempdir(),
    }
    return TrainingConfig.from_table(table | CONFIGURATIONS[name][1])


def storages(tensors: Any) -> dict[int, int]:
    """Bytes by storage of what this process holds of some tensors, constants of quantized ones included."""
    found = {}
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        state = getattr(tensor, "quant_state", None)
        constants = [x for part in (state, getattr(state, "state2", None)) if part is not None for x in vars(part).values()]
        for each in [local, *(x for x in constants if isinstance(x, torch.Tensor))]:
            found[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return found


@component
class Measure(Callback):
    """Counts tensors, and follows the allocator through the third step."""

    def __attrs_post_init__(self) -> None:
        self.found: dict[str, int] = {}

    def on_step_start(self, ctx: CallbackContext) -> None:
        if ctx.step == 2:
            self._base = sum(storages([*ctx.model.parameters(), *ctx.model.buffers(), *self._state(ctx)]).values())
            self._own = set(storages(ctx.model.parameters()))
            self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profiler.__enter__()

    def on_loss(self, ctx: CallbackContext) -> None:
        if ctx.step == 2 and ctx.microbatch == 0:
            with record_function("forward is done"):
                pass
            batch = ctx.batch.values() if isinstance(ctx.batch, dict) else ctx.batch
            gathered = {place: size for place, size in storages(ctx.model.parameters()).items() if place not in self._own}
            self._beside = sum(storages(batch).values()) + sum(gathered.values())

    def on_backward(self, ctx: CallbackContext) -> None:
        grads = [p.grad for group in ctx.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.found["gradients"] = sum(storages(grads).values())

    def on_step_end(self, ctx: CallbackContext) -> None:
        if ctx.step != 3:
            return
        self._profiler.__exit__(None, None, None)
        self.found["parameters"] = sum(storages(ctx.model.parameters()).values())
        self.found["optimizer state"] = sum(storages(self._state(ctx)).values())
        bucket = self.found["gradients"] if ctx.strategy.name == "ddp" else 0  # there from the start
        self.found["held for backward"], rise = self._followed()
        self.found["activations"] = self.found["held for backward"] - self._beside
        self.found["peak"] = self._base + bucket + rise

    def _state(self, ctx: CallbackContext) -> list[torch.Tensor]:
        entries = [x for state in ctx.optimizer.state.values() for x in state.values()]
        return [x for x in entries if isinstance(x, torch.Tensor)]

    def _followed(self) -> tuple[int, int]:
        results = self._profiler.profiler.kineto_results  # type: ignore[union-attr]
        events = sorted(results.events(), key=lambda event: event.start_ns())
        now = held = peak = 0
        for event in events:
            if event.name() == "forward is done":
                held = now
            elif event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        return held, peak


def measured(name: str) -> dict[str, int]:
    """Train for real, in processes of their own; rank 0's numbers."""
    ranks = CONFIGURATIONS[name][0]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        launched = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} if ranks > 1 else {} for rank in range(ranks)]
        command = [sys.executable, __file__, "--worker", name, str(output)]
        workers = [subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | env) for env in launched]
        if [code for worker in workers if (code := worker.wait(timeout=900))]:
            raise SystemExit(f"{name}: training failed")
        return json.loads(output.read_text())


def measured_here(name: str) -> dict[str, int]:
    """The same of one process, in this one."""
    measure = Measure()
    Trainer(args=configuration(name), callbacks=[measure]).train()
    return measure.found


def work(name: str, output: str) -> None:
    """One process of the real run."""
    measure = Measure()
    trainer = Trainer(args=configuration(name), callbacks=[measure])
    trainer.train()
    if trainer.ctx.is_main:
        Path(output).write_text(json.dumps(measure.found))


def planned(name: str) -> dict[str, int]:
    """The same numbers without a run."""
    from drivetrain_plan import plan

    found = plan(configuration(name), CONFIGURATIONS[name][0], "cpu").simulation
    if found.problems:
        raise SystemExit(f"{name}: {found.problems}")
    kinds = {kind: found.largest.get(kind, 0) for kind in KINDS[:4]}
    return kinds | {"held for backward": found.held, "peak": found.peak}


def main() -> int:
    """Print the table; 1 when a limit is passed."""
    warnings.simplefilter("ignore")
    chosen, wrong = sys.argv[1:] or list(CONFIGURATIONS), 0
    print("| configuration | " + " | ".join(KINDS) + " |")
    print("|---" * (len(KINDS) + 1) + "|")
    for name in chosen:
        estimate, truth = planned(name), measured(name)
        off = {kind: estimate[kind] / truth[kind] - 1 for kind in KINDS}
        wrong += any(abs(off[kind]) > LIMITS[kind] for kind in KINDS)
        cells = [f"{estimate[kind]:,} / {truth[kind]:,} ({off[kind]:+.1%})" for kind in KINDS]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(work(*sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main())
