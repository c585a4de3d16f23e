"""How near the planned time of a step comes to the real one on this CPU, after calibration.

    OMP_NUM_THREADS=1 python tests/benchmarks/plan_time.py

Calibrating and training take turns, so that what else the machine does meets both alike; of each the least is taken.
"""

from __future__ import annotations

import statistics
import tempfile
import time

from drivetrain import Trainer, TrainingConfig
from drivetrain_plan import plan
from drivetrain_plan.calibrate import calibrate

SIZES = {"2 × 64": (2, 64), "4 × 128": (4, 128), "4 × 256": (4, 256)}
ROUNDS, STEPS = 3, 6


def configuration(layers: int, width: int) -> TrainingConfig:
    """A small GPT in fp32."""
    return TrainingConfig(
        model={"use": "gpt", "layers": layers, "width": width, "heads": 4},
        data={"use": "text", "max_bytes": 400_000, "held_out": 0},
        precision="fp32",
        max_duration="1000st",
        device="cpu",
        distributed="none",
        standard_callbacks=False,
        eval_interval=None,
        output_dir=tempfile.gettempdir(),
    )


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


def main() -> None:
    """Print the table."""
    estimates: dict[str, list[float]] = {name: [] for name in SIZES}
    truths: dict[str, list[float]] = {name: [] for name in SIZES}
    for _ in range(ROUNDS):
        device = calibrate()
        for name, size in SIZES.items():
            truths[name].append(trained(configuration(*size)))
            estimates[name].append(plan(configuration(*size), 1, device).step.total.likely)
    print("| layers × width | estimated ms | measured ms | |\n|---|---|---|---|")
    for name in SIZES:
        estimate, truth = statistics.median(estimates[name]), min(truths[name])
        print(
            f"| {name} | {1e3 * estimate:.1f} ({1e3 * min(estimates[name]):.1f}) | {1e3 * truth:.1f} | {estimate / truth - 1:+.0%} |"
        )


if __name__ == "__main__":
    main()
