"""QLoRA, LoRA and DoRA: quantized base weights, adapters, merging and export."""

from __future__ import annotations

from drivetrain_qlora.layers import linear_layers
from drivetrain_qlora.mode import QLoRA, merge
from drivetrain_qlora.preset import qlora

__all__ = ["QLoRA", "linear_layers", "merge", "qlora"]
