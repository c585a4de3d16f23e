"""Sending batches ahead, on a machine without a GPU: what is asked of torch.cuda, in which order."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from drivetrain.ahead import sent_ahead
from drivetrain.data import Window

Pair = namedtuple("Pair", "x y")
CPU = torch.device("cpu")


class Cuda:
    """Stands in for torch.cuda and writes down what is done on which stream."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.current = "compute"
        log, cuda = self.said, self

        class Stream:
            def __init__(self, device: Any) -> None:
                self.name = "copies"

            def wait_event(self, event: Any) -> None:
                log.append(f"{self.name} waits for {event.name}")

        class Event:
            count = 0

            def __init__(self) -> None:
                Event.count += 1
                self.name = f"event {Event.count}"

            def record(self, stream: Any) -> None:
                log.append(f"{self.name} on {stream.name}")

        self.Stream, self.Event = Stream, Event

        def current_stream(device: Any) -> Any:
            made = Stream(device)
            made.name = cuda.current
            return made

        self.current_stream = current_stream

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    original = Tensor.to

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made.said.append(f"copy of {int(tensor.flatten()[0])} on {made.current}, non_blocking={kwargs.get('non_blocking')}")
        return original(tensor, *args, **kwargs)

    def kept(tensor: Tensor, stream: Any) -> None:
        made.said.append(f"{int(tensor.flatten()[0])} is kept for {stream.name}")

    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: False)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: made.said.append("pinned") or tensor.clone())  # type: ignore[func-returns-value]
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "record_stream", kept)
    return made


def windows(count: int) -> list[Window]:
    return [Window([torch.tensor([float(index)])], [1], 1) for index in range(count)]


def test_a_window_is_sent_before_the_one_before_it_is_used(cuda: Cuda) -> None:
    got = []
    for window in sent_ahead(iter(windows(3)), CPU, cuda):
        cuda.said.append("step")
        got.append(int(window.batches[0]))
    assert got == [0, 1, 2]
    copies = [["pinned", f"copy of {i} on copies, non_blocking=True", f"event {i + 1} on copies"] for i in range(3)]
    uses = [[f"compute waits for event {i + 1}", f"{i} is kept for compute", "step"] for i in range(3)]
    assert cuda.said == [*copies[0], *copies[1], *uses[0], *copies[2], *uses[1], *uses[2]]


def test_nested_batches_keep_their_form(cuda: Cuda) -> None:
    batch = {"a": torch.ones(1), "b": [torch.zeros(1), "text"], "c": Pair(torch.ones(2), (torch.ones(1), 3))}
    (window,) = sent_ahead([Window([batch], [4], 4)], CPU, cuda)
    found = window.batches[0]
    assert list(found) == ["a", "b", "c"] and found["b"][1] == "text" and isinstance(found["c"], Pair) and found["c"].y[1] == 3
    assert (window.counts, window.total) == ([4], 4)
    assert sum("is kept for compute" in line for line in cuda.said) == 4


def test_no_window_is_no_window(cuda: Cuda) -> None:
    assert list(sent_ahead([], CPU, cuda)) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_values_arrive() -> None:
    device = torch.device("cuda", 0)
    for index, window in enumerate(sent_ahead(windows(50), device)):
        assert window.batches[0].device == device and int(window.batches[0]) == index
