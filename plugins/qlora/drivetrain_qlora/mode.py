"""The training mode: quantize the base model, put adapters in, train and save those alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from drivetrain import Component, ModelError, PluginError, component, option, state
from drivetrain_qlora.layers import norms_to_fp32

if TYPE_CHECKING:
    from drivetrain import CallbackContext


@component
class QLoRA(Component):
    """Fine-tune adapters on a frozen model whose linear layers are held in four bits.

    The linear layers, all but the head, are stored in NF4 with doubly quantized constants (4.127 bits a weight) and multiply in
    the run's precision, bf16 as a rule; embeddings and head are stored in that precision, norms in fp32. A LoRA adapter beside
    each of them is all that is trained, and all that checkpoints hold: the base model is built and quantized anew on resume,
    and must be the same. With `quantize = false` this is LoRA on the weights as they are; with `dora = true` it is DoRA. Any
    `nn.Module` will do.

    Sources: Dettmers et al. 2023 (arXiv:2305.14314), section 3, equations 5 and 6; LoRA, Hu et al. 2021 (arXiv:2106.09685),
    equation 3; DoRA, Liu et al. 2024 (arXiv:2402.09353), equation 5.
    """

    kind: ClassVar[str] = "mode"
    adapters: ClassVar[bool] = True

    r: int = option(default=16, at_least=1, help="rank of the adapters")
    alpha: float = option(default=16.0, at_least=0, help="their effect is multiplied by alpha / r")
    dropout: float = option(default=0.05, at_least=0, below=1, help="dropout before the adapters")
    target_modules: list[str] | None = option(
        default=None,
        help="names of the layers that get one, such as ['q_proj', 'v_proj']; by default all linear ones but the head",
    )
    dora: bool = option(default=False, help="train a magnitude for each output as well (DoRA)")
    quantize: bool = option(default=True, help="hold the linear layers in NF4; false for LoRA on the weights as they are")

    base: str = state(default="")  # what the frozen weights were before they were quantized

    def make_quantized_model(self, ctx: CallbackContext) -> nn.Module:
        """Put the linear layers into four bits.

        Raises:
            PluginError: when bitsandbytes does not work here.
        """
        model = ctx.model
        self.base = fingerprint(model)
        compute = ctx.precision.dtype or torch.float32
        if self.quantize:
            try:
                from drivetrain_qlora.quantize import cast_rest, quantize
            except (ImportError, OSError, RuntimeError) as error:
                raise PluginError(
                    f"qlora: bitsandbytes, which quantizes, does not work here: {error}. Repair it (pip install bitsandbytes), "
                    "or set training_mode = { use = 'qlora', quantize = false }."
                ) from error
            quantize(model, compute, ctx.device)
            cast_rest(model, compute)
        norms_to_fp32(model)
        return model

    def make_adapted_model(self, ctx: CallbackContext) -> nn.Module:
        """Freeze the model and put the adapters in.

        Raises:
            ConfigError: for a target that matches no layer.
            ModelError: when there is no layer to adapt.
        """
        from drivetrain_qlora.adapt import add_adapters

        return add_adapters(ctx.model, self.target_modules, self.r, self.alpha, self.dropout, self.dora, ctx.config.seed)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back what was saved; the frozen weights are not part of it and must be those of then."""
        if saved.get("base") != self.base:
            raise ModelError(
                "qlora: the base model is another one than when this run was saved. Adapters fit only the weights they were "
                "trained on: give the same model, from the same files (or with the same seed), or another run_name."
            )
        super().load_state_dict(saved)


def merge(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The trained model without adapters: their effect is in the weights. The adapted model is used up by it.

    Args:
        model: `trainer.model` of a run in the mode qlora.
        dtype: type of the weights; merging is done in fp32.

    Raises:
        ModelError: when the model has no adapters.
    """
    if not hasattr(model, "merge_and_unload"):
        raise ModelError(f"qlora: {type(model).__name__} has no adapters to merge.")
    from drivetrain_qlora.adapt import merged

    return merged(model, dtype)  # type: ignore[arg-type]


def fingerprint(model: nn.Module) -> str:
    """A hash that differs for different weights: of every parameter's name, shape and some values spread over it.

    In half precision, so that it does not depend on how the weights were stored: the same model loaded as fp32 and as bf16 are
    one.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // 64)].to(torch.bfloat16)
        digest.update(str(some.tolist()).encode())
    return digest.hexdigest()
