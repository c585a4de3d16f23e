"""`distributed = "auto"` with several processes: whether the model with its training state fits one device decides between ddp and fsdp."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from drivetrain.registry import is_installed
from drivetrain.rng import isolated

_SHARE = 0.7  # of a device's memory; the rest is for activations, buffers of the communication and fragments
_MOMENTS = 8  # bytes of optimizer state for each trained parameter: Adam's two moments in fp32
_MOMENTS_8BIT = 2


def choose_strategy(
    model: nn.Module | None, make: Callable[[], nn.Module | None], memory: int | None, state_8bit: bool, adapters: bool
) -> tuple[str, str]:
    """ "ddp" or "fsdp", and why.

    Args:
        model: the model if it is there already.
        make: builds it otherwise; called on the meta device, where it takes no memory.
        memory: of one device, in bytes; None for the CPU.
        state_8bit: whether the optimizer keeps its state in 8 bits.
        adapters: whether the weights are frozen, perhaps quantized, and small adapters trained.
    """
    if memory is None:
        return "ddp", "on the CPU all processes share one memory"
    if adapters:
        return "ddp", "only adapters are trained"
    found = _on_meta(make) if model is None else model
    if found is None:
        return "ddp", "the model's size is not known before it is built"
    needed, room = training_bytes(found, state_8bit), int(memory * _SHARE)
    sizes = f"{_gib(needed)} of weights, gradients and optimizer state, {_gib(room)} of {_gib(memory)} to put them in"
    if needed <= room:
        return "ddp", f"the model fits one device: {sizes}"
    if not is_installed("strategy", "fsdp"):
        return "ddp", f"the model may not fit one device, and drivetrain-fsdp is not installed: {sizes}"
    return "fsdp", f"the model does not fit one device: {sizes}"


def training_bytes(model: nn.Module, state_8bit: bool = False) -> int:
    """Bytes of weights, buffers, gradients and optimizer state on one device that holds all of them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    gradients = sum(p.numel() * p.element_size() for p in trained)
    return held + gradients + sum(p.numel() for p in trained) * (_MOMENTS_8BIT if state_8bit else _MOMENTS)


def _on_meta(make: Callable[[], nn.Module | None]) -> nn.Module | None:
    """The model without memory; None when it cannot be built so, which the real building will say better."""
    try:
        with isolated(0), torch.device("meta"):
            return make()
    except Exception:
        return None


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
