"""The state as it is now, in host memory: what a background thread may write while the training goes on.

Tensors in host memory are copied at once: after that the training may change them. Tensors on a GPU are copied by the GPU, on
a stream of their own and into pinned memory. What only the optimizer's step changes (parameters and the optimizer's state) is
copied while the next forward and backward run; the training's stream waits for the copy just before that step, the host does
not. Everything else, such as the statistics of batch norm, is copied first, and the training's stream waits for it at once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from attrs import define, evolve, field
from torch import Tensor

from drivetrain_checkpoint.errors import CheckpointError
from drivetrain_checkpoint.format import Packed


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
class Staging:
    """Host buffers, made at the first save and used again for those that follow."""

    _buffers: dict[tuple[str, str], Tensor] = field(factory=dict)
    _streams: dict[torch.device, torch.cuda.Stream] = field(factory=dict)

    def copy(self, packed: Packed, stepped: Iterable[Tensor] = ()) -> Staged:
        """Copy all tensors to the host. The buffers must not be in use: the save before this one is complete.

        Args:
            packed: the state.
            stepped: the tensors that only the optimizer's step changes.
        """
        wanted = {(file, name): tensor for file, tensors in packed.tensors.items() for name, tensor in tensors.items()}
        self._buffers = {key: self._buffer(key, tensor) for key, tensor in wanted.items()}
        late = {_address(tensor) for tensor in map(_local, stepped) if tensor.is_cuda}
        by_device: dict[torch.device, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {}
        for key, tensor in wanted.items():
            if tensor.is_cuda:
                by_device.setdefault(tensor.device, ([], []))[_address(tensor) in late].append(key)
            else:
                self._buffers[key].copy_(tensor.detach())
        copies = [self._start(device, wanted, now, later) for device, (now, later) in by_device.items()]
        tensors = {file: {name: self._buffers[file, name] for name in names} for file, names in packed.tensors.items()}
        return Staged(evolve(packed, tensors=tensors), copies)

    def _buffer(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is not None and (buffer.dtype, buffer.shape) == (tensor.dtype, tensor.shape):
            return buffer
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)

    def _start(
        self,
        device: torch.device,
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
                self._buffers[key].copy_(wanted[key].detach(), non_blocking=True)
            current.wait_event(stream.record_event())
            for key in later:
                self._buffers[key].copy_(wanted[key].detach(), non_blocking=True)
            event = stream.record_event()
        versions = [(".".join(key), wanted[key], _version(wanted[key])) for key in later]
        return Copies(stream, event, [wanted[key] for key in [*now, *later]], versions)


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a divided tensor."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _version(tensor: Tensor) -> int:
    """How often a tensor has been changed in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
