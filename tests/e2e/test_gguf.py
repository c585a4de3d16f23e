"""A language model from a GGUF file, made here with the package gguf as llama.cpp's converter makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drivetrain import Trainer, TrainingConfig
from drivetrain_transformers.loading import load_tokenizer

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

HEADS, KV_HEADS, WIDTH, HIDDEN, LAYERS, CONTEXT = 4, 2, 32, 64, 2, 32
NAMES = {  # of llama.cpp, by those of transformers
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def bytes_as_text() -> list[str]:
    """The 256 characters by which byte-level BPE writes bytes (GPT-2), in its order."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in kept] + [chr(256 + index) for index in range(256 - len(kept))]


TOKENS = [*bytes_as_text(), "th", "Ġth", "Ġthe", "<|end|>"]
MERGES = ["t h", "Ġ th", "Ġth e"]


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": len(TOKENS)}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": CONTEXT}
    made = LlamaForCausalLM(LlamaConfig(**sizes, **heads, rms_norm_eps=1e-5, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:  # so that attention has something to choose, and the order of its rows matters
                parameter.mul_(10)
    return made


def for_llama_cpp(name: str, weight: torch.Tensor) -> torch.Tensor:
    """llama.cpp rotates neighbouring numbers of a head, transformers those half a head apart: rows are put in its order."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.rpartition(".")[2])
    if heads is None:
        return weight
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(path: Path, made: LlamaForCausalLM, quantized: Any = None) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 1) + [3])
    writer.add_token_merges(MERGES)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(len(TOKENS) - 1)
    state = {name: value.detach().float() for name, value in made.state_dict().items()}
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(LAYERS):
        for name, theirs in NAMES.items():
            value = state[f"model.layers.{layer}.{name}.weight"]
            tensors[f"blk.{layer}.{theirs}.weight"] = for_llama_cpp(name, value)
    for name, value in tensors.items():
        if quantized is not None and value.ndim == 2 and value.shape[1] % 32 == 0 and name.startswith("blk"):
            writer.add_tensor(name, gguf.quants.quantize(value.numpy(), quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def loaded(path: Path, **options: Any) -> Any:
    config = TrainingConfig(max_duration="1st", standard_callbacks=False, precision="fp32", optimizer="sgd")
    config.model = {"use": "transformers", "path": str(path), **options}
    return Trainer(None, config, [{"input_ids": torch.zeros(4, dtype=torch.int64)}]).model


def test_the_model_is_the_one_that_was_written(tmp_path: Path) -> None:
    original = model()
    write(tmp_path / "tiny.gguf", original)
    again = loaded(tmp_path / "tiny.gguf")
    ids = torch.arange(12)[None]
    assert type(again) is LlamaForCausalLM
    torch.testing.assert_close(again(input_ids=ids).logits, original(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    rows = again.model.layers[0].self_attn.q_proj.weight.data
    rows.copy_(for_llama_cpp("q_proj", rows.clone()))
    assert (again(input_ids=ids).logits - original(input_ids=ids).logits).abs().max() > 1e-2, "control: llama.cpp's order"


def test_eight_bits_are_unpacked_and_the_tokenizer_is_in_the_file(tmp_path: Path) -> None:
    original, path = model(), tmp_path / "tiny.gguf"
    write(path, original, gguf.GGMLQuantizationType.Q8_0)
    again = loaded(path, dtype="bf16")
    kept, found = (m.model.layers[0].mlp.gate_proj.weight.float() for m in (original, again))
    error = (kept - found).abs().max() / kept.abs().max()
    assert 1e-4 < error < 1e-2
    assert again.dtype == torch.bfloat16
    tokenizer = load_tokenizer(str(path))
    assert tokenizer("to the end")["input_ids"] == [TOKENS.index(t) for t in ("t", "o", "Ġthe", "Ġ", "e", "n", "d")]
    assert tokenizer.eos_token == "<|end|>"
    again.save_pretrained(tmp_path / "out")
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight, again.lm_head.weight)
