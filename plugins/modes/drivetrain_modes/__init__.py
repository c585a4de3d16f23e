"""Training modes for Drivetrain that train all weights: `full_finetune` and `pretraining`."""

from __future__ import annotations

from typing import ClassVar

from drivetrain import Component, component

__all__ = ["FullFinetune", "Pretraining"]


@component
class FullFinetune(Component):
    """Train every weight that requires a gradient, from where the model has it.

    Changes nothing about the model: whoever wants a part of it to stay sets `requires_grad = False` there.
    """

    kind: ClassVar[str] = "mode"


@component
class Pretraining(Component):
    """Train every weight from a new beginning: model plugins take a model's configuration and make its weights anew.

    A model that a program hands over is trained as it is.
    """

    kind: ClassVar[str] = "mode"
    from_scratch: ClassVar[bool] = True
