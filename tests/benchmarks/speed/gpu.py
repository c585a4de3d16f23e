"""(g): language models of published shapes on a GPU: tokens per second, MFU and peak memory, in turns with other engines.

    python tests/benchmarks/speed/gpu.py [--shapes gpt2-124m gpt2-350m llama-1b llama-1b-qlora] [--rounds 5] [--out FOLDER]
    python tests/benchmarks/speed/gpu.py --toy       a try on a CPU whether everything runs

bf16 autocast, fused AdamW, each block compiled, the same batches for all. MFU counts 6 N + 12 L d T FLOP for a token (llm.c's and
PaLM's convention, attention not halved for causality) against the device's dense bf16 peak without sparsity. With QLoRA (the base in
four bits, adapters of rank 16) nothing is compiled, and there is no MFU: frozen weights have no gradients to count.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from engines import BASE, Engine, summary
from report import environment, markdown, plot, save
from task import Task

GPU = Task(model="gpt", bf16=True, compiled=True, device="cuda", steps=60, warmup=20, lr=3e-4)
SHAPES: dict[str, Task] = {
    "gpt2-124m": replace(GPU, layers=12, width=768, heads=12, context=1024, vocabulary=50304, batch=16),
    "gpt2-350m": replace(GPU, layers=24, width=1024, heads=16, context=1024, vocabulary=50304, batch=8),
    "llama-1b": replace(GPU, model="llama", layers=16, width=2048, heads=32, context=2048, vocabulary=128256, batch=4),
}
SHAPES["llama-1b-qlora"] = replace(SHAPES["llama-1b"], qlora=True, compiled=False)
NAMES = [BASE, "drivetrain", "accelerate", "lightning", "hf"]
# Dense bf16 FLOP/s without sparsity, from the makers' data sheets; the first name found in the device's counts.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "MI300X": 1307e12}


def peak_flops(device: str) -> float | None:
    """Of the first GPU; None when it is not in the table, and for a CPU."""
    if device == "cpu":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def flops_per_token(parameters: int, task: Task) -> int:
    """6 N + 12 L d T, with N without the position table and the input embedding, which do no products."""
    dense = parameters - task.vocabulary * task.width - (task.context * task.width if task.model == "gpt" else 0)
    return 6 * dense + 12 * task.layers * task.width * task.context


def measure(name: str, task: Task, names: list[str], rounds: int) -> dict[str, Any]:
    """One engine at a time has the device: each in a process that ends before the next begins, several rounds of them."""
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in names}
    versions: dict[str, str] = {}
    for turn in range(rounds):
        for engine in names[turn % len(names) :] + names[: turn % len(names)]:
            running = Engine(engine, 4, *(("bitsandbytes", "peft") if task.qlora else ()))
            versions |= running.versions
            try:
                found[engine].append(running.train(task))
            finally:
                running.close()
    peak = peak_flops(task.device)
    rows = {}
    for engine, turns in found.items():
        row = summary(turns, found[BASE], task)
        flops = flops_per_token(turns[0]["parameters"], task) * row["per_second"]
        memory = turns[0]["peak_bytes"]
        rows[engine] = row | {
            "mfu": flops / peak if peak and not task.qlora else None,
            "peak_gib": memory / 2**30 if memory else None,
        }
    title = f"{name}, bf16, {'compiled, ' if task.compiled else ''}{task.batch} × {task.context} tokens"
    return {"part": name, "title": title, "rounds": rounds, "task": asdict(task), "versions": versions, "rows": rows}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--engines", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    given = parser.parse_args()
    if not given.toy and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --toy tries the script on a CPU")
    for name in given.shapes:
        task = SHAPES[name]
        if given.toy:
            small = {
                "layers": 2,
                "width": 64,
                "heads": 4,
                "context": 32,
                "vocabulary": 512,
                "batch": 2,
                "steps": 6,
                "warmup": 2,
            }
            task = replace(task, device="cpu", compiled=False, **small)
        names = list(dict.fromkeys([BASE, *given.engines]))
        result = measure(name, task, names, 1 if given.toy else given.rounds) | {"environment": environment()}
        save(given.out, name, result)
        print(markdown(result), flush=True)
        for engine, row in result["rows"].items():
            if row["peak_gib"] is not None:
                utilisation = f"MFU {100 * row['mfu']:.1f} %, " if row["mfu"] else ""
                print(f"{engine}: {utilisation}peak {row['peak_gib']:.1f} GiB", flush=True)
        plot(given.out / f"{name}.png", result)


if __name__ == "__main__":
    main()
