"""What a model's repeated blocks keep for backward: recomputed there, or moved to host memory until then."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

_SMALL = 1024  # numbers: moving fewer saves nothing worth a copy


def recompute(blocks: Iterable[nn.Module], selective: bool = False) -> None:
    """Recompute the inside of blocks in backward (Chen et al. 2016, arXiv:1604.06174), in place.

    Args:
        selective: keep the results of matrix products and attention, which cost most to compute, and recompute the rest.
    """
    options = {"context_fn": _selective} if selective else {}
    for block in blocks:
        block.forward = _Recomputed(block.forward, options)


class _Recomputed:
    """Stands on a block in the place of its `forward`. No closure: a copy of the model, by `copy` or `pickle`, has one of its own."""

    def __init__(self, forward: Callable[..., Any], options: dict[str, Any]) -> None:
        self.forward, self.options = forward, options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.forward, *args, use_reentrant=False, **self.options, **kwargs)


def _selective() -> Any:
    return create_selective_checkpoint_contexts(_expensive())


@cache
def _expensive() -> list[Any]:
    """Matrix products, and every attention kernel that this torch has."""
    aten: Any = torch.ops.aten
    kinds = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    kernels = [f"_scaled_dot_product_{kind}" for kind in kinds]
    products = [aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default]
    return products + [getattr(aten, name).default for name in kernels if hasattr(aten, name)]


class Offload:
    """Moves what is saved for backward to host memory, and back when backward asks for it. Parameters stay.

    On CUDA the way out is a stream of its own, beside the computation that goes on, to page-locked memory. On a CPU nothing moves.

    Args:
        cuda: `torch.cuda`, or what stands in for it.
    """

    hosts: ClassVar[tuple[str, ...]] = ("cpu",)  # types of devices
    asynchronous: ClassVar[tuple[str, ...]] = ("cuda",)

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._streams: dict[torch.device, Any] = {}

    def of(self, blocks: Iterable[nn.Module]) -> None:
        """Move what blocks save, or their compiled code, in place."""
        for block in blocks:
            if all(parameter.device.type in self.hosts for parameter in block.parameters()):
                continue  # nothing to move, and asking costs two calls a tensor
            if block._compiled_call_impl is None:
                block.forward = self.around(block.forward)
            else:
                block._compiled_call_impl = self.around(block._compiled_call_impl)

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A function like `forward`, whose saved tensors are moved."""
        return _Moved(self, forward)

    def __reduce__(self) -> Any:
        """A copy has streams of its own."""
        return type(self), ()

    def _out(self, tensor: Tensor) -> Any:
        device, whole = tensor.device, tensor if tensor._base is None else tensor._base
        if device.type in self.hosts or isinstance(whole, nn.Parameter) or tensor.numel() < _SMALL:
            return tensor
        if device.type not in self.asynchronous:
            return tensor.to("cpu"), device
        stream = self._stream(device)
        stream.wait_stream(self._cuda.current_stream(device))
        with self._cuda.stream(stream):
            moved = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            moved.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is given to nobody before the copy is done
        return moved, device

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = self._cuda.Stream(device)
        return self._streams[device]

    def _back(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        moved, device = kept
        if device in self._streams:
            self._cuda.current_stream(device).wait_stream(self._streams[device])
        back: Tensor = moved.to(device, non_blocking=True)
        return back


class _Moved:
    """As `_Recomputed`, for `Offload`."""

    def __init__(self, offload: Offload, forward: Callable[..., Any]) -> None:
        self.offload, self.forward = offload, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(self.offload._out, self.offload._back):
            return self.forward(*args, **kwargs)
