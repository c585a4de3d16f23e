"""Which device a run uses, and moving data to it."""

from __future__ import annotations

import os
from typing import Any

import torch

from drivetrain.cluster import detect
from drivetrain.errors import ConfigError, PluginError, Problem
from drivetrain.loss import map_tensors
from drivetrain.registry import candidates, load

_KNOWN = ("cpu", "cuda", "mps", "xpu")


class DeviceManager:
    """Choose a device and serve what depends on it.

    Args:
        wanted: "auto" (the accelerator that torch finds, else the CPU), "cpu", "cuda", "cuda:1", "mps", "xpu", or the name of a
            plugin of the kind `device`.
        local_rank: which of the machine's devices this process takes when `wanted` names none.

    Raises:
        ConfigError: for an unknown or missing device, naming those that exist.
    """

    def __init__(self, wanted: str = "auto", local_rank: int = 0) -> None:
        self.device = _choose(wanted, local_rank)

    @property
    def type(self) -> str:
        """ "cpu", "cuda", "mps", "xpu", …"""
        return self.device.type

    @property
    def count(self) -> int:
        """How many devices of this type the process can see."""
        return 1 if self.type == "cpu" else int(torch.accelerator.device_count())

    @property
    def name(self) -> str:
        """What a person calls it: "cpu", "NVIDIA H200"."""
        if self.type == "cuda":
            return str(torch.cuda.get_device_name(self.device))
        return str(self.device)

    def to(self, value: Any) -> Any:
        """Copy the tensors in nested mappings, lists and tuples to the device; everything else is passed on.

        The copy does not block when the host memory is pinned.
        """
        return map_tensors(
            value,
            lambda tensor: tensor.to(self.device, non_blocking=True),
            lambda other: other.to(self.device) if hasattr(other, "to") else other,
        )

    def synchronize(self) -> None:
        """Wait until the device has done everything asked of it."""
        if self.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def memory(self) -> dict[str, int]:
        """Bytes in use and at the peak on the device; empty where torch cannot tell."""
        if self.type == "mps":
            return {"allocated": torch.mps.current_allocated_memory()}
        if self.type not in ("cuda", "xpu"):
            return {}
        module = torch.get_device_module(self.device)
        return {"allocated": module.memory_allocated(self.device), "peak": module.max_memory_allocated(self.device)}

    @property
    def total_memory(self) -> int | None:
        """Bytes of the device's own memory; None for the CPU, and where torch cannot tell."""
        if self.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        return int(torch.xpu.get_device_properties(self.device).total_memory) if self.type == "xpu" else None

    def __repr__(self) -> str:
        return f"DeviceManager({self.name!r})"


def divide_cores(processes: int) -> None:
    """Divide the machine's cores among its processes of a run, unless somebody has: OMP_NUM_THREADS, or a launcher that binds each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ and cores == os.cpu_count():
        torch.set_num_threads(max(1, cores // processes))


def _choose(wanted: str, local_rank: int) -> torch.device:
    kind, _, index = wanted.partition(":")
    if kind == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device("cpu") if found is None else _mine(found.type, local_rank)
    if kind in candidates("device"):
        return _from_plugin(kind, int(index) if index.isdigit() else local_rank)
    if kind not in _KNOWN or (index and not index.isdigit()) or (kind == "cpu" and int(index or 0) > 0):
        raise _refusal(wanted, f"no device is called {wanted!r}")
    if kind == "cpu":
        return torch.device(wanted)
    if not (getattr(torch, kind, None) or getattr(torch.backends, kind)).is_available():
        raise _refusal(wanted, f"torch {torch.__version__} sees no {kind} device here")
    if not index:
        return _mine(kind, local_rank)
    if int(index) >= torch.accelerator.device_count():
        raise _refusal(wanted, f"there are only {torch.accelerator.device_count()} {kind} devices")
    return torch.device(kind, int(index))


def _mine(kind: str, local_rank: int) -> torch.device:
    """The device of this process: the machine's as it counts its processes, or the only one that its launcher lets it see."""
    if kind == "mps":
        return torch.device(kind)
    count = torch.accelerator.device_count()
    if local_rank < count:
        return torch.device(kind, local_rank)
    if count == 1 and detect().launcher in ("slurm", "mpi"):  # bound to it; that no other has it is seen when all have met
        return torch.device(kind, 0)
    many = f"{count} {kind} device{'s' if count != 1 else ''}"
    message = f"process {local_rank + 1} of this machine has none: there are only {many}. Start {count}, or train with device = 'cpu'."
    if (place := detect()).launcher == "mpi" and len(place.evidence) == 2:
        message += (
            " (The launcher does not say which of a machine's processes this is: set MPI_LOCALRANKID and MPI_LOCALNRANKS.)"
        )
    raise ConfigError([Problem("device", message)])


def _from_plugin(name: str, local_rank: int) -> torch.device:
    make = load("device", name)
    device = make(local_rank) if callable(make) else None
    if not isinstance(device, torch.device):
        raise PluginError(f"the device plugin {name!r} gave {device!r} instead of a torch.device")
    return device


def _refusal(wanted: str, why: str) -> ConfigError:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    available = f"cpu, {found.type}" if found else "cpu"
    others = ", ".join(candidates("device"))  # whether they can be used, only their plugins know
    also = f"; where there is what they need, also {others}" if others else ""
    return ConfigError([Problem("device", f"{why}. Available: {available}, or 'auto'{also}.")])
