"""Token rows of one length, made of documents that do not see each other.

Every row carries `position_ids` that begin at 0 with each document. From them transformers (5 and later) makes the attention
mask: each token sees its own document's earlier tokens and nothing else (block-diagonal for eager, sdpa and flex attention; for
flash attention with one row in a microbatch). Labels leave out each document's first token, which nothing may predict.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor
from torch.utils.data import Dataset

from drivetrain import DataError
from drivetrain_transformers.loss import IGNORED

if TYPE_CHECKING:
    from drivetrain import CallbackContext


@frozen
class Sample:
    """Tokens and, for each, its label: itself, or -100 where it does not count."""

    ids: Sequence[int]
    labels: Sequence[int]


class PackedRows(Dataset[dict[str, Tensor]]):
    """Rows of `context` tokens: "input_ids", "labels" and "position_ids", int64 [context] each.

    Args:
        ids, labels, positions: int32 [rows, context].
    """

    def __init__(self, ids: Tensor, labels: Tensor, positions: Tensor) -> None:
        self.ids, self.labels, self.positions = ids, labels, positions

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return {name: part[0] for name, part in self.fetch([index]).items()}

    def fetch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Several rows as a batch, int64 [len(indices), context] each."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        parts = {"input_ids": self.ids, "labels": self.labels, "position_ids": self.positions}
        return {name: part[chosen].long() for name, part in parts.items()}


def pack_text(documents: Iterable[Sequence[int]], context: int, pad: int) -> PackedRows:
    """Join documents to one stream and cut it into rows; the last row is filled up with padding that does not count.

    A document that goes on in the next row begins anew there, without its earlier part.
    """
    ids: list[int] = []
    starts: list[int] = []
    for document in documents:
        starts.append(len(ids))
        ids += document
    size = len(ids)
    rows = -(-size // context)
    stream = torch.full((rows * context,), pad, dtype=torch.int32)
    stream[:size] = torch.tensor(ids, dtype=torch.int32)
    place = torch.arange(len(stream), dtype=torch.int32)
    first = place % context == 0
    first[[*starts, *([size] if size < len(stream) else [])]] = True  # the padding is a document of its own
    labels = stream.masked_fill(first, IGNORED)
    labels[size:] = IGNORED
    positions = place - torch.where(first, place, 0).cummax(0).values
    return PackedRows(stream.view(rows, context), labels.view(rows, context), positions.view(rows, context))


def pack_whole(samples: Sequence[Sample], context: int, pad: int) -> PackedRows:
    """Put samples into rows without cutting any: longest first, each into the fullest row that has room (best fit).

    Args:
        samples: of at most `context` tokens each.
    """
    rows: list[list[Sample]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for sample in sorted(samples, key=lambda s: -len(s.ids)):
        place = bisect_left(room, (len(sample.ids), 0))
        left, row = room.pop(place) if place < len(room) else (context, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(sample)
        insort(room, (left - len(sample.ids), row))
    ids = torch.full((len(rows), context), pad, dtype=torch.int32)
    labels = torch.full((len(rows), context), IGNORED, dtype=torch.int32)
    positions = torch.zeros((len(rows), context), dtype=torch.int32)
    for row, members in enumerate(rows):
        at = 0
        for sample in members:
            end = at + len(sample.ids)
            ids[row, at:end] = torch.tensor(sample.ids, dtype=torch.int32)
            labels[row, at + 1 : end] = torch.tensor(sample.labels[1:], dtype=torch.int32)
            positions[row, at:end] = torch.arange(end - at, dtype=torch.int32)
            at = end
        positions[row, at:] = torch.arange(context - at, dtype=torch.int32)
    return PackedRows(ids, labels, positions)


class Padding:
    """Joins samples of unequal length: padded on the right, "attention_mask" 0 and label -100 there."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """A batch of int64 [len(samples), longest]."""
        longest = max(len(sample.ids) for sample in samples)
        shape = (len(samples), longest)
        batch = {"input_ids": torch.full(shape, self.pad), "labels": torch.full(shape, IGNORED)}
        batch["attention_mask"] = torch.zeros(shape, dtype=torch.int64)
        for row, sample in enumerate(samples):
            size = len(sample.ids)
            batch["input_ids"][row, :size] = torch.tensor(sample.ids)
            batch["labels"][row, 1:size] = torch.tensor(sample.labels[1:], dtype=torch.int64)
            batch["attention_mask"][row, :size] = 1
        return batch


@torch.no_grad()
def documents_are_apart(ctx: CallbackContext) -> bool:
    """Whether the run's model keeps the documents of a row apart: two rows that differ in their first document only must give
    the second one the same logits.

    Raises:
        DataError: when the model takes no `position_ids` at all.
    """
    ids = torch.arange(1, 13, device=ctx.device).view(3, 4)
    rows = torch.stack((ids[[0, 2]].flatten(), ids[[1, 2]].flatten()))
    positions = torch.arange(4, device=ctx.device).repeat(2, 2)
    training = [module for module in ctx.model.modules() if module.training]
    ctx.model.eval()
    try:
        with ctx.precision.forward() or nullcontext():
            outputs: Any = ctx.model(input_ids=rows, position_ids=positions)
    except TypeError as error:
        raise DataError(
            f"{type(ctx.trainer.model).__name__} cannot keep packed documents apart: {error}. Set data.packing = false."
        ) from error
    finally:
        for module in training:
            module.training = True
    one, other = outputs.logits[:, 4:].float()
    return bool((one - other).abs().max() <= 1e-3 * one.std())
