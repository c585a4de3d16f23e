"""(d): what a listener costs, and what plugins cost that listen to nothing.

    python tests/benchmarks/speed/dispatch.py [--out FOLDER]

An event's bound function is called in a loop with 0 to 50 listeners whose bodies are empty; the slope is the cost of one more listener,
its own call included. Then the tiny MLP's step with 50 plugins that implement no event, against the same without them, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import timeit
from pathlib import Path
from typing import Any

import torch
from report import environment, save
from task import Task, build, data

from drivetrain import Callback, CallbackContext, Trainer, TrainingConfig, component

COUNTS = (0, 1, 5, 20, 50)


@component
class Listening(Callback):
    """Hears the end of each step."""

    def on_step_end(self, ctx: CallbackContext) -> None:
        """Do nothing."""


@component
class Idle(Callback):
    """Hears nothing."""


def trainer(callbacks: list[Callback], steps: int) -> tuple[Trainer, Any]:
    """A run with these callbacks and no others, and its model."""
    task = Task(steps=steps)
    model, loss = build(task)
    config = TrainingConfig(
        max_duration=f"{steps}st",
        per_device_batch_size=task.batch,
        standard_callbacks=False,
        log_interval=f"{steps}st",
        device="cpu",
        precision="fp32",
        optimizer={"use": "adamw", "lr": 1e-3},
    )
    return Trainer(model, config, data(task), loss=loss, callbacks=callbacks), model


def nanoseconds(count: int) -> float:
    """One dispatch of `on_step_end` to so many listeners; without any, the comparison that the loop makes."""
    made, _ = trainer([Listening() for _ in range(count)], 10)
    event, ctx = made.ctx.run.events, made.ctx
    statement = "if event.step_end is not None: event.step_end(ctx)"
    repeats = timeit.repeat(statement, globals={"event": event, "ctx": ctx}, number=20_000, repeat=15)
    return 1e9 * min(repeats) / 20_000


def idle_ratio(rounds: int, steps: int) -> float:
    """Time per step with 50 idle plugins over that without, the median of turns."""
    ratios = []
    for index in range(rounds):
        taken = {}
        for idle in (True, False) if index % 2 else (False, True):
            made, model = trainer([Idle() for _ in range(50)] if idle else [], steps)
            made.train()
            taken[idle] = model.seconds_per_step
        ratios.append(taken[True] / taken[False])
    return statistics.median(ratios)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a few short rounds")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    times = {count: nanoseconds(count) for count in COUNTS}
    slope = statistics.linear_regression([c for c in COUNTS if c], [times[c] for c in COUNTS if c]).slope
    ratio = idle_ratio(2, 100) if given.toy else idle_ratio(15, 2000)
    result = {"nanoseconds": times, "slope": slope, "idle_ratio": ratio, "environment": environment()}
    save(given.out, "dispatch", result)
    print("| listeners | ns for one event |\n| --- | --- |")
    for count, value in times.items():
        print(f"| {count} | {value:.0f} |")
    print(f"\n{slope:.0f} ns for each listener and event; 50 idle plugins: {ratio:.3f} × the step without them.")


if __name__ == "__main__":
    main()
