"""Data parallelism over MPI, as the Drivetrain strategy `mpi`."""

from __future__ import annotations

import atexit
import hashlib
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from mpi4py import MPI
from torch import Tensor, nn

from drivetrain import Component, GradientSynchronizer, Strategy, component, option

if TYPE_CHECKING:
    from drivetrain import CallbackContext

__all__ = ["Mpi", "MpiStrategy"]
T = TypeVar("T")


@component
class Mpi(Component):
    """Every process holds the whole model; gradients are summed by `MPI_Iallreduce` in buckets while backward runs.

    For clusters where MPI is what there is. A process that fails aborts all others, which would wait for it for ever.
    """

    kind: ClassVar[str] = "strategy"

    bucket_mb: float = option(default=25.0, help="gradients are reduced in buckets of this size, in MiB")
    cuda_aware: bool = option(default=False, help="hand GPU memory to MPI; the library must have been built for it")
    timeout: float = option(default=600.0, help="seconds of waiting for the others after which a process ends all")
    setup_timeout: float = option(default=900.0, help="the same until the end of the first step")

    def make_strategy(self, ctx: CallbackContext) -> Strategy:
        """A strategy over the processes of MPI_COMM_WORLD."""
        return MpiStrategy(self)


class MpiStrategy(Strategy):
    """All-reduce over MPI_COMM_WORLD, started for each bucket as soon as backward has filled it."""

    name = "mpi"

    def __init__(self, options: Mpi) -> None:
        self.options = options
        self.comm = MPI.COMM_WORLD
        self.rank, self.world_size = self.comm.Get_rank(), self.comm.Get_size()
        self.reason = f"{self.world_size} processes over {MPI.Get_library_version().split(',')[0].strip()}"
        self.waits = _Waits(max(options.timeout, options.setup_timeout))
        self.farewell: _Farewell | None = None
        self.local = False  # inside no_sync
        self.buckets: list[_Bucket] = []
        self.started = 0  # how many of them this step has started

    def setup(self, device: torch.device) -> None:
        """Make the failure of one process end all: the others would wait for it for ever."""
        self.device = device
        if self.world_size > 1:
            self.farewell = _Farewell(self.comm)
            atexit.register(self.farewell.leave)
            threading.Thread(target=self._watch, name="drivetrain-mpi", daemon=True).start()

    def _watch(self) -> None:
        """End all when this process has waited too long; MPI itself never gives up."""
        while (waited := self.waits.seconds()) < self.waits.limit:
            time.sleep(min(1.0, max(0.01, self.waits.limit - waited)))
        stopped = [peer for peer in self.peers if peer.state == "stopped"]
        who = (
            f"{stopped[0]} does not answer: its process {stopped[0].pid} is stopped" if stopped else "a process does not answer"
        )
        sys.stderr.write(f"{who} (rank {self.rank} on {MPI.Get_processor_name()} has waited {waited:.0f} s in MPI)\n")
        sys.stderr.flush()
        os._exit(1)  # the launcher ends the others

    def settled(self) -> None:
        """Wait for less long than until now."""
        self.waits.limit = self.options.timeout

    def judge(self, error: BaseException) -> BaseException:
        """Remember that the run has failed here, and find out whether it has on all ranks alike."""
        if self.farewell is not None:
            alike = self.farewell.say(f"{type(error).__name__}: {error}")
            error.drivetrain_said = alike and self.rank != 0  # type: ignore[attr-defined]
        return error

    def wrap(self, model: nn.Module) -> nn.Module:
        """Give every process rank 0's weights and buffers, and listen for finished gradients."""
        for tensor in [*model.parameters(), *model.buffers()]:
            host = tensor.detach().cpu().contiguous()
            with self.waits:
                self.comm.Bcast(_bytes(host), root=0)
            with torch.no_grad():
                tensor.copy_(host)
        groups = GradientSynchronizer(model.parameters(), bucket_mb=self.options.bucket_mb).buckets
        self.buckets = [_Bucket(group) for group in groups]
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._arrived(bucket))
        return model

    def _arrived(self, bucket: _Bucket) -> None:
        if self.local or self.world_size == 1:
            return
        bucket.missing -= 1
        while self.started < len(self.buckets) and self.buckets[self.started].missing <= 0:
            self._start(self.buckets[self.started])

    def _start(self, bucket: _Bucket) -> None:
        """Start the next bucket. MPI matches collectives by their order, so that they start in the same order on every rank."""
        self.started += 1
        flat = bucket.flatten()
        bucket.buffer = flat if self.options.cuda_aware else flat.cpu()
        bucket.request = self.comm.Iallreduce(MPI.IN_PLACE, bucket.buffer, op=MPI.SUM)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any] | None:
        """Leave gradients local."""
        return _NoSync(self)

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Wait for the buckets under way, and start those that a parameter without a gradient kept waiting."""
        if self.world_size == 1:
            return
        for bucket in self.buckets[self.started :]:
            self._start(bucket)
        for bucket in self.buckets:
            bucket.finish(self.world_size, self.waits)
        self.started = 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, through host memory."""
        host = value.detach().cpu().contiguous().clone()
        with self.waits:
            self.comm.Allreduce(MPI.IN_PLACE, host, op=MPI.SUM)
        return host.to(value.device)

    def gather(self, value: T) -> list[T]:
        """What every rank has."""
        with self.waits:
            return list(self.comm.allgather(value))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        with self.waits:
            self.comm.Barrier()

    def load_model_state(self, model: nn.Module, saved: Mapping[str, Any]) -> None:
        """Every rank has read the same weights."""
        model.load_state_dict(saved)


