"""Where two state trees differ, bit by bit."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from drivetrain_checkpoint.format import Tree
from drivetrain_checkpoint.looking import plain

_CONTAINERS = (dict, list, tuple)


def differences(first: Tree, second: Tree, path: str = "") -> Iterator[str]:
    """A line for each tensor or value that differs, in the order of the first tree."""
    where = plain(path) or "the state"
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        yield from (f"{where}: {text}" for text in _of_tensors(first, second))
    elif type(first) is not type(second):
        yield f"{where}: {_short(first)} → {_short(second)}"
    elif isinstance(first, dict):
        for key in [*first, *(key for key in second if key not in first)]:
            yield from _entry(first, second, key, f"{path}.{key}" if path else str(key))
    elif isinstance(first, (list, tuple)):
        one, two = dict(enumerate(first)), dict(enumerate(second))
        for index in range(max(len(one), len(two))):
            yield from _entry(one, two, index, f"{path}[{index}]")
    elif not _same(first, second):
        yield f"{where}: {_short(first)} → {_short(second)}"


def _entry(first: dict[Any, Tree], second: dict[Any, Tree], key: Any, path: str) -> Iterator[str]:
    if key not in second:
        yield f"{plain(path)}: only in the first"
    elif key not in first:
        yield f"{plain(path)}: only in the second"
    else:
        yield from differences(first[key], second[key], path)


def _of_tensors(first: Tensor, second: Tensor) -> Iterator[str]:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        yield f"{_short(first)} → {_short(second)}"
    elif first.numel() and not torch.equal(_bits(first), _bits(second)):
        wide = torch.complex128 if first.is_complex() else torch.float64
        gap = (first.to(wide) - second.to(wide)).abs()
        changed = int((_bits(first) != _bits(second)).reshape(first.numel(), -1).any(1).sum())
        yield f"{changed} of {first.numel()} elements differ, by at most {gap.max().item():.3g} ({_short(first)})"


def _bits(tensor: Tensor) -> Tensor:
    """The bytes: NaN equals NaN, and 0.0 is not -0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, float):
        return struct.pack("d", first) == struct.pack("d", second)
    return bool(first == second)


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    text = plain(f"a {type(value).__name__} of {len(value)}" if isinstance(value, _CONTAINERS) else repr(value))
    return text if len(text) <= 60 else f"{text[:59]}…"
