"""What a model of transformers writes while it is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from drivetrain import (
    Callback,
    CallbackContext,
    ConfigError,
    ModelError,
    Precision,
    Trainer,
    TrainingConfig,
    component,
    make_component,
)
from drivetrain_transformers import SamplePromptsCallback, token_loss

ROWS = [
    {"input_ids": ids, "labels": ids} for ids in torch.randint(4, 260, (16, 12), generator=torch.Generator().manual_seed(0))
]


def trainer(folder: Path, model: nn.Module, *callbacks: Callback, **options: Any) -> Trainer:
    given: dict[str, Any] = {"max_duration": "4st", "per_device_batch_size": 2, "device": "cpu", "output_dir": folder}
    given |= {"run_name": "a", "standard_callbacks": False, "resume": "never"}
    config = TrainingConfig(**{**given, **options})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(
        model, config, ROWS, ROWS[:4], loss=token_loss, optimizer=optimizer, callbacks=callbacks, precision=Precision()
    )


def sampler(tokenizer_dir: Path, **options: Any) -> SamplePromptsCallback:
    given = {"prompts": ["the quick", "Why?"], "tokenizer": str(tokenizer_dir), "length": 5}
    made = make_component("callback", {"use": "sample_prompts", **given, **options})
    assert isinstance(made, SamplePromptsCallback)
    return made


def samples(folder: Path) -> str:
    return (folder / "a" / "samples.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("chat", [False, True])
def test_the_texts_are_what_generate_gives(
    tmp_path: Path, tokenizer_dir: Path, tokenizer: Any, make_llama: Callable[..., Any], chat: bool
) -> None:
    model = make_llama()
    trainer(tmp_path, model, sampler(tokenizer_dir, temperature=0, chat=chat)).train()
    assert samples(tmp_path).count("samples after 4 steps") == 1
    for prompt in ("the quick", "Why?"):
        ids = tokenizer(f"<|user|>{prompt}<|end|>\n<|assistant|>" if chat else prompt, return_tensors="pt")["input_ids"]
        for _ in range(5):  # by hand: the likeliest token each time
            ids = torch.cat([ids, model.eval()(ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        text = tokenizer.decode(ids[0, -5:] if chat else ids[0], skip_special_tokens=True)
        shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
        assert (f"{prompt}\n> {shown}" if chat else shown) in samples(tmp_path)


def test_training_does_not_notice(tmp_path: Path, tokenizer_dir: Path, make_llama: Callable[..., Any]) -> None:
    """With dropout, so that a number taken from the global generator shows."""

    @component
    class Disturb(Callback):
        def on_step_end(self, ctx: CallbackContext) -> None:
            torch.rand(1)

    def end(*callbacks: Callback) -> list[torch.Tensor]:
        model = make_llama(attention_dropout=0.3)
        trainer(tmp_path, model, *callbacks).train()
        assert model.training
        return [parameter.detach().clone() for parameter in model.parameters()]

    plain, sampled, disturbed = end(), end(sampler(tokenizer_dir, every="1st")), end(Disturb())
    assert samples(tmp_path).count("samples after") == 4
    assert all(map(torch.equal, plain, sampled))
    assert not all(map(torch.equal, plain, disturbed)), "negative control"


def test_at_evaluations_the_weights_that_are_evaluated_write(
    tmp_path: Path, tokenizer_dir: Path, make_llama: Callable[..., Any]
) -> None:
    zero: list[bool] = []

    @component
    class Swaps(Callback):
        """Evaluates other weights than it trains, as `ema` does."""

        def on_evaluate_start(self, ctx: CallbackContext) -> None:
            self.kept = {name: value.clone() for name, value in ctx.model.state_dict().items()}
            for parameter in ctx.model.parameters():
                parameter.data.zero_()

        def on_evaluate_end(self, ctx: CallbackContext) -> None:
            ctx.model.load_state_dict(self.kept)

    model = make_llama()
    generate = model.generate

    def noted(*given: Any, **options: Any) -> Any:
        zero.append(not any(parameter.any() for parameter in model.parameters()))
        return generate(*given, **options)

    model.generate = noted
    run = trainer(tmp_path, model, Swaps(), sampler(tokenizer_dir, at_evaluation=True, prompts=["a"]), eval_interval="3st")
    run.train()
    assert zero == [True, True], "after steps 3 and 4, at whose end is no second one"
    run.evaluate()
    assert len(zero) == 2, "no run, no sample"
    trainer(tmp_path, model, Swaps(), sampler(tokenizer_dir, prompts=["a"])).train()
    assert zero[2:] == [False], "control"


def test_refuses_what_it_cannot_do_before_training(tmp_path: Path, tokenizer_dir: Path, make_llama: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="needs a model of transformers with generate"):
        trainer(tmp_path, nn.Linear(2, 2), sampler(tokenizer_dir)).train()
    with pytest.raises(ModelError, match="needs a tokenizer"):
        trainer(tmp_path, make_llama(), sampler(tokenizer_dir, tokenizer="")).train()
    for wrong in ({"prompts": []}, {"prompts": [""]}, {"length": 0}, {"temperature": -1.0}):
        with pytest.raises(ConfigError):
            sampler(tokenizer_dir, **wrong)
