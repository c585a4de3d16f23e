"""The state as it is now, in host memory: what a background thread may write while the training goes on.

Tensors in host memory are copied at once: after that the training may change them. Tensors on a GPU are copied by the GPU, on
a stream of their own and into pinned memory. What only the optimizer's step changes (parameters and the optimizer's state) is
copied while the next forward and backward run; the training's stream waits for the copy just before that step, the host does
not. Everything else, such as the statistics of batch norm, is copied first, and the training's stream waits for it at once.

Memory that nobody has written to yet is made by the system page by page when it is first written, which takes longer than the copy
itself. So it is made and written to by a thread of its own, as soon as it is known how much will be needed.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress

import torch
from attrs import define, evolve, field
from torch import Tensor

from drivetrain_checkpoint.errors import CheckpointError
from drivetrain_checkpoint.format import Packed

_ALIGNED = 64  # bytes: what a copied tensor begins at a multiple of
_TOUCHED = 1 << 24
_NICENESS = 5  # gives way, but not so far that a busy machine makes the next save wait for this one


def give_way() -> None:
    """Let this thread give way to the training's."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


@define
class Staged:
    """A packed tree whose tensors are host copies, some of them perhaps still on their way."""

    packed: Packed
    _copies: list[Copies]

    def let_change(self) -> None:
        """Called by the training before anything changes parameters or the optimizer's state. Does not block the host."""
        for copies in self._copies:
            copies.let_change()

    def wait(self) -> None:
        """Called by the writer: block until every copy is complete.

        Raises:
            CheckpointError: when a tensor was changed while it was being copied.
        """
        for copies in self._copies:
            copies.wait()


@define
class Copies:
    """Copies from one GPU that are on their way."""

    stream: torch.cuda.Stream
    event: torch.cuda.Event
    sources: list[Tensor]  # kept until they are copied: the allocator would give a gathered tensor's memory to the next one
    versions: list[tuple[str, Tensor, int]]  # those that nothing may change yet, and how often each had been changed
    _may_change: bool = False
    _changed: str = ""

    def let_change(self) -> None:
        """Order whatever the training does from now on after the copies."""
        if self._may_change:
            return
        self._changed = self._find_changed()
        torch.cuda.current_stream(self.stream.device).wait_event(self.event)
        self._may_change = True  # after the look at the versions, before anything changes them: `wait` relies on it

    def wait(self) -> None:
        """Block until the copies are complete, and make sure that they are of what they should be."""
        self.event.synchronize()
        changed = self._find_changed()
        changed = self._changed or ("" if self._may_change else changed)
        self.sources, self.versions = [], []
        if changed:
            raise CheckpointError(
                f"{changed} was changed between two steps while it was being copied for a checkpoint, which was given up; "
                "set asynchronous = false on the checkpoint callback"
            )

    def _find_changed(self) -> str:
        return next((name for name, tensor, version in self.versions if _version(tensor) != version), "")


@define
class Arena:
    """One stretch of host memory for the copies of all tensors of a sort."""

    pinned: bool
    memory: Tensor = field(factory=lambda: torch.empty(0, dtype=torch.uint8))
    _maker: threading.Thread | None = None

    def prepare(self, size: int) -> None:
        """Begin to make so many bytes, in a thread.

        Only pinned memory is taken there: the heap that the C library gives a thread keeps what is freed, for nobody.
        """
        memory = None if self.pinned else torch.empty(size, dtype=torch.uint8)
        self._maker = threading.Thread(target=self._make, args=(size, memory), name="drivetrain-checkpoint-memory", daemon=True)
        self._maker.start()

    def of(self, size: int) -> Tensor:
        """The memory, at least so many bytes; made now if that has not been done."""
        if self._maker is not None:
            self._maker.join()
            self._maker = None
        if len(self.memory) < size:
            self.memory = torch.empty(0, dtype=torch.uint8)  # free the smaller one first
            self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)
        return self.memory

    def _make(self, size: int, memory: Tensor | None) -> None:
        give_way()
        if memory is None:
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)  # is there at once
        else:
            for start in range(0, size, _TOUCHED):
                memory[start : start + _TOUCHED].zero_()
        self.memory = memory


@define
class Staging:
    """Host memory for copies, used again by every save."""

    _arenas: dict[bool, Arena] = field(factory=dict)
    _streams: dict[torch.device, torch.cuda.Stream] = field(factory=dict)

    def prepare(self, tensors: Iterable[Tensor]) -> None:
        """Begin to make the memory for a first copy of tensors such as these, unless there has been one."""
        needed: dict[bool, int] = {}
        if self._arenas:
            return
        for tensor in tensors:
            needed[tensor.is_cuda] = needed.get(tensor.is_cuda, 0) + _rounded(tensor.nbytes)
        for pinned, size in needed.items():
            self._arenas[pinned] = Arena(pinned)
            self._arenas[pinned].prepare(size + _TOUCHED)

    def copy(self, packed: Packed, stepped: Iterable[Tensor] = ()) -> Staged:
        """Copy all tensors to the host. The memory must not be in use: the save before this one is complete.

        Args:
            packed: the state.
            stepped: the tensors that only the optimizer's step changes.
        """
        wanted = {(file, name): tensor for file, tensors in packed.tensors.items() for name, tensor in tensors.items()}
        buffers = self._buffers(wanted)
        late = {_address(tensor) for tensor in map(_local, stepped) if tensor.is_cuda}
        by_device: dict[torch.device, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {}
        for key, tensor in wanted.items():
            if tensor.is_cuda:
                by_device.setdefault(tensor.device, ([], []))[_address(tensor) in late].append(key)
            else:
                buffers[key].copy_(tensor.detach())
        copies = [self._start(device, buffers, wanted, now, later) for device, (now, later) in by_device.items()]
        tensors = {file: {name: buffers[file, name] for name in names} for file, names in packed.tensors.items()}
        return Staged(evolve(packed, tensors=tensors), copies)

    def _buffers(self, wanted: dict[tuple[str, str], Tensor]) -> dict[tuple[str, str], Tensor]:
        """A place for each tensor, one after another."""
        ends: dict[bool, int] = {}
        places = {}
        for key, tensor in wanted.items():
            places[key] = ends.get(tensor.is_cuda, 0)
            ends[tensor.is_cuda] = places[key] + _rounded(tensor.nbytes)
        memory = {pinned: self._arenas.setdefault(pinned, Arena(pinned)).of(end) for pinned, end in ends.items()}
        return {
            key: memory[tensor.is_cuda][places[key] : places[key] + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for key, tensor in wanted.items()
        }

    def _start(
        self,
        device: torch.device,
        buffers: dict[tuple[str, str], Tensor],
        wanted: dict[tuple[str, str], Tensor],
        now: list[tuple[str, str]],
        later: list[tuple[str, str]],
    ) -> Copies:
        """Copy from one GPU on its copying stream: first what the next forward may change, then the rest."""
        current = torch.cuda.current_stream(device)
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(current)  # what was computed up to here
        with torch.cuda.stream(stream):
            for key in now:
                buffers[key].copy_(wanted[key].detach(), non_blocking=True)
            current.wait_event(stream.record_event())
            for key in later:
                buffers[key].copy_(wanted[key].detach(), non_blocking=True)
            event = stream.record_event()
        versions = [(".".join(key), wanted[key], _version(wanted[key])) for key in later]
        return Copies(stream, event, [wanted[key] for key in [*now, *later]], versions)


def _rounded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a divided tensor."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _version(tensor: Tensor) -> int:
    """How often a tensor has been changed in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