class _Bucket:
    """Parameters of one type and device whose gradients travel together."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.missing = len(parameters)
        self.buffer = torch.empty(0)
        self.request: Any = None

    def flatten(self) -> Tensor:
        """The gradients in one tensor; fp32 at least, since MPI knows no bfloat16. An unused parameter counts as zero."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([part.reshape(-1) for part in parts])
        return flat.float() if flat.dtype in (torch.bfloat16, torch.float16) else flat

    def finish(self, world_size: int, waits: _Waits) -> None:
        """Wait, and put the mean into the gradients."""
        with waits:
            self.request.Wait()
        mean = self.buffer.div_(world_size)
        for parameter, part in zip(self.parameters, mean.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter)
        self.request, self.missing = None, len(self.parameters)


class _Waits(AbstractContextManager[None]):
    """Since when this process has been waiting for others; entering and leaving store one number."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._since: float | None = None

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._since = None

    def seconds(self) -> float:
        """How long the wait has been; 0 when there is none."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since


class _Farewell:
    """How a process leaves after a failure: together with all others when they have failed as well, else by ending them.

    MPI ends a process only when all come to the end. The words travel on a communicator of their own, beside whatever reduction the
    others may be in.
    """

    def __init__(self, comm: Any) -> None:
        self.comm = comm.Dup()
        self.mine = bytearray(32)
        self.all = bytearray(32 * comm.Get_size())
        self.request: Any = None

    def say(self, text: str) -> bool:
        """Tell the others why this process leaves; whether all do, and rank 0 for the same reason."""
        if self.request is None:
            self.mine[:] = hashlib.sha256(text.encode()).digest()
            self.request = self.comm.Iallgather(self.mine, self.all)
        return self._all_have_spoken(1.0) and self.all[:32] == self.mine

    def leave(self) -> None:
        """At the end of the interpreter, before MPI's own end."""
        if self.request is not None and not MPI.Is_finalized() and not self._all_have_spoken(2.0):
            MPI.COMM_WORLD.Abort(1)

    def _all_have_spoken(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not (done := bool(self.request.Test())) and time.monotonic() < end:
            time.sleep(0.01)
        return done


class _NoSync(AbstractContextManager[None]):
    def __init__(self, strategy: MpiStrategy) -> None:
        self.strategy = strategy

    def __enter__(self) -> None:
        self.strategy.local = True

    def __exit__(self, *_: object) -> None:
        self.strategy.local = False


def _bytes(host: Tensor) -> Any:
    """A tensor's memory for MPI, whatever its type."""
    return host.reshape(-1).view(torch.uint8)
