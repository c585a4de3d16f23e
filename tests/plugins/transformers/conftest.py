"""A tiny tokenizer and tiny models, made here: nothing is fetched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = "the quick brown fox jumps over the lazy dog. Why? Because it can, and nobody told it otherwise. "
LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with 300 tokens, an end token and a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([WORDS], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_dir: Path) -> Any:
    from drivetrain_transformers.loading import load_tokenizer

    return load_tokenizer(str(tokenizer_dir))


@pytest.fixture
def llama() -> dict[str, Any]:
    """The configuration of a two-layer model as a table."""
    return dict(LLAMA)


@pytest.fixture
def make_llama() -> Callable[..., Any]:
    """A function that makes a two-layer Llama with random weights that follow from the seed."""

    def make(seed: int = 0, **changes: Any) -> Any:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA, **changes}))

    return make


@pytest.fixture
def model_dir(tmp_path: Path, make_llama: Callable[..., Any], tokenizer: Any) -> Path:
    """A model and its tokenizer in one directory, as `save_pretrained` writes them."""
    folder = tmp_path / "model"
    make_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
