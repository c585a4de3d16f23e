"""Batches that travel to the device while the step before them is computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from drivetrain.data import Window
from drivetrain.loss import map_tensors


def sent_ahead(windows: Iterable[Window], device: torch.device, cuda: Any = torch.cuda) -> Iterator[Window]:
    """The same windows on a CUDA device, each copied on a stream of its own while the one before is in use.

    The copies come from page-locked memory, or they would wait for each other. The step's stream waits for the copy, not the host;
    and a tensor's memory is given away only when that stream is done with it (`Tensor.record_stream`).

    Args:
        windows: on the host.
        device: a CUDA device.
        cuda: `torch.cuda`, or what stands in for it.
    """
    stream = cuda.Stream(device)
    upcoming: tuple[Window, Any] | None = None
    for window in windows:
        sent = _send(window, device, stream, cuda)
        if upcoming is not None:
            yield _arrived(*upcoming, device, cuda)
        upcoming = sent
    if upcoming is not None:
        yield _arrived(*upcoming, device, cuda)


def _send(window: Window, device: torch.device, stream: Any, cuda: Any) -> tuple[Window, Any]:
    def copied(tensor: Tensor) -> Tensor:
        pinned = tensor if tensor.is_pinned() or tensor.device.type != "cpu" else tensor.pin_memory()
        return pinned.to(device, non_blocking=True)

    with cuda.stream(stream):
        batches = [map_tensors(batch, copied) for batch in window.batches]
        event = cuda.Event()
        event.record(stream)
    return window._replace(batches=batches), event


def _arrived(window: Window, event: Any, device: torch.device, cuda: Any) -> Window:
    using = cuda.current_stream(device)
    using.wait_event(event)

    def kept(tensor: Tensor) -> Tensor:
        tensor.record_stream(using)
        return tensor

    for batch in window.batches:
        map_tensors(batch, kept)
    return window
