"""Devices and the synchronization of gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_pipeline.trainer.lazy import reexport

if TYPE_CHECKING:
    from drivetrain import DeviceManager, GradientSynchronizer

__all__ = [
    "DeviceManager",
    "GradientSynchronizer",
]

__getattr__ = reexport(__name__, __all__)
