"""Training with 8-bit floating-point matrix products for Drivetrain, through torchao."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from torch import nn

from drivetrain import CallbackContext, Component, ConfigError, Precision, Problem, component, option

__all__ = ["Fp8", "Fp8Precision", "convertible", "why_no_fp8"]

_MULTIPLE = 16  # of a layer's sizes: what the matrix units take


class Fp8Precision(Precision):
    """Autocast to bfloat16, and linear layers that multiply in float8."""

    name = "fp8"
    dtype = torch.bfloat16

    def __init__(self, device: torch.device, recipe: str, skip: list[str] | None, reason: str) -> None:
        self.reason = reason
        self._recipe, self._skip = recipe, skip
        self._context = torch.autocast(device.type, torch.bfloat16)

    def cast(self, model: nn.Module) -> nn.Module:
        """Put torchao's `Float8Linear` in the place of the linear layers that can be.

        Raises:
            ConfigError: when there is none, or a pattern of `skip` matches none.
        """
        # here and not at the top: it takes seconds, and a machine that is refused need not wait for it
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        names = convertible(model, self._skip)
        config = Float8LinearConfig.from_recipe_name(self._recipe)
        converted: nn.Module = convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in names)
        return converted

    def forward(self) -> torch.autocast:
        """The autocast context of forward and loss."""
        return self._context


@component
class Fp8(Component):
    """Linear layers with 8-bit floating-point matrix products: inputs and weights in e4m3, gradients in e5m2, scaled on the fly.

    Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433, table 1; scaling as torchao's
    `convert_to_float8_training` does it. Parameters and optimizer state stay in float32, everything else computes as in `bf16`.
    Set `compile = true`: uncompiled, scaling costs more than the products save. Small matrices become slower in any case.
    """

    kind: ClassVar[str] = "precision"

    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = option(
        default="tensorwise",
        help="one scale for a tensor (fastest), for a row (more exact), or for a row and gradients of weights in bfloat16",
    )
    skip: list[str] | None = option(
        default=None,
        help="name patterns of linear layers left in bfloat16; default: the last one, whose outputs need the range",
    )

    def make_precision(self, ctx: CallbackContext) -> Precision:
        """Autocast with float8 linear layers on `ctx.device`.

        Raises:
            ConfigError: when the device has no 8-bit matrix products.
        """
        if (problem := why_no_fp8(ctx.device)) is not None:
            raise ConfigError([Problem("precision", f"fp8 does not work on the device '{ctx.device}': {problem}. Use bf16.")])
        slow = "" if ctx.config.compile else "; slow without compile = true"
        return Fp8Precision(ctx.device, self.recipe, self.skip, f"fp8: {self.recipe} scaling, bfloat16 autocast{slow}")


def why_no_fp8(device: torch.device) -> str | None:
    """Why `device` cannot multiply 8-bit floating-point matrices, or None when it can."""
    if device.type != "cuda":
        return "it needs a GPU with 8-bit matrix products (NVIDIA from Ada and Hopper on, AMD from MI300 on)"
    found = torch.cuda.get_device_capability(device)
    needed, first = ((9, 4), "MI300") if torch.version.hip else ((8, 9), "Ada and Hopper")
    if found < needed:
        have, want = ".".join(map(str, found)), ".".join(map(str, needed))
        return f"8-bit matrix products need compute capability {want} ({first}), this GPU has {have}"
    return None


def convertible(model: nn.Module, skip: list[str] | None) -> set[str]:
    """The names of the linear layers that may multiply in float8.

    Args:
        model: a model whose linear layers are still torch's own.
        skip: patterns of names to leave out; None for the last linear layer.

    Raises:
        ConfigError: when none is left, or a pattern matches none.
    """
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    for index, pattern in enumerate(skip or []):
        if not any(fnmatchcase(name, pattern) for name in linear):
            message = f"the pattern {pattern!r} matches no linear layer (there are {', '.join(list(linear)[:3]) or 'none'})"
            raise ConfigError([Problem(f"precision.fp8.skip[{index}]", message)])
    left_out = list(linear)[-1:] if skip is None else [n for n in linear if any(fnmatchcase(n, pattern) for pattern in skip)]
    names = {
        name
        for name, module in linear.items()
        if name not in left_out and module.in_features % _MULTIPLE == 0 and module.out_features % _MULTIPLE == 0
    }
    if not names:
        message = (
            f"fp8 found no linear layer to convert: sizes must be multiples of {_MULTIPLE}, and the last layer is left out"
        )
        raise ConfigError([Problem("precision", f"{message}. Use bf16.")])
    return names
