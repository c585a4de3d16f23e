"""What is written about an anomaly."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import asdict, frozen

from drivetrain import ModelError, RunError

if TYPE_CHECKING:
    from drivetrain import CallbackContext

EVENTS_FILE = "events.jsonl"


class AnomalyError(ModelError, RunError):
    """An anomaly that ends the run, with nothing wrong in what was asked for."""


@frozen
class Anomaly:
    """One bad step: where it was, what was found, and the samples of all ranks that fed it (None for streams)."""

    kind: str
    step: int
    epoch: int
    window: int
    loss: float
    grad_norm: float
    tensor: str
    samples: list[int] | None
    left_out: bool = True  # whether its update was

    def __str__(self) -> str:
        what = "NaN or infinity" if self.kind == "nonfinite" else "a spike"
        return (
            f"{what} in {self.tensor} at step {self.step} (epoch {self.epoch}, window {self.window}): "
            f"loss {self.loss:g}, gradient norm {self.grad_norm:g}"
        )


def samples_of(ctx: CallbackContext, epoch: int, window: int) -> list[int] | None:
    """The indices of a window's samples."""
    order = ctx.sample_order
    return None if order is None else [int(index) for index in order.step(epoch, window)]


def append(run_dir: Path, anomaly: Anomaly, policy: str, did: str) -> None:
    """Add a line to `events.jsonl`: {"event": "anomaly", "time": …, "policy": …, "did": …} and the anomaly's own values."""
    row = {"event": "anomaly", "time": round(time.time(), 3), "policy": policy, "did": did}
    row |= {key: _in_json(value) for key, value in asdict(anomaly).items() if key != "left_out"}
    with open(run_dir / EVENTS_FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def _in_json(value: Any) -> Any:
    """JSON has no NaN and no infinity; they are texts, which `float()` reads."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
