"""bf16 autocast against fp32 on this machine: tokens per second in one interleaved run, and the loss where both end.

    python tests/benchmarks/precision_cpu.py                          # the GPTs of the quickstart and of engines.py, and a larger one
    python tests/benchmarks/precision_cpu.py --model quickstart --json precision.json --document docs/benchmarks.md
    python tests/benchmarks/precision_cpu.py --widths                 # by the size of matrices: what `precision = "auto"` goes by

The two runs take turns of a few steps, so that whatever else the machine does hits both alike; each turn is one measurement,
and the table gives their median. The losses are those on held-out text after the same steps from the same weights and data;
they are the same within seed noise when the difference of their means is below two of its standard errors. The JSON file has every
turn's seconds, so that a table can be made from it again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drivetrain import Trainer, TrainingConfig

PRECISIONS = ("fp32", "bf16")
MODELS = {  # "quickstart" is that of docs/examples/quickstart.toml
    "quickstart": {"layers": 4, "width": 128, "context": 128, "batch": 8, "lr": 4e-3},
    "small": {"layers": 4, "width": 256, "context": 128, "batch": 8, "lr": 2e-3},
    "larger": {"layers": 8, "width": 512, "context": 256, "batch": 8, "lr": 1e-3},
    "toy": {"layers": 1, "width": 32, "context": 16, "batch": 2, "lr": 1e-3},
}
_START, _END = "<!-- precision on a CPU -->", "<!-- end of precision on a CPU -->"


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
        callbacks=["gc"],  # which keeps memory from step to step, as in a run that is not told otherwise
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


def summary(seconds: dict[str, list[float]], losses: dict[str, list[float]], given: argparse.Namespace) -> dict[str, Any]:
    """What was measured as plain data: speeds, ratio, losses, the machine, and every turn."""
    tokens = given.batch * given.context * given.turn
    pairs = sorted(a / b for a, b in zip(seconds["fp32"], seconds["bf16"], strict=True))
    difference = statistics.mean(losses["bf16"]) - statistics.mean(losses["fp32"])
    error = math.hypot(*(noise(losses[name]) / math.sqrt(given.seeds) for name in PRECISIONS))
    return {
        "model": {key: getattr(given, key) for key in ("name", "layers", "width", "context", "batch", "lr")},
        "runs": {key: getattr(given, key) for key in ("seeds", "steps", "turn")},
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "bf16": bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "torch": str(torch.__version__),
        },
        "tokens_per_second": {name: statistics.median(tokens / s for s in seconds[name]) for name in PRECISIONS},
        "ratio": {
            "median": statistics.median(pairs),
            "quartiles": [pairs[len(pairs) // 4], pairs[-1 - len(pairs) // 4]],
            "pairs": len(pairs),
        },
        "loss": {name: {"mean": statistics.mean(v), "deviation": noise(v)} for name, v in losses.items()},
        "loss_difference": {"bf16 - fp32": difference, "two_standard_errors": 2 * error},
        "seconds": seconds,
        "losses": losses,
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each model, and how they were measured."""
    lines = [
        "| GPT | fp32, tokens/s | bf16, tokens/s | bf16 × fp32 (quartiles) | held-out loss, fp32 | bf16 | difference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        model, speed, ratio, loss = one["model"], one["tokens_per_second"], one["ratio"], one["loss"]
        difference, error = one["loss_difference"].values()
        verdict = "unknown" if math.isnan(error) else "within noise" if abs(difference) <= error else "beyond noise"
        size = f"{model['layers']} × {model['width']}, context {model['context']}, batch {model['batch']}"
        ends = [f"{loss[name]['mean']:.4f} ± {loss[name]['deviation']:.4f}" for name in PRECISIONS]
        low, high = ratio["quartiles"]
        lines.append(
            f"| {model['name']}: {size} | {speed['fp32']:,.0f} | {speed['bf16']:,.0f} | {ratio['median']:.2f} ({low:.2f} to {high:.2f}) "
            f"| {ends[0]} | {ends[1]} | {difference:+.4f}, {verdict} ({error:.4f}) |"
        )
    runs, machine = found[-1]["runs"], found[-1]["machine"]
    lines += [
        "",
        f"{runs['seeds']} seeds × {runs['steps']} steps in turns of {runs['turn']}; the losses' ± is their deviation over seeds, noise "
        f"two standard errors of their difference. {machine['threads']} threads, load {machine['load']:.1f}, torch {machine['torch']}, "
        f"bfloat16 {'in hardware' if machine['bf16'] else 'emulated'}.",
    ]
    return "\n".join(lines)


def write(document: Path, text: str) -> None:
    """Put the text between the document's marks, which are added at its end where they are missing."""
    before = document.read_text(encoding="utf-8") if document.is_file() else ""
    if _START not in before:
        before = f"{before.rstrip()}\n\n{_START}\n{_END}\n".lstrip()
    first, _, rest = before.partition(_START)
    document.write_text(f"{first}{_START}\n\n{text}\n\n{_END}{rest.partition(_END)[2]}", encoding="utf-8")


def noise(values: list[float]) -> float:
    """The deviation over seeds; not a number for one seed."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """Train one model with every seed."""
    seconds: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    losses: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    for seed in range(given.seeds):
        took, ended = interleaved(seed, given)
        for name in PRECISIONS:
            seconds[name] += took[name]
            losses[name].append(ended[name])
    return summary(seconds, losses, given)


def by_width(turns: int = 15) -> str:
    """Forward and backward of four layers of one width on one thread: fp32's processor time over bf16's, as a table."""
    lines = ["| width | numbers in a matrix | 32 rows | 256 rows |", "| ---: | ---: | ---: | ---: |"]
    torch.set_num_threads(1)
    for width in (64, 128, 256, 512, 1024):
        model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(width, width), nn.Tanh())))
        ratios = [_ratio(model, torch.randn(rows, width), max(2, 5000 // width), turns) for rows in (32, 256)]
        lines.append(f"| {width} | {width * width:,} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    return "\n".join(lines)


def _ratio(model: nn.Module, inputs: torch.Tensor, steps: int, turns: int) -> float:
    """Of the quietest of turns that alternate."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(turns):
        for cast, took in seconds.items():
            began = time.process_time()
            for _ in range(steps):
                with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                    outputs = model(inputs)
                outputs.float().square().mean().backward()
                model.zero_grad()
            took.append(time.process_time() - began)
    return min(seconds[False]) / min(seconds[True])


def main(arguments: list[str] | None = None) -> None:
    """Run, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="by default quickstart, small and larger")
    for name in ("layers", "width", "context", "batch"):
        parser.add_argument(f"--{name}", type=int, help="in place of the model's")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--turn", type=int, default=4, help="steps at a time")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--max-bytes", type=int, default=1_000_000, help="of the text to train on, and of that held out")
    parser.add_argument("--json", type=Path, help="where to write everything that was measured")
    parser.add_argument("--document", type=Path, help="a page to write the table into")
    parser.add_argument("--widths", action="store_true", help="layers of several widths instead")
    given, found = parser.parse_args(arguments), []
    if given.widths:
        print(by_width())
        return
    for model in given.model or ("quickstart", "small", "larger"):
        changed = {key: value for key in MODELS[model] if (value := getattr(given, key)) is not None}
        found.append(measured(argparse.Namespace(**{**vars(given), **MODELS[model], **changed, "name": model})))
    print(table(found))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    if given.document is not None:
        write(given.document, table(found))


if __name__ == "__main__":
    main()
