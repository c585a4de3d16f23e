"""One recorded step: its batch's own memory, its graph, and the comparison with an ordinary step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from drivetrain import map_tensors, random_state, set_random_state

if TYPE_CHECKING:
    from drivetrain import CallbackContext

R = TypeVar("R")
_CHECKS = 2  # on the batch that was recorded, and on another one
_TOLERANCE = 1e-2  # of gradients, relative: kernels may add in another order, in 16 bits; what a graph leaves out changes more


class Refused(Exception):
    """A step cannot be a graph. It has been computed: `factor` is what it returned."""

    def __init__(self, reason: str, factor: Tensor | None) -> None:
        super().__init__(reason)
        self.factor = factor


class Recorder(Protocol):
    """What records kernels on one kind of device."""

    def warm_up(self, compute: Callable[[], R]) -> R:
        """Compute as `record` will, without recording."""

    def record(self, compute: Callable[[], R]) -> tuple[R, Callable[[], None]]:
        """What `compute` returns, in memory that stays, and a function that fills it anew. It may hold nothing before that."""


def recorder_for(device: torch.device) -> Recorder | None:
    """The recorder for a device, or None."""
    return _CudaRecorder(device) if device.type == "cuda" else None


class _CudaRecorder:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()  # of all graphs: they run one after the other

    def warm_up(self, compute: Callable[[], R]) -> R:
        """On a stream of its own, as recording is: libraries set up what they need for a stream when it first comes to them."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = compute()
        current.wait_stream(self._stream)
        return result

    def record(self, compute: Callable[[], R]) -> tuple[R, Callable[[], None]]:
        graph, device = torch.cuda.CUDAGraph(), self._stream.device
        try:
            # torch leaves the recording's stream as the current one where it fails; the outer context does not
            with (
                torch.cuda.stream(torch.cuda.current_stream(device)),
                # other threads may go on meanwhile, such as the one that puts the next batches into page-locked memory
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                result = compute()
        except BaseException:
            self._close_pool(device)
            raise
        return result, graph.replay

    def _close_pool(self, device: torch.device) -> None:
        """What torch leaves out where CUDA refuses to end a recording (`CUDAGraph::capture_end` raises first, and `reset` releases only
        what has been ended). Until then the allocator gives no memory back that several streams have used."""
        with suppress(RuntimeError):  # which says that torch has closed it
            torch._C._cuda_endAllocateToPool(device.index, self._pool)
            torch._C._cuda_releasePool(device.index, self._pool)


class Recording:
    """A step of one form of window, recorded.

    Args:
        ctx: the run, whose `loss_tensor` and parameters' gradients a step sets.
        gradients: forward and backward of a window, which returns the gradients' factor.
        recorder: of the run's device.
    """

    def __init__(self, ctx: CallbackContext, gradients: Callable[[Any], Tensor | None], recorder: Recorder) -> None:
        self._ctx, self._gradients, self._recorder = ctx, gradients, recorder
        self._parameters: list[nn.Parameter] = [p for group in ctx.optimizer.param_groups for p in group["params"]]
        self.unchecked = _CHECKS

    def record(self, window: Any) -> Tensor | None:
        """Compute this step in the ordinary way, then record it, and compare the two.

        Raises:
            Refused: when it cannot be recorded, or gives something else.
        """
        batches = map_tensors(window.batches, lambda tensor: tensor.to(self._ctx.device).clone())
        self._inputs = list(_tensors(batches))
        return self._compared(window, lambda: self._capture(window._replace(batches=batches)))

    def check(self, window: Any) -> Tensor | None:
        """Compute this step in both ways, and compare.

        Raises:
            Refused: when they differ.
        """
        return self._compared(window, lambda: None)

    def holds(self) -> bool:
        """Whether the parameters are where they were when this was recorded; others may have moved them."""
        return self._places == _places(self._parameters)

    def launch(self, window: Any) -> Tensor | None:
        """Compute a step by the graph."""
        with torch.no_grad():
            torch._foreach_copy_(self._inputs, list(_tensors(window.batches)), non_blocking=True)
        self._replay()
        for parameter, gradient in zip(self._parameters, self._own_gradients, strict=True):
            parameter.grad = gradient
        ctx = self._ctx
        ctx.batch, ctx.microbatch = window.batches[-1], len(window.batches) - 1
        ctx.loss_tensor = self._loss.clone()  # the run keeps it until it is logged, and the next launch writes over it
        return self._factor

    def _capture(self, window: Any) -> None:
        self._places = _places(self._parameters)
        for parameter in self._parameters:
            parameter.grad = None  # so that backward makes gradients in the graph's memory
        self._factor, self._replay = self._recorder.record(lambda: self._gradients(window))
        assert self._ctx.loss_tensor is not None
        self._loss = self._ctx.loss_tensor
        self._own_gradients = [parameter.grad for parameter in self._parameters]

    def _compared(self, window: Any, prepare: Callable[[], None]) -> Tensor | None:
        ctx = self._ctx
        before = random_state(ctx.device)
        factor = self._recorder.warm_up(lambda: self._gradients(window))
        loss, gradients = ctx.loss_tensor, [parameter.grad for parameter in self._parameters]
        assert loss is not None
        with self._kept_as_it_is():
            set_random_state(before, ctx.device)
            try:
                prepare()
                set_random_state(before, ctx.device)
                self.launch(window)
            except Exception as error:  # of a kernel, a library or the allocator: each has its own
                reason = f"recording failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                raise Refused(reason, factor) from error
            finally:
                its_loss, its_gradients = ctx.loss_tensor, [parameter.grad for parameter in self._parameters]
                ctx.loss_tensor = loss
                for parameter, gradient in zip(self._parameters, gradients, strict=True):
                    parameter.grad = gradient
        difference = _difference([loss, *gradients], [its_loss, *its_gradients])
        if difference is not None:
            if not difference <= _TOLERANCE:
                raise Refused(f"a graph gave other gradients than the ordinary step, by {difference:.1g} of their size", factor)
            self.unchecked -= 1
        return factor

    @contextmanager
    def _kept_as_it_is(self) -> Iterator[None]:
        """Put back buffers and random states, which a step changes and a comparison must not."""
        buffers, ctx = list(self._ctx.model.buffers()), self._ctx
        copies, after = [buffer.clone() for buffer in buffers], random_state(ctx.device)
        try:
            yield
        finally:
            set_random_state(after, ctx.device)
            with torch.no_grad():
                for buffer, copy in zip(buffers, copies, strict=True):
                    buffer.copy_(copy)


def form_of(window: Any) -> Any:
    """What a graph is made for: structure, shapes and types of the batches, and how many samples count."""
    return (_form(window.batches), tuple(window.counts), window.total)


def _form(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.shape, value.dtype)
    if isinstance(value, Mapping):
        return tuple((key, _form(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return (type(value), *map(_form, value))
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)  # a graph has no other of it


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _places(parameters: list[nn.Parameter]) -> list[tuple[int, bool]]:
    return [(parameter.data_ptr(), parameter.requires_grad) for parameter in parameters]


def _difference(one: list[Tensor | None], other: list[Tensor | None]) -> float | None:
    """Of two lists of tensors, relative to the first, over all numbers; waits for the device. None where the first is not finite, as
    with a loss scale that is still too large."""
    if [x is None for x in one] != [x is None for x in other]:
        return float("inf")
    pairs = [(x.double(), y.double()) for x, y in zip(one, other, strict=True) if x is not None and y is not None]
    size = torch.stack([x.norm() for x, _ in pairs]).norm().item()
    apart = torch.stack([(x - y).norm() for x, y in pairs]).norm().item()
    return apart / max(size, 1e-30) if math.isfinite(size) else None
