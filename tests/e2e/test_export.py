"""`drivetrain train` in the mode qlora, then `drivetrain export`, with a tiny model: what other programs get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from drivetrain import Trainer, load_training_config
from drivetrain_cli import main

CONFIG = """
run_name = "tiny"
model = { use = "transformers", path = "base" }
training_mode = { use = "qlora", r = 2, dropout = 0.0 }
data = { use = "text_files", path = "text.txt", context = 32, held_out = 0.2 }
max_duration = "4st"
precision = "fp32"
optimizer = { use = "adamw", lr = 1e-2 }
scheduler = { use = "cosine", warmup = "1st" }
callbacks = [{ use = "checkpoint", every = "2st" }]
"""
TEXT = "the quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of the command line, in its folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=280, special_tokens=["<|end|>"], initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>").save_pretrained("base")
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=280, **shape)).save_pretrained("base")
    (tmp_path / "run.toml").write_text(CONFIG)
    assert main(["train", "run.toml"]) == 0
    return tmp_path / "runs" / "tiny"


def test_merged_it_is_the_trained_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").unlink()  # the data are not needed any more
    assert main(["export", "runs/tiny", "out", "--merge", "--dtype", "fp32"]) == 0
    assert "merged model of step 4 of runs/tiny" in capsys.readouterr().out
    merged: Any = AutoModelForCausalLM.from_pretrained("out")
    ids = AutoTokenizer.from_pretrained("out")("the quick brown fox", return_tensors="pt")["input_ids"]
    assert logged_loss(run) == pytest.approx(held_out_loss(run), rel=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trained(run).model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert merged.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)
    assert merged.config.use_cache


def trained(run: Path) -> Trainer:
    """The run's model with its newest checkpoint, in eval mode."""
    Path("text.txt").write_text(TEXT)
    trainer = Trainer(None, load_training_config(run / "config.json"))
    assert trainer.restore() == 4
    trainer.model.eval()
    return trainer


def held_out_loss(run: Path) -> float:
    return trained(run).evaluate()["eval/loss"]


def logged_loss(run: Path) -> float:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [float(row["eval/loss"]) for row in rows if "eval/loss" in row][-1]


def test_the_adapters_alone_fit_the_base_model_in_peft(run: Path) -> None:
    from peft import PeftModel

    assert main(["export", "runs/tiny", "out"]) == 0
    base = AutoModelForCausalLM.from_pretrained("base")
    ids = torch.arange(8)[None]
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, "out")(input_ids=ids).logits
    wanted = trained(run).model(input_ids=ids).logits
    learned, rounding = (
        (adapted - plain).std(),
        (adapted - wanted).std(),
    )  # the trained model's base is in four bits, this one is not
    assert 0 < rounding < 0.2 * wanted.std()
    assert learned > 0
    assert (Path("out") / "adapter_model.safetensors").stat().st_size < 30_000


def test_without_a_directory_it_writes_into_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "runs/tiny", "--merge"]) == 0
    assert "merged model of step 4" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(run / "merged").dtype == torch.bfloat16
    assert main(["export", "runs/tiny"]) == 0
    assert (run / "exported" / "adapter_model.safetensors").is_file()
    assert main(["export", "runs/tiny", "--merge"]) == 2, "what is there already is not overwritten"
    assert "give another one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runs", "out"], "is no run of drivetrain train"),
        (["runs/tiny", "base"], "base exists and is not an empty directory"),
        (["runs/tiny", "out"], "has no checkpoint"),
    ],
)
def test_mistakes(run: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    for file in sorted((run / "checkpoints").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    assert main(["export", *words]) == 2
    assert said in capsys.readouterr().err
    assert not Path("out").exists()
