"""How the loop calls a model: what a batch may look like and where the loss comes from, without looking at signatures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from drivetrain.errors import ModelError
from drivetrain.loss import Loss, checked, describe, loss_of

LossFunction = Callable[[Any, Any], "Tensor | Loss"]
StepFunction = Callable[[nn.Module, Any], "Tensor | Loss"]


class ModelCall:
    """The forward and the loss of one kind of run.

    - A mapping batch goes in as keywords: `model(**batch)`; the loss is what the model returned, or `loss(outputs, batch)`.
    - A pair `(inputs, targets)` calls `model(inputs)` and `loss(outputs, targets)`.
    - A single tensor calls `model(batch)`; the loss is what the model returned, or `loss(outputs, batch)`.
    - With a function `step(model, batch)`, that function does all of it.
    """

    def __init__(self, loss: LossFunction | None = None, step: StepFunction | None = None) -> None:
        self._loss, self._step = loss, step

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Run the model on one microbatch; returns its outputs (with a step function: the loss)."""
        if self._step is not None:
            return self._step(model, batch)
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, Tensor):
            return model(batch)
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return model(batch[0])
        raise ModelError(
            f"the batch is {describe(batch)}; a model is called with a mapping (as keywords), a pair (inputs, targets) or a tensor. "
            "For anything else pass Trainer(..., step=function) with step(model, batch) -> loss."
        )

    def loss(self, outputs: Any, batch: Any) -> Tensor | Loss:
        """The loss of one microbatch: a mean (scalar tensor) or a `Loss`.

        Raises:
            ModelError: when there is none.
        """
        if self._step is not None:
            return checked(outputs, "the step function")
        if self._loss is None:
            found = loss_of(outputs)
            return checked(outputs, "the model") if found is None else found
        target = batch[1] if isinstance(batch, (tuple, list)) else batch
        return checked(self._loss(outputs, target), "the loss function")

    def can_lose(self, outputs: Any) -> bool:
        """Whether outputs give a loss at all; in evaluation they need not."""
        return self._step is not None or self._loss is not None or loss_of(outputs) is not None
