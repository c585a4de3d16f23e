"""Data parallelism over MPI, as the Drivetrain strategy `mpi`."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
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

    bucket_mb: float = option(default=25.0, above=0, help="gradients are reduced in buckets of this size, in MiB")
    cuda_aware: bool | None = option(
        default=None,
        help="hand GPU memory to MPI, which must have been built for it; by default what the library says of itself",
    )
    timeout: float = option(default=600.0, above=0, help="seconds of waiting for the others after which a process ends all")
    setup_timeout: float = option(default=900.0, above=0, help="the same until the end of the first step")

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
        self.gradients = self.comm.Dup()  # MPI matches collectives by their order, which is each communicator's own
        self.synchronizer: GradientSynchronizer | None = None
        self.aware = is_cuda_aware() if options.cuda_aware is None else options.cuda_aware
        self.met = False  # whether this step's gradients have brought word that a rank wants to meet

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
        size, processes = self.options.bucket_mb, self.world_size
        self.synchronizer = GradientSynchronizer(model.parameters(), bucket_mb=size, start=self._start, processes=processes)
        self.synchronizer.rider = 0.0
        return model

    def _start(self, flat: Tensor) -> Callable[[], Tensor]:
        """Start the sum of a bucket in fp32 at least, since MPI knows no bfloat16.

        The step's last one is not only started but awaited: backward is over, and MPI libraries take about half as long for a blocking sum.
        """
        wide = flat.float() if flat.dtype in (torch.bfloat16, torch.float16) else flat
        if wide.device.type != "cpu" and self.aware:
            torch.accelerator.current_stream(wide.device).synchronize()  # MPI knows nothing of the work that still fills it
            buffer = wide
        else:
            buffer = wide.cpu()
        if self.synchronizer is not None and self.synchronizer.all_started:
            with self.waits:
                self.gradients.Allreduce(MPI.IN_PLACE, buffer, op=MPI.SUM)
            return lambda: buffer
        request = self.gradients.Iallreduce(MPI.IN_PLACE, buffer, op=MPI.SUM)

        def wait() -> Tensor:
            with self.waits:
                request.Wait()
            return buffer

        return wait

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any] | None:
        """Leave gradients local."""
        return None if self.synchronizer is None else self.synchronizer.no_sync()

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Wait for the buckets under way, and send those that a parameter without a gradient kept waiting."""
        if self.synchronizer is not None:
            self.synchronizer.reduce()
            self.met |= self.synchronizer.rider != 0.0

    def meet(self, wanted: bool) -> bool:
        """Word of who wants to meet travels with the next step's gradients."""
        if self.world_size == 1 or self.synchronizer is None:
            return wanted
        met, self.met = self.met, False
        self.synchronizer.rider = float(wanted and not met)
        return met

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


def _bytes(host: Tensor) -> Any:
    """A tensor's memory for MPI, whatever its type."""
    return host.reshape(-1).view(torch.uint8)


def is_cuda_aware() -> bool:
    """Whether the MPI library says that it takes GPU memory.

    MPI 4.1 has a key of the environment's info for it (section 11.4.3); before, Open MPI and MPICH each had a function of their own.
    """
    kinds = MPI.INFO_ENV.Get("mpi_memory_alloc_kinds") or ""
    if "cuda" in kinds.split(","):
        return True
    library = ctypes.CDLL(MPI.__file__)  # the names are looked for in what it was linked to as well
    if hasattr(library, "MPIX_Query_cuda_support"):
        return bool(library.MPIX_Query_cuda_support())
    found = ctypes.c_int(0)
    if hasattr(library, "MPIX_GPU_query_support"):
        library.MPIX_GPU_query_support(ctypes.c_int(0), ctypes.byref(found))  # 0: MPIX_GPU_SUPPORT_CUDA
    return bool(found.value)
