"""bf16 autocast against fp32 on this machine: tokens per second in one interleaved run, and the loss where both end.

    python tests/benchmarks/precision_cpu.py [--seeds 3] [--steps 120]

The two runs take turns of a few steps, so that whatever else the machine does hits both alike; each turn is one measurement,
and the table gives their median. The losses are those on held-out text after the same steps from the same weights and data;
they are the same within seed noise when the difference of their means is below two of its standard errors.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from drivetrain import Trainer, TrainingConfig

PRECISIONS = ("fp32", "bf16")


def trainer(precision: str, seed: int, given: argparse.Namespace) -> Trainer:
    """A small GPT over bytes of Python's standard library."""
    text = {"use": "text", "context": given.context, "max_bytes": given.max_bytes}
    config = TrainingConfig(
        seed=seed,
        precision=precision,
        device="cpu",
        model={"use": "gpt", "layers": given.layers, "heads": 4, "width": given.width, "context": given.context},
        data=text,
        optimizer={"use": "adamw", "lr": given.lr, "betas": [0.9, 0.95], "weight_decay": 0.1},
        scheduler={"use": "linear", "warmup": "10%"},
        max_duration=f"{given.steps}st",
        per_device_batch_size=given.batch,
        per_device_eval_batch_size=32,
        eval_interval=None,
        log_interval=f"{given.steps}st",
        standard_callbacks=False,
    )
    return Trainer(None, config)


def turns(steps: Iterator[Any], length: int) -> Iterator[float]:
    """Take `length` steps each time the next value is asked for; gives the seconds they took."""
    while True:
        began = time.perf_counter()
        for _ in range(length):
            step = next(steps, None)
            if step is None:
                return
        yield time.perf_counter() - began


def interleaved(seed: int, given: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Train both, a turn of one after a turn of the other; returns seconds of each turn and the losses on held-out text."""
    trainers = {name: trainer(name, seed, given) for name in PRECISIONS}
    running = {name: turns(made.steps(), given.turn) for name, made in trainers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    for index in range(given.steps // given.turn):
        for name in PRECISIONS if index % 2 else PRECISIONS[::-1]:
            seconds[name].append(next(running[name]))
    for turn in running.values():
        next(turn, None)  # to the run's end
    return {name: s[1:] for name, s in seconds.items()}, {name: made.evaluate()["eval/loss"] for name, made in trainers.items()}


def table(seconds: dict[str, list[float]], losses: dict[str, list[float]], given: argparse.Namespace) -> str:
    """Markdown, with the ratio and what it may be called."""
    tokens = given.batch * given.context * given.turn
    speed = {name: [tokens / s for s in turns_of] for name, turns_of in seconds.items()}
    middle = {name: statistics.median(values) for name, values in speed.items()}
    rows = [
        f"| {name} | {middle[name]:,.0f} | {middle[name] / middle['fp32']:.2f} | {statistics.mean(losses[name]):.4f} "
        f"± {noise(losses[name]):.4f} |"
        for name in PRECISIONS
    ]
    pairs = sorted(a / b for a, b in zip(seconds["fp32"], seconds["bf16"], strict=True))
    low, high = pairs[len(pairs) // 4], pairs[-1 - len(pairs) // 4]
    difference = statistics.mean(losses["bf16"]) - statistics.mean(losses["fp32"])
    error = math.hypot(*(noise(losses[name]) / math.sqrt(given.seeds) for name in PRECISIONS))
    verdict = "within" if abs(difference) <= 2 * error else "unknown against" if math.isnan(error) else "beyond"
    size = f"{given.layers} layers, width {given.width}, context {given.context}, batch {given.batch}"
    return "\n".join(
        [
            "| precision | tokens/s | × fp32 | held-out loss, mean ± deviation over seeds |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            f"GPT of {size}; {given.seeds} seeds × {given.steps} steps, {len(pairs)} pairs of turns of {given.turn} steps; "
            f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}.",
            f"ratio of adjacent turns: median {statistics.median(pairs):.2f}, quartiles {low:.2f} to {high:.2f}",
            f"loss: bf16 − fp32 = {difference:+.4f}, {verdict} seed noise (two standard errors: {2 * error:.4f})",
        ]
    )


def noise(values: list[float]) -> float:
    """The deviation over seeds; not a number for one seed."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 4), ("width", 512), ("context", 128), ("batch", 8), ("steps", 120), ("turn", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--max-bytes", type=int, default=1_000_000, help="of the text to train on, and of that held out")
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    losses: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    for seed in range(given.seeds):
        took, ended = interleaved(seed, given)
        for name in PRECISIONS:
            seconds[name] += took[name]
            losses[name].append(ended[name])
    print(table(seconds, losses, given))


if __name__ == "__main__":
    main()
