"""Linear layers in four bits and back, through bitsandbytes. Importing this module imports bitsandbytes."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from drivetrain_qlora.layers import is_conv1d, linear_layers

# Looking for a faster kernel on a model hub, it complains at import when it cannot.
_noisy = logging.getLogger("bitsandbytes.backends.cpu.ops")
_level = _noisy.level
_noisy.setLevel(logging.ERROR)
import bitsandbytes  # noqa: E402

_noisy.setLevel(_level)
bnb: Any = bitsandbytes


def quantize(model: nn.Module, compute: torch.dtype, device: torch.device) -> list[str]:
    """Replace the linear layers of a model, its head excepted, by NF4 ones with doubly quantized constants; in place.

    Source: Dettmers et al. 2023 (arXiv:2305.14314), section 3: 4-bit NormalFloat in blocks of 64, whose scales are themselves
    stored in 8 bits in blocks of 256: 4.127 bits for each weight. Layer by layer, so no second copy of the model exists.

    Args:
        compute: what the layers multiply in.
        device: where each layer is quantized and stays.

    Returns:
        The names of the layers.
    """
    layers = linear_layers(model)
    for name, layer in layers.items():
        model.set_submodule(name, quantized(layer, compute, device))
    return list(layers)


def quantized(layer: Any, compute: torch.dtype, device: torch.device) -> nn.Module:
    """One layer in NF4."""
    transposed = is_conv1d(layer)
    weight = layer.weight.data.T.contiguous() if transposed else layer.weight.data
    rows, columns = weight.shape
    made: Any = bnb.nn.Linear4bit(
        columns, rows, bias=layer.bias is not None, compute_dtype=compute, quant_type="nf4", device="meta"
    )
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=made).to(device)
    made.weight.quant_state.dtype = compute  # what it is unpacked to, or each use would make an fp32 copy first
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.data.to(device, compute), requires_grad=False)
    # In eval mode on CPUs with AVX512-BF16, bitsandbytes would repack the weights: with rounder constants, for good, and in a
    # format that has no backward, so that from the first evaluation on training would go wrong in silence.
    made.support_avx512bf16_for_cpu = False
    made.conv1d = type(layer) if transposed else None
    made.training = layer.training
    return made  # type: ignore[no-any-return]


def cast_rest(model: nn.Module, compute: torch.dtype) -> None:
    """Store what is not quantized (embeddings, head, norms) in the type that is computed in; in place."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not isinstance(parameter, bnb.nn.Params4bit):
            parameter.data = parameter.data.to(compute)


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the NF4 layers of a model by ordinary ones with the weights they stand for; in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bnb.nn.Linear4bit):
            model.set_submodule(name, dequantized(layer, dtype))


def dequantized(layer: Any, dtype: torch.dtype) -> nn.Module:
    """An ordinary layer with the weights that an NF4 one stands for."""
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
    rows, columns = weight.shape
    made: Any
    if layer.conv1d is None:
        made = nn.Linear(columns, rows, bias=layer.bias is not None, device="meta")
    else:
        made, weight = layer.conv1d(rows, columns), weight.T.contiguous()
    made.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
    return made  # type: ignore[no-any-return]
