"""Which process of how many this is, from the environment that a launcher set. Nothing is imported, no port is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from attrs import frozen

from drivetrain.errors import ConfigError, Problem
from drivetrain.registry import load

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_MPI = (  # rank, size, and where the place on the machine may stand
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", [("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")]),
    ("PMI_RANK", "PMI_SIZE", [("MPI_LOCALRANKID", "MPI_LOCALNRANKS"), ("PMI_LOCAL_RANK", "PMI_LOCAL_SIZE")]),
    ("PMIX_RANK", "PMIX_SIZE", [("PMIX_LOCAL_RANK", "PMIX_LOCAL_SIZE")]),
)
_NO_STEP = 0xFFFFFFF0  # numbers from here on are not those of steps that srun was given: batch, interactive, extern


@frozen
class Cluster:
    """The place of this process among those of its run.

    Attributes:
        launcher: "torchrun", "slurm", "mpi" or "none".
        rank: 0 … world_size - 1.
        world_size: processes in the run.
        local_rank: index among the run's processes on this machine.
        local_world_size: how many those are.
        address: host name of rank 0's machine, where the processes meet; None when the launcher did not say.
        port: where they meet there; None when the launcher did not say.
        evidence: the variables that said so.
    """

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str | None = None
    port: int | None = None
    evidence: tuple[str, ...] = ()


def detect(environment: Mapping[str, str] | None = None) -> Cluster:
    """The first launcher of `asked` that left its traces; else one process alone.

    Raises:
        ConfigError: when the variables contradict each other, or are not all there.
    """
    env = os.environ if environment is None else environment
    found = next((answer for _, answer in asked(env) if isinstance(answer, Cluster)), None)
    if found is None:
        found = Cluster("none")
        if here := [name for name in _TORCHRUN if name in env]:
            missing = ", ".join(name for name in (*_TORCHRUN, "MASTER_ADDR", "MASTER_PORT") if name not in env)
            raise _refused(f"of torchrun's variables {', '.join(here)} are set, but not {missing}; set all or none")
    if not 0 <= found.rank < found.world_size or not 0 <= found.local_rank < found.local_world_size:
        said = ", ".join(f"{name}={env[name]}" for name in found.evidence)
        raise _refused(f"the environment of {found.launcher} contradicts itself: {said}")
    return found


def asked(env: Mapping[str, str]) -> Iterator[tuple[str, Cluster | str]]:
    """Each launcher in order, with what it says of this process or why it was not this one.

    The plugin that DRIVETRAIN_CLUSTER names comes first. Then torchrun, which also runs inside jobs of the others; then MPI, whose mpirun
    runs inside SLURM jobs, where it starts a daemon on each machine by srun: SLURM's variables are the daemon's.
    """
    if (name := env.get("DRIVETRAIN_CLUSTER")) is not None:
        found = cast(Any, load("cluster", name))(
            env
        )  # a function from the environment to a `Cluster`, or None where it sees nothing
        yield f"{name} (DRIVETRAIN_CLUSTER)", cast(Cluster, found) if found is not None else "sees nothing of its own"
    yield "torchrun", _torchrun(env)
    yield "mpi", _mpi(env)
    yield "slurm", _slurm(env)


def _torchrun(env: Mapping[str, str]) -> Cluster | str:
    names = (*_TORCHRUN, "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in env]:
        return f"{', '.join(missing)} not set"
    local_size = env.get("LOCAL_WORLD_SIZE", str(_integer(env, "LOCAL_RANK") + 1))
    return Cluster(
        "torchrun",
        _integer(env, "RANK"),
        _integer(env, "WORLD_SIZE"),
        _integer(env, "LOCAL_RANK"),
        int(local_size),
        env["MASTER_ADDR"],
        _integer(env, "MASTER_PORT"),
        names,
    )


def _mpi(env: Mapping[str, str]) -> Cluster | str:
    """Open MPI; MPICH, Hydra and Intel MPI; PMIx as other launchers set it. srun speaks PMI and PMIx as well, for its own tasks."""
    for rank, size, places in _MPI:
        if rank not in env or size not in env:
            continue
        if _in_step(env) and (env[rank], env[size]) == (env.get("SLURM_PROCID"), env.get("SLURM_NTASKS")):
            return f"{rank} and {size} are those of srun's tasks"
        local, local_size = next((pair for pair in places if set(pair) <= set(env)), (rank, size))
        return Cluster(
            "mpi",
            _integer(env, rank),
            _integer(env, size),
            _integer(env, local),
            _integer(env, local_size),
            env.get("MASTER_ADDR"),
            int(env["MASTER_PORT"]) if "MASTER_PORT" in env else None,
            tuple(dict.fromkeys((rank, size, local))),
        )
    return f"none of {', '.join(row[0] for row in _MPI)} set"


def _slurm(env: Mapping[str, str]) -> Cluster | str:
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    if missing := [name for name in names if name not in env]:
        return f"{', '.join(missing)} not set"
    if not _in_step(env):
        return "no step of srun's: the shell of sbatch or salloc is one process"
    if "SLURM_PTY_PORT" in env:
        return "srun --pty: a person at a prompt is one process"
    size, here = _integer(env, "SLURM_NTASKS"), _tasks_here(env)
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", ""))
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if here == size else _first_host(nodes))
    port = int(env["MASTER_PORT"]) if "MASTER_PORT" in env else None
    if port is None and here != size:  # the same on all machines, another one for another job or step
        port = 15000 + (int(env.get("SLURM_JOB_ID", "0")) * 31 + int(env["SLURM_STEP_ID"])) % 15000
    return Cluster("slurm", _integer(env, names[0]), size, _integer(env, names[2]), here, address, port, names)


def _in_step(env: Mapping[str, str]) -> bool:
    return "SLURM_STEP_ID" in env and _integer(env, "SLURM_STEP_ID") < _NO_STEP


def _refused(why: str) -> ConfigError:
    return ConfigError([Problem("distributed", why)])


def _integer(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise _refused(f"the environment variable {name}={env[name]!r} is no number") from None


def _tasks_here(env: Mapping[str, str]) -> int:
    """The tasks on this node, from lists such as "2(x3),1"."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", ""))
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    node = int(env.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else _integer(env, "SLURM_LOCALID") + 1


def _first_host(nodes: str) -> str | None:
    """The first host of a SLURM node list such as "gpu[07-09,12],cpu1"."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return match[1] + (match[2] or "") if match else None
