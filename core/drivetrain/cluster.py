"""Which process of how many this is, from the environment that a launcher set. Nothing is imported, no port is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, cast

from attrs import frozen

from drivetrain.errors import ConfigError, Problem
from drivetrain.registry import load


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
    """The plugin that DRIVETRAIN_CLUSTER names, or the first of torchrun, SLURM and MPI that left its traces, in this order; else one
    process alone.

    torchrun comes first because it also runs inside SLURM jobs. An interactive SLURM shell is one process, whatever the job's size.

    Raises:
        ConfigError: when the variables contradict each other.
    """
    env = os.environ if environment is None else environment
    found = _named(env) or _torchrun(env) or _slurm(env) or _mpi(env) or Cluster("none")
    if not 0 <= found.rank < found.world_size or not 0 <= found.local_rank < found.local_world_size:
        said = ", ".join(f"{name}={env[name]}" for name in found.evidence)
        raise ConfigError([Problem("distributed", f"the environment of {found.launcher} contradicts itself: {said}")])
    return found


def _named(env: Mapping[str, str]) -> Cluster | None:
    """What a plugin of the kind `cluster` finds: a function from the environment to a `Cluster`, or None where it sees nothing."""
    name = env.get("DRIVETRAIN_CLUSTER")
    return None if name is None else cast(Cluster | None, cast(Any, load("cluster", name))(env))


def _torchrun(env: Mapping[str, str]) -> Cluster | None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in env for name in names):
        return None
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


def _slurm(env: Mapping[str, str]) -> Cluster | None:
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    if not all(name in env for name in names) or "SLURM_STEP_ID" not in env:
        return None  # sbatch's own shell and salloc have the job's variables but no step: one process
    if env.get("SLURM_JOB_NAME") in ("bash", "zsh", "interactive") or env.get("SLURM_PTY_PORT"):
        return None  # srun --pty: a person at a prompt
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", ""))
    return Cluster(
        "slurm",
        _integer(env, "SLURM_PROCID"),
        _integer(env, "SLURM_NTASKS"),
        _integer(env, "SLURM_LOCALID"),
        _tasks_here(env),
        env.get("MASTER_ADDR") or _first_host(nodes),
        int(env.get("MASTER_PORT", 15000 + int(env.get("SLURM_JOB_ID", "0")) % 5000)),
        names,
    )


def _mpi(env: Mapping[str, str]) -> Cluster | None:
    """Open MPI; MPICH, Hydra and Intel MPI; PMIx as other launchers set it."""
    for rank, size, local, local_size in (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        ("PMIX_RANK", "PMIX_SIZE", "PMIX_LOCAL_RANK", "PMIX_LOCAL_SIZE"),
    ):
        if rank in env and size in env:
            here = _integer(env, local) if local in env else _integer(env, rank)
            count = _integer(env, local_size) if local_size in env else _integer(env, size)
            port = int(env["MASTER_PORT"]) if "MASTER_PORT" in env else None
            address = env.get("MASTER_ADDR")
            return Cluster("mpi", _integer(env, rank), _integer(env, size), here, count, address, port, (rank, size))
    return None


def _integer(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise ConfigError([Problem("distributed", f"the environment variable {name}={env[name]!r} is no number")]) from None


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
