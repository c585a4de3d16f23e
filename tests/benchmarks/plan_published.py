"""Whether the planned bounds contain throughput that others have published, as a table for docs/plan.md.

    OMP_NUM_THREADS=1 python tests/benchmarks/plan_published.py

Models are built by transformers from a configuration alone; microbatches are those of the sources. Ends with 1 when a published number
lies outside of the bounds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from typing import Any

from attrs import evolve

from drivetrain import TrainingConfig
from drivetrain_plan import DeviceProfile, load_profile, plan

TEXT = argparse.__file__  # some text to train on, the same for every process
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def titans_h100() -> DeviceProfile:
    """Of torchtitan's source, "Hardware": 96 GB of HBM2e at 2.4 TB/s, 500 W; its footnote 2: a peak between those of SXM (989
    TFLOP/s) and NVL (835). The former bounds it, the latter is what is usual."""
    h100 = load_profile("h100")
    worst, usual, best = h100.products
    products = (worst * 835 / 989, usual * 835 / 989, best)
    return evolve(h100, name="H100 96 GB, 500 W", memory=96e9, bandwidth=2.4e12, products=products)


def gpt(layers: int, width: int, heads: int, context: int, vocab: int = 50257) -> dict[str, Any]:
    """GPT-2's architecture."""
    sizes = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": context, "vocab_size": vocab}
    return {"model_type": "gpt2", **sizes, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


# name: model, context, ranks, device, changes, published tokens/s of one device, source
TITAN = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3"
FOUNDRY = "llm-foundry, scripts/train/benchmarking/README.md"
_FSDP = {"per_device_batch_size": 2, "activation_checkpointing": "selective", "distributed": "fsdp"}
CASES: dict[str, tuple[dict[str, Any], int, int, str, dict[str, Any], float, str]] = {
    "Llama-3.1-8B, 8 × H100, eager": (LLAMA_8B, 8192, 8, "titan", _FSDP, 5762, TITAN),
    "Llama-3.1-8B, 8 × H100, compiled": (LLAMA_8B, 8192, 8, "titan", {**_FSDP, "compile": True}, 6667, TITAN),
    "Llama-3.1-8B, 128 × H100, eager": (LLAMA_8B, 8192, 128, "titan", _FSDP, 5605, TITAN),
    "Llama-3.1-8B, 128 × H100, compiled": (LLAMA_8B, 8192, 128, "titan", {**_FSDP, "compile": True}, 6514, TITAN),
    "GPT-2 124M, 8 × A100, llm.c": (
        gpt(12, 768, 12, 1024), 1024, 8, "a100",
        {"per_device_batch_size": 64, "distributed": "ddp", "compile": True}, 218_000, "llm.c, discussion 481",
    ),
    "MPT-1B, 8 × H100": (
        gpt(24, 2048, 16, 2048, 50368), 2048, 8, "h100", {"per_device_batch_size": 14, "distributed": "fsdp"}, 45_455, FOUNDRY,
    ),
    "MPT-7B, 8 × H100": (
        gpt(32, 4096, 32, 2048, 50368), 2048, 8, "h100",
        {"per_device_batch_size": 6, "distributed": "fsdp"}, 10_643, FOUNDRY,
    ),
}  # fmt: skip


def rates(name: str) -> tuple[float, float, float]:
    """Tokens/s of one device: at worst, likely, at best."""
    model, context, ranks, device, changes, _, _ = CASES[name]
    config = TrainingConfig(
        model={"use": "transformers", "config": model, "from_scratch": True},
        data={"use": "text", "path": TEXT, "context": context, "held_out": 0},
        max_duration="100st",
        precision="bf16",
        output_dir=tempfile.gettempdir(),
        **changes,
    )
    found = plan(config, ranks, titans_h100() if device == "titan" else device)
    if found.simulation.problems:
        raise SystemExit(f"{name}: {found.simulation.problems}")
    low, likely, high = found.step.total
    return found.rate(high) / ranks, found.rate(likely) / ranks, found.rate(low) / ranks


def main() -> int:
    """Print the table; 1 when a number lies outside of the bounds."""
    warnings.simplefilter("ignore")
    wrong = 0
    print("| run | published tokens/s of one device | at worst | likely | at best | source |\n|---|---|---|---|---|---|")
    for name in sys.argv[1:] or CASES:
        worst, likely, best = rates(name)
        published, source = CASES[name][5:]
        is_inside = worst <= published <= best
        wrong += not is_inside
        told = f"{published:,.0f}{'' if is_inside else ' **(outside)**'}"
        print(f"| {name} | {told} | {worst:,.0f} | {likely:,.0f} | {best:,.0f} | {source} |", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
