"""What one process of the memory test does: prepare a run of docs/examples/qlora.toml, train three steps, and tell its resident memory.

python memory.py FILE [key=value ...]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

from drivetrain import Trainer, load_training_config

MB = 1e6


def resident(field: str) -> float:
    """MB of this process's memory: VmRSS is what it has now, VmHWM the most it had."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / MB


def forget_the_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    file, *overrides = sys.argv[1:]
    config = load_training_config(file, ["max_duration=3st", "standard_callbacks=false", "callbacks=[]", *overrides])
    config.eval_interval = None
    import transformers.modeling_utils  # noqa: F401  what is imported is not the model's

    if config.mode_name == "qlora":
        import drivetrain_qlora.adapt
        import drivetrain_qlora.quantize  # noqa: F401
    torch.ones(8, 8) @ torch.ones(8, 8)
    before = resident("VmRSS")
    forget_the_peak()
    trainer = Trainer(None, config)
    model = trainer.model
    found = {"loading": resident("VmHWM") - before, "held": resident("VmRSS") - before}
    found["parameters"] = sum(p.nbytes for p in model.parameters()) / MB
    forget_the_peak()
    trainer.train()
    found["training"] = resident("VmHWM") - before
    print(json.dumps(found))


if __name__ == "__main__":
    main()
