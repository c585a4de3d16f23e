"""Tiny models with random weights that follow from the seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

VOCABULARY = 300


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """A function that makes a two-layer "llama", "tied" (one matrix for embedding and head) or "gpt2"."""

    def make(kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
        torch.manual_seed(seed)
        common = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
        if kind == "gpt2":
            config: Any = GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=64, **common)
        else:
            config = LlamaConfig(
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                tie_word_embeddings=kind == "tied",
                **common,
            )
        return AutoModelForCausalLM.from_config(config, dtype=dtype)

    return make


@pytest.fixture
def samples() -> list[dict[str, torch.Tensor]]:
    """Eight token rows to learn by heart."""
    rows = torch.randint(VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in rows]
