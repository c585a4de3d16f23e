"""What the 8-bit optimizers share: their options, what stays in 32 bits, and the refusals before the first step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from drivetrain import CallbackContext, ConfigError, OptimizerComponent, PluginError, Problem, component, option

# Looking for a faster kernel on a model hub, which optimizers do not use, it complains at import when it cannot.
_noisy = logging.getLogger("bitsandbytes.backends.cpu.ops")
_level = _noisy.level
_noisy.setLevel(logging.ERROR)
try:
    from bitsandbytes import optim as optim  # for the modules of this package as well
except Exception as error:  # missing, or its library does not load, for which it has several types
    raise PluginError(
        f"the 8-bit optimizers need the package bitsandbytes, which cannot be imported here ({type(error).__name__}: {error}). "
        "Repair it (pip install --force-reinstall --no-deps bitsandbytes), or use an optimizer with a 32-bit state, such as adamw."
    ) from error
finally:
    _noisy.setLevel(_level)

LR_HELP = "peak learning rate; the schedule multiplies it"
DECAY_HELP = "decay of the weights it applies to, see `decay`"
EPS_HELP = "added to the denominator"


@component
class Optimizer8bit(OptimizerComponent):
    """Base of the optimizers here: a class of `bitsandbytes.optim` whose state is stored in 8 bits.

    Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861: each state tensor is divided into blocks
    of 256 numbers, each stored as an 8-bit index into a table of unevenly spaced values, times the block's largest magnitude, a
    float32. An update reads the state, computes in float32 and rounds it again.

    Two sorts of parameters keep a float32 state: tensors with fewer than `min_8bit_size` elements, and embeddings.
    """

    algorithm: ClassVar[type[torch.optim.Optimizer]]
    paged: ClassVar[bool] = False

    lr: float = option(default=1e-3, at_least=0, help=LR_HELP)
    weight_decay: float = option(default=0.0, at_least=0, help=DECAY_HELP)
    min_8bit_size: int = option(
        default=4096,
        at_least=0,
        help="tensors with fewer elements keep a 32-bit state: they take next to no memory, and norms and biases are the "
        "parameters that rounding hurts most",
    )
    quantize_embeddings: bool = option(
        default=False,
        help="8-bit state for embeddings too; their gradients differ so much between rows and steps that it can make training "
        "unstable (section 2.3 of the paper)",
    )

    def build(self, ctx: CallbackContext, **arguments: Any) -> torch.optim.Optimizer:
        """The `algorithm` over the model's parameter groups.

        Raises:
            ConfigError: when the device, the parameters or options together do not allow it.
        """
        self._check(ctx)
        try:
            made: Any = self._new(self.parameter_groups(ctx.model), arguments)
        except (ValueError, NotImplementedError) as error:
            raise ConfigError([Problem(self.path, str(error))]) from error
        # bitsandbytes asks one manager in the process, by id(parameter), which parameters stay in 32 bits; ids are used again
        # when a model is gone, and two runs would meet there. This optimizer gets one of its own.
        made.mng = optim.GlobalOptimManager.__new__(optim.GlobalOptimManager)
        made.mng.initialize()
        if not self.quantize_embeddings:
            made.mng.override_config(list(embeddings(ctx.model)), "optim_bits", 32)
        return made  # type: ignore[no-any-return]

    def _new(self, parameters: Any, arguments: dict[str, Any]) -> torch.optim.Optimizer:
        common: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay, "min_8bit_size": self.min_8bit_size}
        return self.algorithm(parameters, **common, **arguments)

    @property
    def path(self) -> str:
        """Where a configuration has this component, such as "optimizer.adamw_8bit"."""
        return self.plugin_name.replace(":", ".") or "optimizer"

    def _check(self, ctx: CallbackContext) -> None:
        problem = None
        if self.paged and ctx.device.type != "cuda":
            problem = (
                f"paged state moves between the memory of a CUDA GPU and the host's, and this run is on '{ctx.device}'. "
                f"Use {self.path.rpartition('.')[2].removeprefix('paged_')}."
            )
        for name, module in ctx.model.named_modules():
            if getattr(module, "sparse", False) is True:
                problem = f"{name!r} gives sparse gradients, which bitsandbytes cannot use. Set sparse=False there."
        for name, parameter in ctx.model.named_parameters():
            if parameter.requires_grad and parameter.dtype == torch.float64:
                problem = f"{name!r} is float64, and bitsandbytes computes in float32. Use another optimizer."
            if parameter.requires_grad and hasattr(parameter, "device_mesh"):
                problem = (
                    f"{name!r} is sharded, and bitsandbytes quantizes state in blocks of a whole tensor. Use adamw, or ddp."
                )
        problem = problem or self._why_not(ctx.device)
        if problem is not None:
            raise ConfigError([Problem(self.path, problem)])

    def _why_not(self, device: torch.device) -> str | None:
        """Why bitsandbytes cannot do it on `device`, or None. Found out by doing it once: its wheels differ by system."""
        probe = nn.Parameter(torch.ones(256, device=device))
        probe.grad = torch.ones_like(probe)
        try:
            optim.AdamW8bit([probe], lr=0.0, min_8bit_size=0).step()  # all of them use the same library
        except Exception as error:  # each backend has its own type for an operation that it lacks
            return f"bitsandbytes does not work on '{device}' here (it says: {error}). Use another optimizer."
        return None


def embeddings(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of the embeddings of `model`, those tied to another module included."""
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield from module.parameters(recurse=False)
