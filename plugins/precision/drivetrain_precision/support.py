"""What a device can compute in hardware, and what it can compute at all."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def bf16_support(device: torch.device) -> tuple[bool, str]:
    """Whether `device` multiplies bfloat16 matrices in hardware, and the words for it, such as "native on this CPU"."""
    if device.type == "cpu":
        native, where = _cpu_has_bf16(), "on this CPU"
    elif device.type == "cuda" and torch.version.hip:
        native, where = True, "on this GPU (ROCm)"
    elif device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        native, where = major >= 8, f"on this GPU (compute capability {major}.{minor})"
    elif device.type == "xpu":
        native, where = torch.xpu.is_bf16_supported(including_emulation=False), "on this GPU"
    elif device.type == "mps":
        # Metal emulates bfloat16 on M1 and M2, which torch cannot tell from later ones; an M4 was measured slower than in fp32
        # (karpathy/nanochat#685).
        native, where = False, "on every Apple GPU"
    else:
        native, where = False, f"on the device {device.type!r}, as far as is known"
    return native, f"{'native' if native else 'not native'} {where}"


def fp16_is_fast(device: torch.device) -> bool:
    """Whether `device` is an NVIDIA GPU with matrix units for float16: from Volta (V100, compute capability 7.0) and Turing (T4) on.

    The GTX 16xx have 7.5 without such units, but float16 at twice float32's rate.
    """
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (7, 0)


def _cpu_has_bf16() -> bool:
    """AVX512-BF16 or AMX on x86; on Arm only where oneDNN was built with kernels that use the instructions."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def why_no_autocast(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `device` cannot train with autocast to `dtype`, or None when it can. Found out by doing it once, on four numbers."""
    try:
        weight = torch.ones(2, 2, device=device, requires_grad=True)
        with torch.autocast(device.type, dtype):
            product = weight @ weight
        if product.dtype != dtype:
            return f"torch computes in {product.dtype} there"
        loss = product.float().sum()
        if dtype != torch.float16:
            loss.backward()
            return None
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0)
        scaler.scale(loss).backward()
        scaler.step(torch.optim.SGD([weight], lr=0.0))
        scaler.update()
    except Exception as error:  # each backend has its own type for an operation that it lacks
        return f"torch says: {error}"
    return None


def differentiable_gradients(
    result: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool], grad: Tensor
) -> Iterator[Tensor | None]:
    """Gradients of an autograd function's wanted inputs, by its result made of plain operations: they have gradients themselves."""
    chosen = [tensor for tensor, wants in zip(inputs, wanted, strict=True) if wants]
    found = iter(torch.autograd.grad(result, chosen, grad, create_graph=True, materialize_grads=True))
    return (next(found) if wants else None for wants in wanted)
