"""What training gives back."""

from __future__ import annotations

from pathlib import Path

import attrs
from torch import Tensor


class Step:
    """One finished step, as `for step in trainer.steps()` yields it."""

    __slots__ = ("_loss", "epoch", "number")

    def __init__(self, number: int, epoch: int, loss: Tensor) -> None:
        self.number = number
        self.epoch = epoch
        self._loss = loss

    @property
    def loss(self) -> float:
        """The step's mean loss. Reading it waits for the device."""
        return self._loss.item()

    @property
    def loss_tensor(self) -> Tensor:
        """The same as a scalar on the device; reading it waits for nothing."""
        return self._loss

    def __repr__(self) -> str:
        return f"Step(number={self.number}, epoch={self.epoch})"


@attrs.frozen
class TrainOutput:
    """The result of a run.

    Attributes:
        steps: optimizer updates, those before a resume included.
        losses: (step, mean training loss since the previous entry) of this sitting, one for each logging step.
        metrics: the newest logged and evaluated values by name.
        stop_reason: why the run ended.
        completed: whether it ended by reaching `max_duration` or a plugin's decision, not by an interruption.
        seconds: training time, all sittings together.
        run_dir: the run's directory, or None when nothing was written.
        checkpoint: the newest durable checkpoint, or None.
    """

    steps: int
    losses: list[tuple[int, float]] = attrs.field(repr=False)
    metrics: dict[str, float]
    stop_reason: str
    completed: bool
    seconds: float
    run_dir: Path | None
    checkpoint: Path | None

    @property
    def loss(self) -> float:
        """The newest logged training loss; NaN when nothing was logged."""
        return self.losses[-1][1] if self.losses else float("nan")
