"""The model component: a causal language model of transformers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import attrs

from drivetrain import Component, ConfigError, Loss, ModelError, Problem, component, option
from drivetrain_transformers.loss import summed_cross_entropy, token_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from drivetrain import CallbackContext


@component
class TransformersModel(Component):
    """A causal language model of Hugging Face transformers: from a directory, a GGUF file, the hub, or a configuration alone.

    Weights are read from safetensors or GGUF files only, never from pickles. Code that comes with a model is not run; who wants
    that sets `trust_remote_code` on the object in Python. The loss is summed over tokens with their number as its weight, so
    gradients are those of the whole step however its tokens are spread over microbatches and ranks. Evaluation reports
    `bits_per_token` and `perplexity`.
    """

    kind: ClassVar[str] = "model"

    path: str = option(
        default="", help="a directory, a GGUF file, package:NAME/FILE, or a name on the hub; by default the key model_name"
    )
    from_scratch: bool | None = option(
        default=None, help="take only the configuration and make random weights; by default as the training mode says"
    )
    config: dict[str, Any] = option(
        factory=dict, help="changes to the model's configuration; without a path all of it, model_type included"
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = option(
        default="fp32", help="type of the weights as loaded; auto: as they are stored. For precision bf16 keep fp32 here"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = option(
        default="auto", help="attention implementation; auto: transformers' choice"
    )
    liger: bool = option(default=False, help="fused kernels of liger-kernel, on a GPU, for the types of models that it knows")
    # No option, so that no file can switch it on: whoever runs foreign code says so in a program.
    trust_remote_code: bool = attrs.field(default=False, init=False, repr=False)

    def make_model(self, ctx: CallbackContext) -> PreTrainedModel:
        """Load the model, or make it new. Its `.loss` is a `Loss`.

        Raises:
            ConfigError: when neither a path nor a configuration says which model, or Liger has no kernels for it here.
            ModelError: when it cannot be loaded.
        """
        from drivetrain_transformers.liger import apply_liger, check_liger
        from drivetrain_transformers.loading import DTYPES, load_config, load_model, new_model, source_of

        path = self.path or ctx.config.model_name or ""
        if not path and not self.config:
            raise ConfigError([Problem("model.transformers.path", "is missing: give it, or model_name, or config")])
        source = source_of(path) if path else None
        config = load_config(source, self.config, self.trust_remote_code)
        if self.liger:
            check_liger(ctx.device, config)
        options: dict[str, Any] = {"dtype": DTYPES[self.dtype]}
        if self.attention != "auto":
            options["attn_implementation"] = self.attention
        scratch = getattr(ctx.mode, "from_scratch", False) if self.from_scratch is None else self.from_scratch
        if source is None or scratch:
            model = new_model(config, self.trust_remote_code, **options)
        else:
            model = load_model(source, config, self.trust_remote_code, **options)
        model.name_or_path = path  # where the data find the tokenizer
        model.config.use_cache = False  # of keys and values, for generation; it would also switch document masks off
        model.loss_function = summed_cross_entropy
        if self.liger:
            apply_liger(model)
        return model

    def make_loss(self, ctx: CallbackContext) -> Callable[[Any, Any], Loss]:
        """The summed loss, also of the models that do not use their `loss_function`."""
        return token_loss

    def make_metrics(self, ctx: CallbackContext) -> Callable[[Any, Any], dict[str, Loss]]:
        """The loss in bits: nats / ln 2."""

        def metrics(outputs: Any, batch: Any) -> dict[str, Loss]:
            loss = token_loss(outputs, batch)
            return {"bits_per_token": Loss(loss.total / math.log(2), loss.weight)}

        return metrics

    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        """Perplexity: e to the mean loss, which is no mean of anything itself."""
        if "eval/loss" in ctx.eval_metrics:
            ctx.eval_metrics["eval/perplexity"] = math.exp(min(ctx.eval_metrics["eval/loss"], 700.0))

    def save(self, model: Any, directory: Path) -> None:
        """Write a trained model as a directory that transformers loads, with the tokenizer that lies where the model came from."""
        from drivetrain_transformers.loading import load_tokenizer

        model.config.use_cache = True
        model.save_pretrained(directory)
        if not model.name_or_path:
            return
        try:
            load_tokenizer(model.name_or_path).save_pretrained(directory)
        except ModelError as error:
            warnings.warn(f"the model was saved in {directory}, without a tokenizer: {error}", stacklevel=2)
