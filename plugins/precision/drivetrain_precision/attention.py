"""Attention over short sequences under CPU autocast: in float32, which is faster there than bfloat16, and more exact."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Length of the keys times size of a head up to which float32 took less time than bfloat16, forward and backward, on one and two
# threads of a CPU with AVX512-BF16: 0.3 to 0.7 of it at 128 × 32 and 128 × 64, equal at 512 × 32, 1.06 at 256 × 128. Torch's
# CPU kernel multiplies small blocks, and in bfloat16 what it does around each product costs more than the product saves.
_SHORT = 16_384


def short_attention() -> torch.library.Library:
    """Under CPU autocast, compute short `F.scaled_dot_product_attention` in float32 as long as the returned object lives.

    What it gives keeps autocast's type, so that to the caller only rounding differs; long sequences are left as they are. It goes
    in at torch's dispatcher, below whatever a model calls: the models are other people's.
    """
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that torch's own rule is overridden: it is meant to be
        library.impl("scaled_dot_product_attention", _attention, "AutocastCPU")
    return library


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    wanted = torch.get_autocast_dtype("cpu")
    short = key.shape[-2] * key.shape[-1] <= _SHORT
    computed = torch.float32 if short else wanted
    with torch.autocast("cpu", enabled=False):  # what torch's own rule does: cast, then call the operation without itself
        query, key, value = (_cast(tensor, computed) for tensor in (query, key, value))
        mask = None if attn_mask is None else _cast(attn_mask, computed)
        return _cast(F.scaled_dot_product_attention(query, key, value, mask, *args, **kwargs), wanted)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Like autocast: float64, and what is no floating-point number, stay."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
