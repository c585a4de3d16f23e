"""The precision protocol: in which numbers a model computes. This class is full precision and the base of all others."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn


class Precision:
    """Full precision: compute in the parameters' own type. Subclasses override what they change.

    The loop calls, for each step: `forward` around every forward, `scale` on every loss before its backward, `unscale` once
    before the gradients are looked at, and `step` in place of `optimizer.step()` (or `skip`). An error may end that at any point:
    then it calls `break_off`.
    """

    name = "fp32"
    reason = "full precision"
    dtype: torch.dtype | None = None  # what matrix products compute in; None: the parameters' own
    scales = False  # whether scale/unscale/step must be called; False lets the loop skip them

    def cast(self, model: nn.Module) -> nn.Module:
        """Preparation phase "cast": return the model with its parameters in the type they are stored in."""
        return model

    def forward(self) -> AbstractContextManager[Any] | None:
        """The context of forward and loss, made once and entered again for every microbatch; None for no context."""
        return None

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Called once, when the optimizer has been made."""

    def scale(self, loss: Tensor) -> Tensor:
        """Scale a loss before backward."""
        return loss

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Undo `scale` on the gradients."""

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Update the weights; False when the step was skipped because its gradients overflowed."""
        optimizer.step()
        return True

    def skip(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after `unscale` in place of `step`, for an update that is to change nothing."""

    def break_off(self, optimizer: torch.optim.Optimizer) -> None:
        """Called when a step has failed, at whatever line: be as between two steps again, and forget what it had begun."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume, such as the loss scale."""
        return {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
