"""Several processes: what strategies over torch.distributed share."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import itertools
import os
import pickle
import socket
import tempfile
import time
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from drivetrain.cluster import Cluster, detect
from drivetrain.errors import ConfigError, Problem
from drivetrain.meetings import Meetings
from drivetrain.peers import Blame, Peer, hopeless, summary, thread_state
from drivetrain.strategy import Strategy

T = TypeVar("T")
_made: weakref.WeakSet[Any] = weakref.WeakSet()  # the process groups that no caller made
_BACKENDS = {"cuda": "nccl", "xpu": "xccl"}


class ProcessGroupStrategy(Strategy):
    """Base of strategies over torch.distributed: joins the process group that the launcher meant, or uses the one there is.

    Args:
        timeout: seconds after which a collective that a rank does not join fails, from the first step's end on.
        setup_timeout: the same for meeting and until then, when ranks load, compile and read at their own pace.
    """

    def __init__(self, timeout: float = 600.0, setup_timeout: float = 900.0) -> None:
        self.timeout = timedelta(seconds=timeout)
        self.setup_timeout = timedelta(seconds=max(timeout, setup_timeout))
        self.cluster = Cluster("none")
        self._blame: Blame | None = None
        self._meetings: Meetings | None = None
        self._sittings = itertools.count()

    def setup(self, device: torch.device) -> None:
        """Join the process group, unless the caller has made one.

        Raises:
            ConfigError: when the launcher's environment does not say where the processes meet, or they do not meet there.
        """
        self.device = device
        if device.type != "cpu" and device.index is not None:
            torch.accelerator.set_device_index(device.index)  # what objects are sent through
        if not dist.is_initialized():
            self.cluster = detect()
            try:
                self._join(self.cluster, _BACKENDS.get(device.type, "gloo"))
            except RuntimeError as error:
                raise _did_not_meet(self.cluster, error) from error
            _made.add(dist.group.WORLD)
            atexit.register(_leave)
        self._limit(self.setup_timeout)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.reason = f"{self.world_size} processes, started by {self.cluster.launcher}"
        if self.world_size > 1:
            self._blame = Blame(dist.distributed_c10d._get_default_store(), Peer.here(self.rank))

    def settled(self) -> None:
        """Wait for less long than until now."""
        self._limit(self.timeout)

    def _limit(self, timeout: timedelta) -> None:
        """Set the timeout of every group, unless the processes met by the caller's doing: then it is the caller's."""
        if dist.group.WORLD in _made:
            for group in list(dist.distributed_c10d._world.pg_map):
                if dist.get_backend(group) in ("gloo", "nccl"):
                    dist.distributed_c10d._set_pg_timeout(timeout, group)

    def judge(self, error: BaseException) -> BaseException:
        """Name the process whose failure made a collective fail; let the others know of a failure of one's own."""
        if self._blame is None:
            return error
        if self.device.type != "cpu":
            _made.discard(dist.group.WORLD)  # taking a group of devices down may wait for a collective that will never end
        return self._blame.judge(error, self.peers)

    def _join(self, cluster: Cluster, backend: str) -> None:
        given: dict[str, Any] = {"backend": backend, "timeout": self.setup_timeout}
        if self.device.type == "cuda":
            given["device_id"] = self.device
        attempt = _attempt() if cluster.launcher == "torchrun" else 0
        if cluster.launcher == "torchrun" and attempt == 0:
            dist.init_process_group(init_method="env://", **given)
            return
        given |= {"rank": cluster.rank, "world_size": cluster.world_size}
        if attempt:
            address, port, world = cluster.address, int(cluster.port or 0), cluster.world_size
            shared = dist.TCPStore(str(address), port, world, timeout=self.setup_timeout)  # type: ignore[attr-defined]
            dist.init_process_group(store=dist.PrefixStore(f"attempt {attempt}", shared), **given)  # type: ignore[attr-defined]
        elif cluster.world_size == 1:
            dist.init_process_group(store=dist.HashStore(), **given)  # type: ignore[attr-defined]
        elif cluster.address and cluster.port:
            if cluster.rank == 0 and cluster.launcher == "slurm" and not _is_free(cluster.port):
                raise RuntimeError(f"something else has port {cluster.port}; set MASTER_PORT to another one")
            dist.init_process_group(init_method=f"tcp://{cluster.address}:{cluster.port}", **given)
        elif cluster.world_size == cluster.local_world_size:
            store = dist.FileStore(str(_meeting_file(cluster.launcher)), cluster.world_size)  # type: ignore[attr-defined]
            dist.init_process_group(store=store, **given)
        else:
            message = f"{cluster.launcher} started processes on several machines; set MASTER_ADDR and MASTER_PORT to where rank 0 runs"
            raise ConfigError([Problem("distributed", message)])

    def sum(self, value: Tensor) -> Tensor:
        result = value.detach().clone()
        dist.all_reduce(result)
        return result

    def gather(self, value: T) -> list[T]:
        """As `torch.distributed.all_gather_object`, which needs NumPy: torch does without it, and so does the core."""
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        device = torch.device("cpu") if "gloo" in dist.get_backend() else self.device
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(mine)], device=device))
        lengths = [int(size) for size in sizes]
        parts = [torch.zeros(max(lengths), dtype=torch.uint8, device=device) for _ in lengths]
        dist.all_gather(parts, nn.functional.pad(mine, (0, max(lengths) - len(mine))).to(device))
        return [_unpickled(part[:length]) for part, length in zip(parts, lengths, strict=True)]

    def barrier(self) -> None:
        dist.barrier()

    def meet(self, wanted: bool) -> bool:
        if self._blame is None:
            return wanted
        if self._meetings is None:
            store = dist.PrefixStore(f"meetings/{next(self._sittings)}", self._blame.store)  # type: ignore[attr-defined]
            patience = self.timeout.total_seconds()
            self._meetings = Meetings(store, self.rank, self.world_size, lambda: hopeless(self.peers), patience)
        return self._meetings.after_step(wanted)

    def teardown(self) -> None:
        """Keep the process group: a second sitting, or an evaluation, needs it. It ends with the process."""
        if self._meetings is not None:
            self._meetings.leave()
            self._meetings = None


