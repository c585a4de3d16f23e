"""One engine in a process of its own, which trains whenever it is told to and says how long a step took.

python worker.py ENGINE      reads tasks from its input, a line of JSON each, and answers each with one

A task in turns is answered with {"turn": seconds a step} at the end of each, and waits for an empty line before it goes on.
"""

from __future__ import annotations

import contextlib
import cProfile
import importlib
import importlib.metadata
import json
import os
import pstats
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import task as tasks
import torch
from task import Task, Timed, build, held_out_loss

# engine → (module, function, the distributions that it finds installed; none for all)
ENGINES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "raw, tuned": ("raw", "tuned", ("torch", "numpy")),
    "raw, textbook": ("raw", "textbook", ("torch", "numpy")),
    "drivetrain": ("with_drivetrain", "train", ()),
    "drivetrain, watched": ("with_drivetrain", "train_watched", ()),
    "drivetrain, torch's AdamW": ("with_drivetrain", "train_with_torchs", ()),
    "ignite": ("with_ignite", "train", ("pytorch-ignite", "torch", "numpy")),
    "accelerate": ("with_accelerate", "train", ("accelerate", "torch", "numpy")),
    "lightning": ("with_lightning", "train", ("lightning", "torch", "numpy")),
    "hf": ("with_hf", "train", ("transformers", "accelerate", "torch", "numpy")),
}


def answer(train: Callable[[Task], Timed], given: dict[str, Any]) -> dict[str, Any]:
    """Train once; with "count" among the settings, count Python calls instead of seconds."""
    count = given.pop("count", False)
    with tempfile.TemporaryDirectory() as folder:
        if count:
            calls = [calls_of(train, Task(**{**given, "steps": steps, "folder": folder})) for steps in (300, 600)]
            return {"calls_per_step": (calls[1] - calls[0]) / 300}
        task = Task(**given, folder=folder)
        if task.device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        model = train(task)
        whole = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated() if task.device != "cpu" else None
        loss = held_out_loss(model, build(task)[1], task)
        shutil.rmtree(folder, ignore_errors=True)
        os.mkdir(folder)
    size = sum(p.numel() for p in model.parameters())
    found = {
        "seconds_per_step": None if task.turn else model.seconds_per_step,
        "seconds": whole,
        "loss": loss,
        "passes": model.passes,
    }
    return found | {"parameters": size, "peak_bytes": peak}


def calls_of(train: Callable[[Task], Timed], task: Task) -> int:
    """Python function calls of one training; the difference of two lengths is free of setting up."""
    profiler = cProfile.Profile(builtins=False)
    profiler.enable()
    train(task)
    profiler.disable()
    return sum(entry[0] for entry in pstats.Stats(profiler).stats.values())  # type: ignore[attr-defined]


def main() -> None:
    """Serve."""
    module, function, distributions = ENGINES[sys.argv[1]]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    out = os.fdopen(os.dup(1), "w")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        engine = importlib.import_module(module)
        named = distributions or ("drivetrain-core", "torch")
        versions = {name: importlib.metadata.version(name) for name in named if name != "numpy"}
        print(json.dumps({"versions": versions}), file=out, flush=True)

        def hand_over(seconds: float | None) -> None:
            print(json.dumps({"turn": seconds}), file=out, flush=True)
            sys.stdin.readline()

        tasks.hand_over = hand_over
        while line := sys.stdin.readline():
            try:
                result = answer(getattr(engine, function), json.loads(line))
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main()
