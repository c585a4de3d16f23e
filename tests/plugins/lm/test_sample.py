"""Samples of text, and a small language model trained from nothing but a configuration."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain import Callback, CallbackContext, ModelError, OptimizerComponent, Trainer, TrainingConfig, component
from drivetrain_lm import GPT, SampleTextCallback
from drivetrain_lm.sample import readable

TEXT = "def add(a, b):\n    return a + b\n\n\n" * 60


@component
class Adam(OptimizerComponent):
    """So that these tests need no optimizer plugin."""

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameter_groups(ctx.model), lr=self.lr)


def config(folder: Path, **changes: Any) -> TrainingConfig:
    (folder / "text.txt").write_text(TEXT)
    return TrainingConfig(
        **{
            "model": {"use": "gpt", "layers": 2, "heads": 2, "width": 32, "context": 32, "dropout": 0.1},
            "data": {"use": "text", "path": str(folder / "text.txt"), "context": 32, "held_out": 0.1},
            "optimizer": Adam(lr=1e-2),
            "scheduler": None,
            "max_duration": "6st",
            "output_dir": folder / "runs",
            "run_name": "run",
            "standard_callbacks": False,
            **changes,
        }
    )


def test_learns_a_text_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = {"use": "sample_text", "prompt": "def ", "length": 60, "temperature": 0}
    trainer = Trainer(args=config(tmp_path, max_duration="100st", callbacks=[sample]))
    before = trainer.evaluate()["eval/bits_per_byte"]
    output = trainer.train()
    assert before == pytest.approx(8.0, abs=0.3)
    assert output.metrics["eval/bits_per_byte"] < 0.5
    written = (tmp_path / "runs" / "run" / "samples.txt").read_text(encoding="utf-8")
    assert "def add(a, b):\n    return a + b\n\n\ndef add(a, b):\n" in written
    assert "sample after 100 steps" in written
    assert capsys.readouterr().out == written + "\n"


def test_samples_on_the_way_and_once_at_the_end(tmp_path: Path) -> None:
    Trainer(args=config(tmp_path, callbacks=[SampleTextCallback(every="2st", length=5)])).train()  # type: ignore[arg-type]
    written = (tmp_path / "runs" / "run" / "samples.txt").read_text(encoding="utf-8")
    assert [line.split()[3] for line in written.splitlines() if line.startswith("-- sample")] == ["2", "4", "6"]


@component
class Swaps(Callback):
    """Evaluates other weights than it trains, as `ema` does: all zero, by which every byte is as likely."""

    def on_evaluate_start(self, ctx: CallbackContext) -> None:
        self.kept = {name: value.clone() for name, value in ctx.model.state_dict().items()}
        for parameter in ctx.model.parameters():
            parameter.data.zero_()

    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        ctx.model.load_state_dict(self.kept)


def test_at_evaluations_the_weights_that_are_evaluated_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zero = []
    generate = GPT.generate

    def noted(self: GPT, *args: Any, **kwargs: Any) -> torch.Tensor:
        zero.append(not any(parameter.any() for parameter in self.parameters()))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(GPT, "generate", noted)
    sample = SampleTextCallback(at_evaluation=True, length=5)
    trainer = Trainer(args=config(tmp_path, callbacks=[Swaps(), sample], eval_interval="4st", max_duration="9st"))
    trainer.train()
    assert zero == [True, True, True], "after steps 4, 8 and 9, at whose end is no second one"
    trainer.evaluate()
    assert len(zero) == 3, "no run, no sample"
    Trainer(args=config(tmp_path, callbacks=[Swaps(), SampleTextCallback(length=5)], resume="never")).train()
    assert zero[3:] == [False], "control"


def test_training_does_not_notice(tmp_path: Path) -> None:
    """With dropout: the weights after training are bit-equal whether or not text was sampled in between."""

    def weights(*callbacks: Any) -> dict[str, torch.Tensor]:
        trainer = Trainer(args=config(tmp_path, callbacks=list(callbacks)))
        trainer.train()
        assert trainer.model.training
        return {name: value.clone() for name, value in trainer.model.state_dict().items()}

    plain, sampled, disturbed = weights(), weights(SampleTextCallback(every="1st", length=5)), weights(Disturb())  # type: ignore[arg-type]
    assert all(torch.equal(plain[name], sampled[name]) for name in plain)
    assert not all(torch.equal(plain[name], disturbed[name]) for name in plain)  # negative control


@component
class Disturb(Callback):
    """Takes one number from the global generator."""

    def on_step_end(self, ctx: CallbackContext) -> None:
        torch.rand(1)


def test_the_model_is_in_eval_mode_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    generate = GPT.generate

    def noted(self: GPT, *args: Any, **kwargs: Any) -> torch.Tensor:
        modes.append(any(module.training for module in self.modules()))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(GPT, "generate", noted)
    Trainer(args=config(tmp_path, callbacks=[SampleTextCallback(length=2)])).train()
    assert modes == [False]


def test_nothing_is_sampled_when_the_run_was_interrupted_or_failed(tmp_path: Path) -> None:
    trainer = Trainer(args=config(tmp_path, callbacks=[SampleTextCallback(length=2)]))
    for step in trainer.steps():
        if step.number == 3:
            trainer.stop("enough")
    with pytest.raises(ZeroDivisionError):
        Trainer(args=config(tmp_path, callbacks=[SampleTextCallback(length=2), Fail()])).train()
    assert not (tmp_path / "runs" / "run" / "samples.txt").exists()


@component
class Fail(Callback):
    """Fails in the third step."""

    def on_step_end(self, ctx: CallbackContext) -> None:
        1 / (3 - ctx.step)


def test_refuses_other_models_before_training(tmp_path: Path) -> None:
    wide = {"use": "gpt", "vocab_size": 300}
    with pytest.raises(ModelError, match="sample_text needs a model over bytes with generate"):
        Trainer(args=config(tmp_path, model=wide, callbacks=["sample_text"])).train()
    with pytest.raises(ModelError, match="Linear is none"):
        Trainer(torch.nn.Linear(1, 1), config(tmp_path, callbacks=["sample_text"])).train()
    with pytest.raises(ModelError, match="prompt of at least one character"):
        Trainer(args=config(tmp_path, callbacks=[{"use": "sample_text", "prompt": ""}])).train()


def test_a_vocabulary_too_small_for_the_text_is_refused_before_training(tmp_path: Path) -> None:
    small = {"use": "gpt", "layers": 1, "heads": 2, "width": 32, "context": 32}
    with pytest.raises(
        ModelError, match=r"model\.vocab_size = 100 is too small for the text, which has the byte 117: set it to 256"
    ):
        Trainer(args=config(tmp_path, model=small | {"vocab_size": 100}))
    assert Trainer(args=config(tmp_path, model=small | {"vocab_size": 118}, max_duration="1st")).train().completed


def test_what_cannot_be_shown_is_marked() -> None:
    assert readable("naïve\n\tok".encode() + b"\x1b[2J\x00\xff\r\xe2\x80\xa8") == "naïve\n\tok" + "\ufffd[2J" + "\ufffd" * 4


def test_an_ascii_terminal_gets_ascii(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    Trainer(args=config(tmp_path, callbacks=[SampleTextCallback(prompt="é", length=3)])).train()
    sys.stdout.flush()
    assert b"\n?" in raw.getvalue()
    assert "\né" in (tmp_path / "runs" / "run" / "samples.txt").read_text(encoding="utf-8")
