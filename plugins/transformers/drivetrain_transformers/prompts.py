"""What a language model answers while it is trained."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import Callback, Duration, ModelError, component, hook, option

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drivetrain import CallbackContext

_WIDTH = 80


def _some(instance: Any, attribute: Any, value: list[str]) -> None:
    if not value or not all(value):
        raise ValueError("must be a list of texts, none of them empty")


@component
class SamplePromptsCallback(Callback):
    """Continue or answer prompts with a model of transformers at the run's end, and every `every` or after each evaluation.

    At an evaluation the model has the weights that are evaluated: with `ema`, their averages. Elsewhere it has those that are trained.
    The texts go to the standard output and to samples.txt in the run's directory. The model is in eval mode meanwhile, and the random
    numbers are seeded anew for each sample and put back: training goes on as if nothing had happened.
    """

    prompts: list[str] = option(validator=_some, help="the texts to continue; with chat, what the user says")
    chat: bool = option(default=False, help="write each prompt with the tokenizer's chat template, and let the model answer")
    length: int = option(default=100, at_least=1, help="tokens to add at most")
    temperature: float = option(default=0.7, at_least=0, help="higher is more varied; 0 takes the likeliest token each time")
    seed: int = option(default=0, at_least=0, help="fixes the samples")
    tokenizer: str = option(default="", help="as the model's path; by default the model's own tokenizer")
    every: Duration | None = option(default=None, help="sample during the run as well, such as '500st'")
    at_evaluation: bool = option(default=False, help="sample with each evaluation as well, by the weights that are evaluated")

    _tokenizer: Any = attrs.field(default=None, init=False, repr=False)
    _sampled_at: int | None = attrs.field(default=None, init=False, repr=False)  # -1: not yet; None: outside of a run

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Refuse a model that cannot do it now, not at the end of the run.

        Raises:
            ModelError: when the model cannot generate, or nothing says where its tokenizer is, or that has no chat template.
        """
        from drivetrain_transformers.loading import load_tokenizer

        model: Any = ctx.trainer.model
        if not callable(getattr(model, "generate", None)) or not hasattr(model, "generation_config"):
            raise ModelError(f"sample_prompts needs a model of transformers with generate(); {type(model).__name__} is none.")
        path = self.tokenizer or getattr(model, "name_or_path", "") or ctx.config.model_name
        if not path:
            raise ModelError("sample_prompts needs a tokenizer, and the model does not say where it is: set `tokenizer`.")
        self._tokenizer = load_tokenizer(str(path))
        if self.chat and not self._tokenizer.chat_template:
            raise ModelError("sample_prompts: the tokenizer has no chat template; set chat = false.")
        self._sampled_at = -1

    def on_every(self, ctx: CallbackContext) -> None:
        """Samples on the way."""
        self._sample(ctx)

    @hook(tryfirst=True)
    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        """Samples while averages are still in the place of the weights; none in an evaluation beside the run."""
        if self.at_evaluation and self._sampled_at is not None:
            self._sample(ctx)

    @hook(trylast=True)
    def on_run_end(self, ctx: CallbackContext) -> None:
        """Samples of the trained model; none when the run failed or was interrupted."""
        if ctx.trainer.output.completed and self._sampled_at != ctx.step:
            self._sample(ctx)
        self._sampled_at = None

    def _sample(self, ctx: CallbackContext) -> None:
        """On every rank: with sharded weights each forward takes all of them. Rank 0 prints and writes."""
        self._sampled_at = ctx.step
        texts = list(self._generated(ctx))
        if not ctx.is_main:
            return
        title = f"-- samples after {ctx.step} steps "
        framed = f"\n{title:-<{_WIDTH}}\n" + f"\n{'·' * 3}\n".join(texts) + f"\n{'-' * _WIDTH}\n"
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(framed.encode(encoding, "replace").decode(encoding), flush=True)
        with (ctx.run_dir / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(framed)

    def _generated(self, ctx: CallbackContext) -> Iterator[str]:
        model: Any = ctx.trainer.model
        training = [module for module in model.modules() if module.training]
        model.eval()
        devices = [ctx.device] if ctx.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), torch.no_grad(), ctx.precision.forward() or nullcontext():
                torch.manual_seed(self.seed)
                for prompt in self.prompts:
                    yield self._continued(model, prompt, ctx.device)
        finally:
            for module in training:
                module.training = True

    def _continued(self, model: Any, prompt: str, device: torch.device) -> str:
        from transformers import GenerationConfig

        tokenizer, sampled = self._tokenizer, self.temperature > 0
        if self.chat:
            said = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        else:
            text = prompt
        given = tokenizer(text, return_tensors="pt", add_special_tokens=not self.chat).to(device)
        end = tokenizer.eos_token_id
        pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        options = {"temperature": self.temperature, "top_k": 0} if sampled else {}
        wanted = GenerationConfig(
            max_new_tokens=self.length, do_sample=sampled, eos_token_id=end, pad_token_id=0 if pad is None else pad, **options
        )
        made = model.generate(given["input_ids"], attention_mask=given["attention_mask"], generation_config=wanted)
        answer = tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        return _readable(f"{prompt}\n> {answer}" if self.chat else f"{prompt}{answer}")


def _readable(text: str) -> str:
    """Text in which only newlines and tabs control a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
