"""Double precision: for checks of formulas, and for models whose numbers need it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from drivetrain import Precision, map_tensors


class DoublePrecision(Precision):
    """Parameters, buffers and inputs in float64."""

    name = "fp64"
    reason = "double precision"

    def cast(self, model: nn.Module) -> nn.Module:
        """The model in float64, which from now on converts the floating-point tensors it is called with."""
        model.double().register_forward_pre_hook(_inputs, with_kwargs=True)
        return model


def _inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return map_tensors(args, _double), map_tensors(kwargs, _double)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
