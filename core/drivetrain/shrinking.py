"""Out of memory: go on with smaller microbatches. A step keeps its samples, and the weighted loss its value."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from drivetrain.data import Window
from drivetrain.loss import fields_of_dataclass, samples_in


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory for a tensor, on a device or on the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def release(error: BaseException, device: torch.device) -> None:
    """Let go of what the failed attempt holds: the frames of its traceback have the activations."""
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = None
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def divided(window: Window, parts: int) -> Window | None:
    """The same samples with each microbatch in `parts` of about equal size, or in single samples; None when all are that already."""
    batches: list[Any] = []
    counts: list[int] = []
    for batch, count in zip(window.batches, window.counts, strict=True):
        size = samples_in(batch)
        number = max(1, min(parts, size))  # the last microbatch of an epoch may have few
        cuts = [size * part // number for part in range(number + 1)]
        for begin, end in pairwise(cuts):
            batches.append(_rows(batch, begin, end, size) if number > 1 else batch)
            counts.append(end - begin if count else 0)
    return Window(batches, counts, window.total) if len(batches) > len(window.batches) else None


def _rows(batch: Any, begin: int, end: int, size: int) -> Any:
    """A batch's samples from `begin` to `end`; what does not have one entry for each sample is passed on."""
    if isinstance(batch, Tensor):
        return batch[begin:end] if batch.dim() and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {key: _rows(value, begin, end, size) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_rows(value, begin, end, size) for value in batch))
    if isinstance(batch, (tuple, list)) and any(isinstance(value, (Tensor, Mapping, tuple, list)) for value in batch):
        return type(batch)(_rows(value, begin, end, size) for value in batch)
    if (held := fields_of_dataclass(batch)) is not None:
        return replace(batch, **{name: _rows(value, begin, end, size) for name, value in held.items()})
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == size:
        return batch[begin:end]
    return batch
