"""How near the planned time of a step comes to the real one on this CPU, after calibration.

    OMP_NUM_THREADS=1 python tests/benchmarks/plan_time.py

As a person would: `drivetrain plan --calibrate --device cpu` keeps this machine's profile, and `drivetrain plan FILE --json` takes it.
Calibrating and training take turns, so that what else the machine does meets both alike; of each the least is taken. Ends with 1 when
an estimate is off by more than 25 %. For a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from drivetrain import Trainer, TrainingConfig

TEXT = argparse.__file__  # some text to train on, the same for every process
SIZES = {"2 × 64": (2, 64), "4 × 128": (4, 128), "4 × 256": (4, 256)}
ROUNDS, STEPS, LIMIT = 3, 6, 0.25


def configuration(layers: int, width: int) -> TrainingConfig:
    """A small GPT in fp32."""
    return TrainingConfig(
        model={"use": "gpt", "layers": layers, "width": width, "heads": 4},
        data={"use": "text", "path": TEXT, "held_out": 0},
        precision="fp32",
        max_duration="1000st",
        device="cpu",
        distributed="none",
        standard_callbacks=False,
        eval_interval=None,
        output_dir=tempfile.gettempdir(),
    )


def drivetrain(home: Path, *arguments: str) -> str:
    """What the program prints, with its calibrated profile under `home`."""
    command = [sys.executable, "-m", "drivetrain_cli", *arguments]
    environment = os.environ | {"XDG_CONFIG_HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"drivetrain {' '.join(arguments)}: {done.stderr[-2000:]}")
    return done.stdout


def estimated(home: Path, size: tuple[int, int]) -> float:
    """Seconds of a step that the program plans on this machine."""
    file = home / "run.toml"
    configuration(*size).save(file)
    return float(json.loads(drivetrain(home, "plan", str(file), "--json"))["step_seconds"]["likely"])


def trained(config: TrainingConfig) -> float:
    """Seconds of the fastest of some steps."""
    times = []
    began = time.perf_counter()
    for step in Trainer(args=config).steps():
        now = time.perf_counter()
        times.append(now - began)
        began = now
        if step.number > STEPS:
            break
    return min(times[1:])


def compared(rounds: int = ROUNDS) -> dict[str, tuple[float, float]]:
    """Estimate and truth by size, the least of each."""
    found = {name: (float("inf"), float("inf")) for name in SIZES}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            drivetrain(home, "plan", "--calibrate", "--device", "cpu")
            for name, size in SIZES.items():
                estimate, truth = found[name]
                found[name] = (min(estimate, estimated(home, size)), min(truth, trained(configuration(*size))))
    return found


def main() -> int:
    """Print the table; 1 when an estimate is off by more than the limit."""
    found = compared()
    print("| layers × width | estimated ms | measured ms | |\n|---|---|---|---|")
    for name, (estimate, truth) in found.items():
        print(f"| {name} | {1e3 * estimate:.1f} | {1e3 * truth:.1f} | {estimate / truth - 1:+.0%} |")
    return 1 if any(abs(estimate / truth - 1) > LIMIT for estimate, truth in found.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
