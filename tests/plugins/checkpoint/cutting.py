"""States divided among several ranks that are threads of one process: what tests of saving together share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drivetrain_checkpoint import Files, Store
from drivetrain_checkpoint.format import pack_own
from drivetrain_checkpoint.parts import Parts
from drivetrain_checkpoint.resharding import Planning
from drivetrain_checkpoint.together import Together, share_of

Pieces = dict[tuple[int, ...], Tensor]


def rows(tensor: Tensor, rank: int, ranks: int) -> Pieces:
    """As torch's Shard(0): the first ranks have one row more, the last may have none."""
    if not tensor.dim():
        return {(): tensor}
    each = -(-len(tensor) // ranks)
    start, stop = min(rank * each, len(tensor)), min((rank + 1) * each, len(tensor))
    return {(start, *[0] * (tensor.dim() - 1)): tensor[start:stop]} if stop > start else {}


def grid(tensor: Tensor, rank: int, ranks: int) -> Pieces:
    """Rows and columns: two blocks of columns, each cut into rows."""
    if tensor.dim() < 2 or ranks % 2:
        return rows(tensor, rank, ranks)
    half = tensor.shape[1] // 2
    left = rank % 2 == 0
    found = rows(tensor[:, :half] if left else tensor[:, half:], rank // 2, ranks // 2)
    return {(first, 0 if left else half, *others): piece for (first, _, *others), piece in found.items()}


def striped(tensor: Tensor, rank: int, ranks: int) -> Pieces:
    """Every `ranks`-th run of two rows: several pieces of one tensor on each rank."""
    if not tensor.dim():
        return {(): tensor}
    starts = range(2 * rank, len(tensor), 2 * ranks)
    return {(start, *[0] * (tensor.dim() - 1)): tensor[start : start + 2] for start in starts}


def alike(tensor: Tensor, rank: int, ranks: int) -> Pieces:
    """The whole on every rank."""
    return {(0,) * tensor.dim(): tensor}


Rule = Callable[[Tensor, int, int], Pieces]
RULES: dict[str, Rule] = {"rows": rows, "grid": grid, "striped": striped, "alike": alike}


class Cut:
    """A `Layout` that divides everything of model and optimizer by a rule. What one rank has no room for stays as it was."""

    def __init__(self, rule: Rule, rank: int, ranks: int) -> None:
        self.rule, self.rank, self.ranks = rule, rank, ranks
        self.read: dict[tuple[Any, ...], Pieces] = {}

    def divided(self, path: Any, tensor: Tensor) -> tuple[Parts, object] | None:
        if path[0] not in ("model", "optimizer"):
            return None
        same = tensor.untyped_storage().data_ptr() if path[0] == "model" and tensor.numel() else None
        pieces = self.rule(tensor.detach(), self.rank, self.ranks)
        return Parts(tensor.shape, tensor.dtype, pieces), None if same is None else _known.setdefault(same, object())

    def room(self, path: Any, shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Parts] | None:
        if path[0] not in ("model", "optimizer"):
            return None
        whole = torch.empty(shape, dtype=dtype)
        self.read[path] = self.rule(whole, self.rank, self.ranks)
        return whole, Parts(shape, dtype, self.read[path])


_known: dict[int, object] = {}


class Meeting:
    """`gather` for threads."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.said = threading.Barrier(ranks, timeout=60), [None] * ranks

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.said[rank] = value
        self.barrier.wait()
        found = list(self.said)
        self.barrier.wait()
        return found


def together(ranks: int, act: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Future[Any]]:
    """Do something on every rank at the same time; what came of it."""
    meeting = Meeting(ranks)
    with ThreadPoolExecutor(ranks) as pool:
        return [pool.submit(act, rank, lambda value, rank=rank: meeting.gather(rank, value)) for rank in range(ranks)]


def save(
    run_dir: Path, tree: Any, step: int, ranks: int, rule: Rule = rows, files: dict[int, Files] | None = None
) -> list[Future[Any]]:
    """Save a whole tree as `ranks` ranks that have parts of it would; each one's outcome."""
    stores = [Store(run_dir, (files or {}).get(rank, Files())) for rank in range(ranks)]
    directory = stores[0].begin(step)

    def act(rank: int, gather: Callable[[Any], list[Any]]) -> Path:
        packed, parts = pack_own(tree, Cut(rule, rank, ranks))
        share = Planning().share(parts, rank, gather)
        one = Together(stores[rank], directory, step, rank, ranks)
        future: Future[Path] = Future()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(one.write, share_of(packed, share, rank))
            one.agree(future, gather)
        return future.result()

    return together(ranks, act)
