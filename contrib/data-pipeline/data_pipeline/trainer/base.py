"""The trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_pipeline.trainer.lazy import reexport

if TYPE_CHECKING:
    from drivetrain import Trainer

__all__ = [
    "Trainer",
]

__getattr__ = reexport(__name__, __all__)
