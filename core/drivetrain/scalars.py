"""Numbers in tensors."""

from __future__ import annotations

from torch import Tensor


def at_hand(value: Tensor) -> float | None:
    """The value of a scalar that lies in the host's memory, where reading waits for nothing; None for one on a device."""
    return value.item() if type(value) is Tensor and value.is_cpu else None
