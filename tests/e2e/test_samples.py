"""Samples of text with averaged weights: what `sample_text` and `ema` do together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain import Trainer, TrainingConfig
from drivetrain_ema import EmaCallback
from drivetrain_lm import GPT, SampleTextCallback


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("first", ["ema", "sample_text"])
@pytest.mark.parametrize(("use_at_end", "at_evaluation"), [(False, True), (True, False)])
def test_the_averages_write_at_evaluations_and_at_an_end_that_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, use_at_end: bool, at_evaluation: bool
) -> None:
    """Whichever is named first. Evaluations are after steps 4 and 5, which is the last."""
    written: list[torch.Tensor] = []
    generate = GPT.generate

    def noted(self: GPT, *given: Any, **options: Any) -> torch.Tensor:
        written.append(weights(self))
        return generate(self, *given, **options)

    monkeypatch.setattr(GPT, "generate", noted)
    (tmp_path / "a.txt").write_text("def add(a, b):\n    return a + b\n" * 60)
    ema, sample = EmaCallback(decay=0.9, use_at_end=use_at_end), SampleTextCallback(at_evaluation=at_evaluation, length=2)
    config = TrainingConfig(
        model={"use": "gpt", "layers": 1, "heads": 2, "width": 32, "context": 32},
        data={"use": "text", "path": str(tmp_path / "a.txt"), "context": 32, "held_out": 0.2},
        optimizer={"use": "adamw", "lr": 1e-2},
        max_duration="5st",
        eval_interval="4st",
        output_dir=tmp_path,
        device="cpu",
        precision="fp32",
        standard_callbacks=False,
        callbacks=[ema, sample] if first == "ema" else [sample, ema],
    )
    trainer = Trainer(args=config)
    averages = []
    for step in trainer.steps():
        if step.number >= 4:
            with ema.averaged(trainer.ctx):
                averages.append(weights(trainer.model))
    assert len(written) == (2 if at_evaluation else 1)
    assert all(map(torch.equal, written, averages[-len(written) :]))
    assert torch.equal(weights(trainer.model), averages[-1]) == use_at_end, (
        "else what was trained is another, or this shows nothing"
    )
