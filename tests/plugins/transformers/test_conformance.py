"""They keep every promise of their kinds; the kit's checks, each with an id of its own."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from drivetrain_testing import Check, conformance
from drivetrain_transformers import Chat, SamplePromptsCallback, TextFiles, TransformersModel

LLAMA = {"model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
TEMPLATE = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
# The data sets are made before the fixtures of a test: their files are in a folder of this module.
FOLDER = tempfile.TemporaryDirectory(prefix="drivetrain-testing-")


def written() -> Path:
    """A tokenizer of bytes, a text and some conversations."""
    folder = Path(FOLDER.name)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate(["<|end|>", *alphabet])}
    bpe = Tokenizer(models.BPE(vocab=words, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder / "tokenizer")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    line = '{"messages": [{"role": "user", "content": "Why %d?"}, {"role": "assistant", "content": "Because."}]}\n'
    (folder / "chat.jsonl").write_text("".join(line % number for number in range(96)))
    return folder


def llama() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"}))


def tokens() -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(0, 256, (96, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in rows]


HERE = written()
TOKENIZER = str(HERE / "tokenizer")


@conformance(
    TransformersModel(config=LLAMA),
    data=tokens,
    unsupported={"steps_wait_for_no_device": "transformers' own code asks in every forward whether sequences are packed"},
    processes=pytest.mark.slow,
)
def test_conformance_of_the_model(check: Check) -> None:
    check()


@conformance(
    TextFiles(path=str(HERE / "text.txt"), tokenizer=TOKENIZER, context=16),
    Chat(path=str(HERE / "chat.jsonl"), tokenizer=TOKENIZER, context=32),
    model=llama,
    processes=pytest.mark.slow,
)
def test_conformance_of_the_data(check: Check) -> None:
    check()


@conformance(
    SamplePromptsCallback(prompts=["the fox"], tokenizer=TOKENIZER, length=3),
    model=llama,
    data=tokens,
    processes=pytest.mark.slow,
)
def test_conformance_of_the_samples(check: Check) -> None:
    check()
