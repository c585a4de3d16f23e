"""Fused kernels of Liger (Hsu et al. 2024, arXiv:2410.10989) for one model. liger-kernel is imported only where it is needed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain import ConfigError, Loss, Problem
from drivetrain_transformers.loss import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DEVICES = ("cuda", "xpu", "npu")  # types that Liger has kernels for; ROCm's is "cuda" as well
_EXAMPLES = ("llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma2", "gemma3_text", "phi3", "olmo2")
# Liger replaces the rotary embedding in transformers' modules only, for every model of the process, and not in an instance.
_KERNELS = {"rope": False}


def check_liger(device: torch.device, config: PreTrainedConfig) -> None:
    """See whether Liger can do anything for a model, before its weights are loaded.

    Raises:
        ConfigError: when it has no kernels for the device or the type of model, or is not installed.
    """
    if device.type not in DEVICES:
        raise _refusal(f"has no kernels for the device {device}, only for {', '.join(DEVICES)}. Leave it out here")
    try:
        known: Mapping[str, Any] = importlib.import_module(
            "liger_kernel.transformers.monkey_patch"
        ).MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise _missing(error) from error
    if config.model_type not in known:
        some = ", ".join(name for name in _EXAMPLES if name in known)
        raise _refusal(f"has no kernels for a model of the type {config.model_type!r}. It has them for {some} and others")
    if getattr(config, "output_router_logits", False):
        raise _refusal("cannot weight the loss of a router as that of the tokens. Set config.output_router_logits = false")


def apply_liger(model: PreTrainedModel) -> None:
    """Give this model Liger's norms and MLPs, and in training its cross entropy, fused with the head; no other model changes.

    Weights and their names stay as they are. In training the model's `.loss` is then a `Loss` as before, and its logits, which
    are never kept, are None. In evaluation and generation the head is the model's own.

    Raises:
        ConfigError: when liger-kernel is not installed.
    """
    from transformers.integrations.liger import apply_liger_kernel

    plain = type(model).forward
    with _others_as_they_were():
        try:
            apply_liger_kernel(model, _KERNELS)
        except ImportError as error:
            raise _missing(error) from error
    fused = vars(model).pop("forward", None)
    if fused is not None:  # there is none for some types, such as granite
        model.forward = MethodType(_summed(plain, fused.__func__), model)


def _summed(plain: Callable[..., Any], fused: Callable[..., Any]) -> Callable[..., Any]:
    """A forward whose loss in training is Liger's, as a sum with its weight; everything else is as `plain` has it."""

    @wraps(plain)  # generation looks at the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if not self.training or labels is None or not _is_linear(self.get_output_embeddings()):
            return plain(self, *args, **kwargs)
        # What the sum is divided by. By their number the gradients, which are computed here, would be smaller; fp16 loses such.
        kwargs["num_items_in_batch"] = 1
        outputs = fused(self, *args, **kwargs)
        outputs.loss = Loss(outputs.loss, (labels[:, 1:] != IGNORED).sum())
        return outputs

    return forward


def _is_linear(head: Any) -> bool:
    """Whether a head computes x Wᵀ and nothing else. Liger takes its weight and never calls it: it would pass over a bias or an
    adapter, and cannot use a sharded weight (DTensor)."""
    bias: Any = getattr(head, "bias", None)
    return type(head) is nn.Linear and bias is None and not hasattr(head.weight, "to_local")


@contextmanager
def _others_as_they_were() -> Iterator[None]:
    """Put back what is replaced meanwhile in the modules of transformers and torch, where later models would find it.

    Given an instance, Liger patches it, but also replaces the classes of its parts for the whole process.
    """
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("transformers.models.") and module]
    before = [(vars(module), dict(vars(module))) for module in (*modules, nn, nn.functional)]
    try:
        yield
    finally:
        for now, then in before:
            now.update({name: value for name, value in then.items() if now.get(name) is not value})


def _missing(error: ImportError) -> ConfigError:
    return _refusal(f"needs liger-kernel, which cannot be imported: {error}. pip install 'drivetrain-transformers[liger]'")


def _refusal(why: str) -> ConfigError:
    return ConfigError([Problem("model.transformers.liger", why)])
