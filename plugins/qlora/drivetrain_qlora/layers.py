"""Which layers of a model are quantized and get adapters, and which stay as they are."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model by name, without its head: what "all linear layers" means (QLoRA, section 4).

    Linear are `nn.Linear` itself and the `Conv1D` of GPT-2; not their subclasses, nor the parts of `nn.MultiheadAttention` and
    `nn.TransformerEncoderLayer`, whose weights are used in other ways than by calling the layer. The head is what
    `get_output_embeddings()` says, for models without it the last linear layer. Layers that share their weight with another
    module are left out as well.
    """
    shared = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    layers = {
        name: module
        for name, module in _usual(model)
        if (type(module) is nn.Linear or is_conv1d(module)) and shared[id(module.weight)] == 1
    }
    head = head_of(model)
    return {name: module for name, module in layers.items() if module is not head}


def _usual(module: nn.Module, prefix: str = "") -> Any:
    """`named_modules`, without going into modules whose fused forward reads the weights of their parts."""
    yield prefix, module
    if not isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        for name, child in module.named_children():
            yield from _usual(child, f"{prefix}.{name}" if prefix else name)


def head_of(model: nn.Module) -> nn.Module | None:
    """The layer that makes the outputs; None when there is none that is linear."""
    ask: Any = getattr(model, "get_output_embeddings", None)
    if callable(ask):
        found: nn.Module | None = ask()
        return found
    return next((m for m in reversed(list(model.modules())) if type(m) is nn.Linear), None)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's linear layer: its weight is [in, out], the transpose of `nn.Linear`'s."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def norms_to_fp32(model: nn.Module) -> None:
    """Store and compute the normalisation layers of a 16-bit model in fp32; what they give is 16 bits again. In place.

    Normalisation layers are modules without children, named for it, with parameters of one dimension.
    """
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        named = "norm" in type(module).__name__.lower() and not list(module.children())
        if named and parameters and all(p.ndim == 1 for p in parameters) and parameters[0].dtype in _HALVES:
            dtype = parameters[0].dtype
            module.float()
            hooks = [module.register_forward_pre_hook(_to_fp32), module.register_forward_hook(partial(_back_to, dtype))]
            setattr(module, _HOOKS, hooks)


def norms_as_they_were(model: nn.Module) -> None:
    """Undo `norms_to_fp32`, except for the type the weights are stored in; in place."""
    for module in model.modules():
        for hook in module.__dict__.pop(_HOOKS, ()):
            hook.remove()


_HALVES = (torch.bfloat16, torch.float16)
_HOOKS = "_drivetrain_qlora_hooks"


def _to_fp32(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.float() if isinstance(a, Tensor) and a.dtype in _HALVES else a for a in args)


def _back_to(dtype: torch.dtype, _module: nn.Module, _args: Any, output: Any) -> Any:
    return output.to(dtype) if isinstance(output, Tensor) else output


def weight_bytes(model: nn.Module) -> int:
    """The memory of a model's parameters, with the constants that quantized ones need."""
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        state: Any = getattr(parameter, "quant_state", None)
        for part in () if state is None else (state, state.state2):
            total += 0 if part is None else sum(t.nbytes for t in vars(part).values() if isinstance(t, Tensor))
    return total
