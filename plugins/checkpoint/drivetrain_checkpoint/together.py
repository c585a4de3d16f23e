"""A save by all processes of a run, each its own parts of a divided state, and one commit that all agree on.

Process 0 makes the temporary directory and tells the others its name. Each writes its files there in the background, makes them
durable, and then leaves a note with their sizes and hashes. When all notes are there, process 0 writes the manifest and renames the
directory: the checkpoint exists from then on, and not before. The processes' trainings meet only when they meet anyway, to hear
how it went; a failure of one of them is a failure for all, and leaves nothing behind.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, evolve, field
from torch import Tensor
from torch.distributed.tensor import DTensor

from drivetrain_checkpoint.errors import CheckpointError
from drivetrain_checkpoint.format import Packed, Path_
from drivetrain_checkpoint.manifest import FileEntry
from drivetrain_checkpoint.parts import Parts
from drivetrain_checkpoint.resharding import Share
from drivetrain_checkpoint.store import Store
from drivetrain_checkpoint.text import INDEX_FILE, dump_json, load_json

if TYPE_CHECKING:
    from drivetrain import CallbackContext, Strategy

_NOTE = "written-{:05d}.json"
_MOST_NOTE_BYTES = 1 << 16
_PAUSES = (0.01, 0.02, 0.05, 0.1, 0.2)  # seconds between two looks for the others' notes, growing
GRACE = 5.0  # seconds that process 0 waits for the others' parts when the run has failed: they may be gone


@define
class StrategyLayout:
    """How a strategy divides a run's tensors: each like the weight that it belongs to."""

    _strategy: Strategy
    _weights: Mapping[str, Tensor]
    _parameters: list[Tensor]

    @classmethod
    def of(cls, ctx: CallbackContext) -> StrategyLayout:
        """The run's, whose strategy divides tensors."""
        parameters = [p for group in ctx.optimizer.param_groups for p in group["params"]]
        return cls(ctx.strategy, ctx.model.state_dict(keep_vars=True), parameters)

    def divided(self, path: Path_, tensor: Tensor) -> tuple[Parts, object] | None:
        """What `Layout` says: everything of model and optimizer, and whatever else is divided."""
        if path[0] not in ("model", "optimizer") and not isinstance(tensor, DTensor):
            return None
        like = self._like(path, tensor.shape)
        return self._parts(tensor, like), like if path[0] == "model" else None

    def room(self, path: Path_, shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Parts] | None:
        """What `Layout` says."""
        like = self._like(path, shape)
        if not isinstance(like, DTensor):
            return None
        empty = torch.empty_like(like.detach(), dtype=dtype)
        return empty, self._parts(empty, like)

    def _like(self, path: Path_, shape: torch.Size) -> Tensor | None:
        """The weight whose layout a tensor of the state has: itself, an optimizer's parameter, or one of the same name and shape."""
        if len(path) == 4 and path[:2] == ("optimizer", "state"):
            index = path[2]
            like = self._parameters[index] if isinstance(index, int) and index < len(self._parameters) else None
        else:
            like = self._weights.get(str(path[-1]))
        return like if isinstance(like, Tensor) and like.shape == shape else None

    def _parts(self, tensor: Tensor, like: Tensor | None) -> Parts:
        found = self._strategy.pieces(tensor, tensor if like is None else like)
        assert found is not None
        return Parts(tensor.shape, tensor.dtype, dict(found))


def share_of(packed: Packed, share: Share, rank: int) -> Packed:
    """What one process writes: its share of the parts; the first one also everything that is not divided, and the index."""
    if rank:
        return Packed(share.tensors, {}, {})
    wholes = {name: tensors for name, tensors in packed.tensors.items() if tensors}
    return evolve(packed, tensors={**wholes, **share.tensors}, texts={**packed.texts, INDEX_FILE: share.index})


@define
class Together:
    """One save, as one of the processes sees it."""

    store: Store
    directory: Path
    step: int
    rank: int
    ranks: int
    _stopped: threading.Event = field(factory=threading.Event)
    _reason: str = ""
    _cause: OSError | None = None
    _hurried: bool = False
    _deadline: float | None = None

    def write(self, packed: Packed) -> Path:
        """Write this process's files; on process 0, wait for the others' and commit. Returns the checkpoint's directory there.

        Raises:
            CheckpointError: when this process or another one could not write, or the others are gone.
        """
        try:
            entries = self.store.write_part(self.directory, packed, self.step)
            if self.rank:
                self._leave_note(entries)
                return self.directory
            entries |= self._others()
        except BaseException:
            if self.rank == 0:
                self.store.give_up(self.directory)
            raise
        return self.store.commit(self.directory, self.step, entries)

    def _leave_note(self, entries: Mapping[str, FileEntry]) -> None:
        """Say what has been written; the note appears whole. It need not be durable: without it there is no checkpoint."""
        text = dump_json({name: [entry.size, entry.sha256] for name, entry in entries.items()})
        final = self.directory / _NOTE.format(self.rank)
        self.store.write_note(final, text, self.step)

    def _others(self) -> dict[str, FileEntry]:
        """Wait for all notes; they are removed."""
        missing = {rank: self.directory / _NOTE.format(rank) for rank in range(1, self.ranks)}
        found: dict[str, FileEntry] = {}
        looks = 0
        while missing:
            present = [(rank, path) for rank, path in missing.items() if path.exists()]
            for rank, path in present:
                found |= _read_note(path)
                self.store.files.remove(path)
                del missing[rank]
            if not missing:
                break
            self._check_stopped(missing)
            self._stopped.wait(_PAUSES[min(looks, len(_PAUSES) - 1)])
            looks = 0 if present else looks + 1
        return found

    def _check_stopped(self, missing: Mapping[int, Path]) -> None:
        if self._stopped.is_set():
            raise CheckpointError(self._reason) from self._cause
        if self._hurried and self._deadline is None:
            self._deadline = time.monotonic() + GRACE
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise CheckpointError(
                f"the checkpoint of step {self.step} was given up: rank {min(missing)} has not written its part of it"
            )

    # -- the training's side -----------------------------------------------------------------------------------------------

    def has_failed(self, future: Future[Any], gather: Callable[[Any], list[Any]]) -> bool:
        """Whether it has failed on any process; all of them come here."""
        return any(gather(future.done() and future.exception() is not None))

    def agree(self, future: Future[Any], gather: Callable[[Any], list[Any]]) -> None:
        """Wait until all processes have written; when one could not, process 0 gives up. All of them come here."""
        error = future.exception() if self.rank else None
        for rank, said in enumerate(gather(None if error is None else (str(error), _number(error)))):
            if said is not None and not self._stopped.is_set():
                text, number = said
                self._reason, self._cause = f"on rank {rank}: {text}", None if number is None else OSError(number, text)
                self._stopped.set()
        if self.rank == 0 and future.exception() is not None:
            self.store.give_up(self.directory)  # again: another process may have been writing there the first time

    def hurry(self) -> None:
        """The run has failed, and the others may be gone."""
        self._hurried = True


def _number(error: BaseException) -> int | None:
    """Of the disk's refusal, if that is what it was."""
    return (error.__cause__.errno or 0) if isinstance(error.__cause__, OSError) else None


def _read_note(path: Path) -> dict[str, FileEntry]:
    if path.stat().st_size > _MOST_NOTE_BYTES:
        raise CheckpointError(f"{path}: this is not what a process of this run has written")
    return {name: FileEntry(*entry) for name, entry in load_json(path.read_bytes()).items()}
