"""QLoRA as one writes it without an engine: bitsandbytes' layers in four bits, peft's adapters beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

RANK = 16


def quantize(model: Any, device: str) -> None:
    """Freeze the model, with the blocks' matrices in NF4 and what is around the blocks in bf16, and give each block adapters; in place."""
    import bitsandbytes
    import peft

    names = set()
    for block in model.blocks:
        for name, layer in list(block.named_children()):
            if type(layer) is nn.Linear:
                size, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
                made = bitsandbytes.nn.Linear4bit(*size, bias=has_bias, compute_dtype=torch.bfloat16, quant_type="nf4")
                made.load_state_dict(layer.state_dict())
                setattr(block, name, made.to(device))
                names.add(name)
    for module in (model.tokens, model.positions, model.head):
        if module is not None:
            module.bfloat16()
    adapters = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=sorted(names))
    peft.get_peft_model(model, adapters)  # changes the model itself
