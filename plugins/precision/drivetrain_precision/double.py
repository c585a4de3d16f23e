"""Double precision: for checks of formulas, and for models whose numbers need it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from drivetrain import Precision


class DoublePrecision(Precision):
    """Parameters, buffers and inputs in float64."""

    name = "fp64"
    reason = "double precision"

    def cast(self, model: nn.Module) -> nn.Module:
        """The model in float64, which from now on converts the floating-point tensors it is called with."""
        model.double().register_forward_pre_hook(_inputs, with_kwargs=True)
        return model


def _inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return double(args), double(kwargs)


def double(value: Any) -> Any:
    """`value` with every floating-point tensor in it, in lists, tuples and mappings too, in float64."""
    if isinstance(value, Tensor):
        return value.to(torch.float64) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: double(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [double(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
