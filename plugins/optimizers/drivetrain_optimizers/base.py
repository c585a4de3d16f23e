"""What the optimizers share: checked options, the choice of a fused implementation, and the call of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from drivetrain import CallbackContext, ConfigError, OptimizerComponent, Problem, component, option

LR_HELP = "peak learning rate; the schedule multiplies it"
DECAY_HELP = "decay of the weights it applies to, see `decay`"


def betas(first: float, second: float) -> Any:
    """The two averaging factors of the Adam family."""
    return option(default=(first, second), at_least=0, below=1, help="averaging factors of gradient and squared gradient")


@component
class TorchOptimizer(OptimizerComponent):
    """Base of the optimizers here: one class of `torch.optim` with its arguments."""

    lr: float = option(default=1e-3, at_least=0, help=LR_HELP)
    weight_decay: float = option(default=0.0, at_least=0, help=DECAY_HELP)

    def build(self, cls: type[torch.optim.Optimizer], ctx: CallbackContext, **arguments: Any) -> torch.optim.Optimizer:
        """`cls` over the model's parameter groups.

        Raises:
            ConfigError: for options that `cls` refuses together.
        """
        groups = self.parameter_groups(ctx.model)
        try:
            return cls(groups, lr=self.lr, weight_decay=self.weight_decay, **arguments)  # type: ignore[call-arg]
        except ValueError as error:
            raise ConfigError([Problem(self.path, str(error))]) from error

    @property
    def path(self) -> str:
        """Where a configuration has this component, such as "optimizer.adamw"."""
        return self.plugin_name.replace(":", ".") or "optimizer"


@component
class FusibleOptimizer(TorchOptimizer):
    """Base of those that torch has in one kernel for all parameters."""

    fused: bool | None = option(
        default=None,
        help="one kernel for the whole update: true, false, or left out: wherever torch has it for these parameters",
    )

    def build(self, cls: type[torch.optim.Optimizer], ctx: CallbackContext, **arguments: Any) -> torch.optim.Optimizer:
        """`cls` over the model's parameter groups, fused if wanted and possible.

        Raises:
            ConfigError: for `fused = true` where it is impossible, and for options that `cls` refuses together.
        """
        why_not = "as configured" if self.fused is False else why_not_fused(cls, ctx.model)
        if self.fused and why_not is not None:
            message = f"a fused {cls.__name__} is impossible here: {why_not}. Leave `fused` out."
            raise ConfigError([Problem(f"{self.path}.fused", message)])
        self.reason = "fused: one kernel for the whole update" if why_not is None else f"not fused: {why_not}"
        # not False: to torch that means "nor the foreach implementation"
        return super().build(cls, ctx, fused=why_not is None or None, **arguments)


def why_not_fused(cls: type[torch.optim.Optimizer], model: nn.Module) -> str | None:
    """Why torch has no fused `cls` for the trainable parameters, or None when it has.

    Each sort of parameter is tried out on a single number: which devices, types and tensor subclasses (as FSDP's) work differs
    between optimizers and releases, and torch tells only in the first step. Whether the kernel is right, it does not tell at all:
    that of SGD for 16-bit weights on a CPU is not (torch 2.13).
    """
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) is True:
            return f"{name!r} gives sparse gradients"
    sorts = {(type(p.data), p.device, p.dtype): p for p in model.parameters() if p.requires_grad}
    for parameter in sorts.values():
        probe = parameter.detach().new_zeros(1).requires_grad_()
        probe.grad = torch.zeros_like(probe)
        try:
            cls([probe], lr=0.0, fused=True).step()  # type: ignore[call-arg]
            if not _is_right(cls, parameter.device, parameter.dtype):
                return f"torch's kernel computes something else with {parameter.dtype} on {parameter.device.type}"
        except Exception as error:  # RuntimeError, NotImplementedError, …: each backend has its own
            return f"torch says: {error}"
    return None


def _is_right(cls: type[torch.optim.Optimizer], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether two fused steps of some numbers end where the plain ones in float32 do, but for rounding."""
    ends = []
    for fused, its_dtype in ((True, dtype), (False, torch.promote_types(dtype, torch.float32))):
        numbers = torch.linspace(-1, 1, 64, device=device).to(its_dtype).requires_grad_()
        optimizer = cls([numbers], lr=0.25, fused=fused, foreach=False)  # type: ignore[call-arg]
        for frequency in (3.0, 5.0):
            numbers.grad = (frequency * torch.linspace(-1, 1, 64, device=device)).cos().to(its_dtype)
            optimizer.step()
        ends.append(numbers.detach().double())
    if type(ends[0]) is not torch.Tensor:  # in a simulation there are no numbers
        return True
    return torch.allclose(ends[0], ends[1], rtol=0.0, atol=1e-6 + 4 * torch.finfo(dtype).eps)
