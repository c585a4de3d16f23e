"""Average gradients over processes, in any loop."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Start = Callable[[Tensor], Callable[[], Tensor]]


class GradientSynchronizer:
    """Average gradients over processes: in buckets, while backward still computes those of earlier layers.

    A bucket travels when backward has accumulated the last of its gradients. Buckets start in one order on all ranks, whichever
    parameters a rank does not use: gradients that are missing count as zero, and wait for `reduce`.

    Args:
        parameters: what is trained, in the order in which forward uses it.
        group: the process group; the default one if None. Without any there is one process.
        bucket_mb: size of a bucket in MiB.
        dtype: what gradients travel as; None for their own type. bfloat16 halves the traffic and rounds each gradient and each sum to
            8 bits; float32 adds up gradients of 16 bits without that.
        start: begins the sum of a tensor over the processes and returns a function that waits for it, for communication that is not
            torch.distributed's. Called in the same order on all ranks.
        processes: how many there are, with `start`.

    Example:
        >>> sync = GradientSynchronizer(model.parameters())     # once
        >>> with sync.no_sync():                                # all but the last microbatch of a step
        ...     loss(model, first).sum().backward()
        >>> loss(model, second).sum().backward()
        >>> sync.reduce(weight=len(first) + len(second))        # gradients of sum(loss) / global number of samples
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        group: dist.ProcessGroup | None = None,
        bucket_mb: float = 25.0,
        *,
        dtype: torch.dtype | None = None,
        start: Start | None = None,
        processes: int = 1,
    ) -> None:
        self.group, self.dtype = group, dtype
        self.rider: float | None = None  # a number to travel with the first bucket; `reduce` reads its sum, None costs nothing
        self._begin = self._in_group if start is None else start
        self._processes = None if start is None else processes
        self._buckets = [_Bucket(p) for p in _grouped([p for p in parameters if p.requires_grad], int(bucket_mb * 2**20))]
        self._started = 0  # how many of them travel
        self._local = False  # inside no_sync
        self._no_sync = _NoSync(self)
        me = weakref.ref(self)
        handles = [_listen(parameter, bucket, me) for bucket in self._buckets for parameter in bucket.parameters]
        weakref.finalize(self, _remove, handles)

    def no_sync(self) -> AbstractContextManager[None]:
        """Leave gradients local: for every backward of a step but the last. The context can be entered again and again."""
        return self._no_sync

    @property
    def all_started(self) -> bool:
        """Whether no further bucket of this step is to be started: nothing is left that the newest could travel beside."""
        return self._started == len(self._buckets)

    def reduce(self, weight: float | Tensor | None = None) -> None:
        """Replace each gradient by its sum over ranks, divided by the sum of `weight` over ranks (by the number of ranks if None).

        After the last backward of a step, on all ranks. A weight costs one more reduction, of one number.
        """
        if self._count() == 1:
            for gradient in (p.grad for bucket in self._buckets for p in bucket.parameters):
                if gradient is not None and weight is not None:
                    gradient.div_(weight)
            return
        while self._started < len(self._buckets):
            self._start_next()
        total: float | Tensor = float(self._count())
        if weight is not None and self._buckets:
            device = self._buckets[0].parameters[0].device
            kind = torch.float64 if device.type == "cpu" else torch.float32
            total = self._begin(torch.as_tensor(weight, dtype=kind, device=device).detach().clone().reshape(1))()[0]
        for index, bucket in enumerate(self._buckets):
            rider = bucket.finish(total)
            if index == 0 and rider is not None:
                self.rider = float(rider)
        self._started = 0

    def _count(self) -> int:
        if self._processes is not None:
            return self._processes
        return dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1

    def _in_group(self, flat: Tensor) -> Callable[[], Tensor]:
        work: Any = dist.all_reduce(flat, group=self.group, async_op=True)

        def wait() -> Tensor:
            if work is not None:
                work.wait()
            return flat

        return wait

    def _arrived(self, bucket: _Bucket, parameter: Tensor) -> None:
        if self._local or self._count() == 1:
            return
        if id(parameter) in bucket.arrived:
            raise RuntimeError(
                "a gradient has been accumulated twice before reduce(): put every backward of a step but the last in `with no_sync():`"
            )
        bucket.arrived.add(id(parameter))
        while self._started < len(self._buckets) and self._buckets[self._started].is_full():
            self._start_next()

    def _start_next(self) -> None:
        bucket = self._buckets[self._started]
        flat = bucket.flatten(self.rider if self._started == 0 else None, self.dtype)
        self._started += 1
        bucket.wait = self._begin(flat)


class _Bucket:
    """Parameters of one type and device whose gradients travel together."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.arrived: set[int] = set()  # whose gradients are complete in this step
        self.wait: Callable[[], Tensor] | None = None

    def is_full(self) -> bool:
        return len(self.arrived) == len(self.parameters)

    def flatten(self, rider: float | None, dtype: torch.dtype | None) -> Tensor:
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in self.parameters]
        flat = torch.cat(parts if rider is None else [*parts, parts[0].new_tensor([rider])])
        return flat if dtype is None else flat.to(dtype)

    def finish(self, total: float | Tensor) -> Tensor | None:
        """Wait, and put the means into the gradients; the rider's sum where there was one."""
        assert self.wait is not None
        summed, sizes = self.wait(), [p.numel() for p in self.parameters]
        gradients, rest = summed.split([sum(sizes), len(summed) - sum(sizes)])
        mean = gradients.to(self.parameters[0]).div_(total)
        for parameter, part in zip(self.parameters, mean.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        self.wait = None
        self.arrived.clear()
        return rest if len(rest) else None


class _NoSync(AbstractContextManager[None]):
    def __init__(self, synchronizer: GradientSynchronizer) -> None:
        self._synchronizer = weakref.ref(synchronizer)

    def __enter__(self) -> None:
        self._set(True)

    def __exit__(self, *_: object) -> None:
        self._set(False)

    def _set(self, local: bool) -> None:
        if (synchronizer := self._synchronizer()) is not None:
            synchronizer._local = local


def _grouped(parameters: list[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """Consecutive parameters of one type and device, from the last (whose gradient is ready first), up to `limit` bytes each."""
    groups: list[list[nn.Parameter]] = []
    used = 0
    for parameter in reversed(parameters):
        size = parameter.numel() * parameter.element_size()
        last = groups[-1][-1] if groups else None
        if last is None or (last.dtype, last.device) != (parameter.dtype, parameter.device) or used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(parameter)
        used += size
    return groups


def _listen(parameter: nn.Parameter, bucket: _Bucket, owner: weakref.ref[GradientSynchronizer]) -> Any:
    """Tell the synchronizer, as long as there is one, when backward has accumulated a gradient."""

    def arrived(tensor: Tensor) -> None:
        if (synchronizer := owner()) is not None:
            synchronizer._arrived(bucket, tensor)

    return parameter.register_post_accumulate_grad_hook(arrived)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
