"""Text that the model writes, to see what it has learned."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import Callback, Duration, ModelError, component, hook, option
from drivetrain_lm.model import BYTES

if TYPE_CHECKING:
    from drivetrain import CallbackContext

_WIDTH = 80


@component
class SampleTextCallback(Callback):
    """Continue a prompt with a byte-level model at the run's end, and every `every` or after each evaluation if that is wanted.

    At an evaluation the model has the weights that are evaluated: with `ema`, their averages. Elsewhere it has those that are trained.
    The sample goes to the standard output and to samples.txt in the run's directory. The model is in eval mode meanwhile, and
    random numbers come from a generator of the callback's own, seeded anew for each sample: training goes on as if nothing had
    happened.
    """

    prompt: str = option(default="def ", help="the text to continue")
    length: int = option(default=400, at_least=1, help="bytes to add")
    temperature: float = option(default=0.7, at_least=0, help="higher is more varied; 0 takes the likeliest byte each time")
    top_k: int | None = option(default=None, at_least=1, help="sample among this many likeliest bytes; false for all")
    seed: int = option(default=0, at_least=0, help="fixes the sample")
    every: Duration | None = option(default=None, help="sample during the run as well, such as '500st'")
    at_evaluation: bool = option(default=False, help="sample with each evaluation as well, by the weights that are evaluated")

    _sampled_at: int | None = attrs.field(default=None, init=False, repr=False)  # -1: not yet; None: outside of a run

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Refuse a model that cannot do it now, not at the end of the run."""
        self._sampled_at = -1
        model: Any = ctx.trainer.model
        if not callable(getattr(model, "generate", None)) or getattr(model, "vocab_size", None) != BYTES:
            raise ModelError(
                f"sample_text needs a model over bytes with generate(), such as gpt with vocab_size = {BYTES}; "
                f"{type(model).__name__} is none. Remove the callback or change the model."
            )
        if not self.prompt:
            raise ModelError("sample_text needs a prompt of at least one character.")

    def on_every(self, ctx: CallbackContext) -> None:
        """A sample on the way."""
        self._sample(ctx)

    @hook(tryfirst=True)
    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        """A sample while averages are still in the place of the weights; none in an evaluation beside the run."""
        if self.at_evaluation and self._sampled_at is not None:
            self._sample(ctx)

    @hook(trylast=True)
    def on_run_end(self, ctx: CallbackContext) -> None:
        """A sample of the trained model; none when the run failed or was interrupted."""
        if ctx.trainer.output.completed and self._sampled_at != ctx.step:
            self._sample(ctx)
        self._sampled_at = None

    def _sample(self, ctx: CallbackContext) -> None:
        """On every rank: with sharded weights each forward takes all of them. Rank 0 prints and writes."""
        text = self._generate(ctx)
        self._sampled_at = ctx.step
        if not ctx.is_main:
            return
        title = f"-- sample after {ctx.step} steps "
        framed = f"\n{title:-<{_WIDTH}}\n{text}\n{'-' * _WIDTH}\n"
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(framed.encode(encoding, "replace").decode(encoding), flush=True)
        with (ctx.run_dir / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(framed)

    def _generate(self, ctx: CallbackContext) -> str:
        model: Any = ctx.trainer.model
        ids = torch.tensor([list(self.prompt.encode())], device=ctx.device)
        generator = torch.Generator(ctx.device).manual_seed(self.seed)
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with ctx.precision.forward() or nullcontext():
                ids = model.generate(ids, self.length, temperature=self.temperature, top_k=self.top_k, generator=generator)
        finally:
            for module in training:
                module.training = True
        return readable(bytes(ids[0].tolist()))


def readable(text: bytes) -> str:
    """Bytes as UTF-8 text in which only newlines and tabs control a terminal; what is no text shows as a replacement mark."""
    decoded = text.decode(errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in decoded)