def _attempt() -> int:
    """How often torchrun's agent has started all again beside one store, which still has the addresses of those who have ended."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if shared else 0


def _is_free(port: int) -> bool:
    """torch itself would listen beside another program that has the port for IPv4 alone, and then talk to that one."""
    with socket.socket() as one, contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a store that has ended leaves its port waiting
        one.bind(("", port))
        return True
    return False


def _unpickled(part: Tensor) -> Any:
    """An object of another process of this run."""
    data = bytearray(len(part))
    torch.frombuffer(data, dtype=torch.uint8).copy_(part)
    return pickle.loads(data)


def _leave() -> None:
    """Close the connections while the interpreter is whole, unless they are the caller's."""
    if dist.is_initialized() and dist.group.WORLD in _made:
        dist.destroy_process_group()
        _let_threads_finish()


def _let_threads_finish() -> None:
    """Wait until gloo's threads have let go of their tensors.

    A wrapped model keeps the group, and with it the threads. One that lets go of a tensor when the interpreter has begun to end
    aborts the process. All that it needs is its turn, but on a busy machine that may take long: it is idle when it sleeps each
    time one looks, while nobody holds the interpreter's lock in between.
    """
    tasks = Path("/proc/self/task")
    names = tasks.glob("*/comm") if tasks.exists() else ()
    threads = [name.with_name("stat") for name in names if name.read_text().startswith("pt_gloo_runloop")]
    calm, end = 0, time.monotonic() + 10.0
    while threads and calm < 3 and time.monotonic() < end:
        time.sleep(0.01)
        calm = calm + 1 if all(_sleeps(thread) for thread in threads) else 0


def _sleeps(thread: Path) -> bool:
    try:
        return thread_state(thread) == "S"
    except OSError:
        return True  # it has ended


def _did_not_meet(cluster: Cluster, error: BaseException) -> ConfigError:
    where = f"at {cluster.address}:{cluster.port}" if cluster.address else "on this machine"
    message = (
        f"process {cluster.rank} of {cluster.world_size} did not meet the others {where} ({summary(error)[:300]}). Were all "
        f"{cluster.world_size} started, does that address lead to the machine of rank 0, and is its port open and unused?"
    )
    return ConfigError([Problem("distributed", message)])


def _meeting_file(launcher: str) -> Path:
    """A file that the processes of one launch on this machine, and no others, share: named after the launcher's own job."""
    of_mpi = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_ID")
    of_slurm = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    parent = "" if launcher == "slurm" else os.getppid()  # a container may give each task a parent of its own
    job = "-".join(os.environ.get(name, "") for name in (of_slurm if launcher == "slurm" else of_mpi))
    name = hashlib.sha256(f"{os.getuid()} {parent} {job}".encode()).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"drivetrain-{name}"
