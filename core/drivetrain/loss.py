"""The weighted loss contract: a loss is a mean over the microbatch's samples, or a total with its weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drivetrain.errors import ModelError

_UNKNOWN = (
    "how many samples a batch of the class {} holds is not known, and it counts as one: lengths in samples, and means over batches of "
    "unequal size, are not exact. Give a tensor, or a mapping, tuple or dataclass of tensors."
)


class Loss(NamedTuple):
    """A loss as a sum and what it is a sum of.

    The engine minimises sum(total) / sum(weight) over all microbatches and ranks of a step, so that neither accumulation nor
    an uneven split of the tokens changes the gradient. A tuple, so that torch's wrappers find the tensor in what a model returns.

    Attributes:
        total: summed loss, a scalar tensor with gradient.
        weight: how much it counts, for instance the number of target tokens; a scalar tensor (kept on the device, never read
            by the host in a step; no gradient goes through it) or a number.
    """

    total: Tensor
    weight: Tensor | float

    def mean(self) -> Tensor:
        """total / weight, a scalar tensor."""
        return self.total / self.weight


def loss_of(outputs: Any) -> Tensor | Loss | None:
    """The loss in what a model returned: a scalar tensor, a `Loss`, `["loss"]` or `.loss`; None when there is none."""
    if isinstance(outputs, Tensor):
        return outputs if outputs.dim() == 0 else None
    if isinstance(outputs, Loss):
        return outputs
    found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return found if isinstance(found, (Tensor, Loss)) else None


def checked(loss: Any, where: str) -> Tensor | Loss:
    """The loss if it can be minimised.

    Raises:
        ModelError: when it is no scalar tensor or `Loss`.
    """
    if isinstance(loss, Loss) or (isinstance(loss, Tensor) and loss.dim() == 0):
        return loss
    raise ModelError(
        f"{where} returned {describe(loss)}, which is not a loss. Return a scalar tensor, Loss(total, weight), a mapping with "
        f"'loss' or an object with .loss, or pass Trainer(..., loss=loss_function)."
    )


def describe(value: Any) -> str:
    """A value in a few words, for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a mapping with the keys {', '.join(map(str, value)) or '(none)'}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__} {value!r}"[:80]


def map_tensors(value: Any, do: Callable[[Tensor], Any], others: Callable[[Any], Any] = lambda other: other) -> Any:
    """The same nested mappings, lists, tuples and dataclasses with `do` applied to the tensors in them, and `others` to whatever else
    they hold."""
    if isinstance(value, Tensor):
        return do(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, do, others) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, do, others) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, do, others) for item in value)
    if (held := fields_of_dataclass(value)) is not None:
        return replace(value, **{name: map_tensors(item, do, others) for name, item in held.items()})
    return others(value)


def fields_of_dataclass(value: Any) -> dict[str, Any] | None:
    """What an object of a dataclass was made of, by name; None for any other."""
    if not is_dataclass(value) or isinstance(value, type):
        return None
    return {f.name: getattr(value, f.name) for f in fields(value) if f.init}


def samples_in(batch: Any) -> int:
    """How many samples a batch holds: the first dimension of its first tensor, or 1. Objects of unknown classes are warned of."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    for part in _parts(batch):
        if isinstance(part, Tensor) and part.dim():
            return part.shape[0]
        if isinstance(part, (Mapping, tuple, list)) or is_dataclass(part):
            return samples_in(part)
    return 1


def _parts(batch: Any) -> Iterable[Any]:
    if isinstance(batch, Mapping):
        return batch.values()
    if isinstance(batch, (tuple, list)):
        return batch
    if (held := fields_of_dataclass(batch)) is not None:
        return held.values()
    if not isinstance(batch, (str, bytes, int, float, type(None))):
        warnings.warn(_UNKNOWN.format(type(batch).__name__), stacklevel=3)
    return ()


def tokens_in(batch: Any) -> int:
    """How many tokens a batch holds: the size of `input_ids`, or of an integer input of two dimensions; otherwise 0."""
    if isinstance(batch, Mapping):
        ids = batch.get("input_ids")
    else:
        ids = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(ids, Tensor) and ids.dim() == 2 and ids.dtype in (torch.int64, torch.int32, torch.uint8, torch.int16):
        return ids.numel()
    return 0
