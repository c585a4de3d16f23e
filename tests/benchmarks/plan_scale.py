"""How long a plan of a large model takes, and how much memory, as a table for docs/plan.md.

    OMP_NUM_THREADS=1 python tests/benchmarks/plan_scale.py

Models of Llama 3.1's shapes, built by transformers from a configuration alone, under FSDP with selective checkpointing. Each is planned
in a process of its own, whose seconds and largest memory are the system's own account. Ends with 1 when one takes 60 s or 6 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

from drivetrain import TrainingConfig

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
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
MODELS = {"8B": LLAMA_8B, "70B": LLAMA_70B}
RANKS = (8, 256, 1024)
SECONDS, MEMORY = 60.0, 6 * 2**30


def configuration(model: dict[str, Any]) -> TrainingConfig:
    """What is planned."""
    return TrainingConfig(
        model={"use": "transformers", "config": model, "from_scratch": True},
        data={"use": "text", "path": TEXT, "context": 8192, "held_out": 0},
        max_duration="1000st",
        per_device_batch_size=1,
        precision="bf16",
        distributed="fsdp",
        activation_checkpointing="selective",
        output_dir=tempfile.gettempdir(),
    )


def planned(name: str, ranks: int) -> dict[str, float]:
    """Plan in a process of its own: seconds as on the wall and of the processor, bytes at the process's peak, and what was planned."""
    command = [sys.executable, __file__, "--worker", name, str(ranks)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise SystemExit(f"{name} on {ranks}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def work(name: str, ranks: str) -> None:
    """The process that plans."""
    warnings.simplefilter("ignore")
    began = time.monotonic()
    from drivetrain_plan import plan

    found = plan(configuration(MODELS[name]), int(ranks), "h100")
    if found.simulation.problems or found.ranks != int(ranks):
        raise SystemExit(f"{name} on {ranks}: {found.simulation.problems}")
    used = resource.getrusage(resource.RUSAGE_SELF)
    result = {
        "seconds": time.monotonic() - began,
        "cpu": used.ru_utime + used.ru_stime,
        "memory": used.ru_maxrss * 1024,
        "parameters": found.simulation.parameters,
        "peak": found.simulation.peak,
    }
    print(json.dumps(result))


def main() -> int:
    """Print the table; 1 when a limit is passed."""
    wrong = 0
    print("| model | parameters | ranks | seconds | of the processor | memory of the process | planned peak of a rank |")
    print("|---|---|---|---|---|---|---|")
    for name in MODELS:
        for ranks in RANKS:
            took = planned(name, ranks)
            wrong += took["seconds"] >= SECONDS or took["memory"] >= MEMORY
            print(
                f"| {name} | {took['parameters'] / 1e9:.1f} G | {ranks:,} | {took['seconds']:.0f} | {took['cpu']:.0f} "
                f"| {took['memory'] / 2**30:.2f} GiB | {took['peak'] / 2**30:.1f} GiB |",
                flush=True,
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(work(*sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main())
