"""What the machine has in use: memory, disk, processors, GPUs."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

GB = 1e9


class Machine:
    """Asked at each log."""

    def __init__(self, device: torch.device, run_dir: Path | None) -> None:
        self._process = psutil.Process()
        self._device = device if device_memory(device) is not None else None
        self._gpu = _nvml(device)
        self._run_dir = run_dir
        psutil.cpu_percent()  # it measures between calls

    def values(self) -> dict[str, float]:
        """All of it by the names of the log."""
        info = self._process.memory_info()
        found = {"memory/process_gb": info.rss / GB, "memory/process_peak_gb": max(_peak_bytes(info), info.rss) / GB}
        held = device_memory(self._device) if self._device is not None else None
        found |= {"memory/device_gb": held / GB} if held is not None else {}
        found |= {"system/cpu_percent": psutil.cpu_percent(), "system/memory_percent": psutil.virtual_memory().percent}
        if self._run_dir is not None:
            found["system/disk_free_gb"] = psutil.disk_usage(str(self._run_dir)).free / GB
        return found | (self._gpu.values() if self._gpu is not None else {})


class _Gpu:
    """One GPU through NVIDIA's management library."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def values(self) -> dict[str, float]:
        """How busy it is, its memory with that of other programs, and its power."""
        nvml, handle = self._nvml, self._handle
        try:
            return {
                "gpu/percent": float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
                "gpu/memory_gb": nvml.nvmlDeviceGetMemoryInfo(handle).used / GB,
                "gpu/watts": nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            }
        except nvml.NVMLError:  # some values are not to be had on some cards, or in containers
            return {}


def _nvml(device: torch.device) -> _Gpu | None:
    if device.type != "cuda" or find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        identity = str(torch.cuda.get_device_properties(device).uuid)  # CUDA_VISIBLE_DEVICES renumbers devices
        return _Gpu(pynvml, pynvml.nvmlDeviceGetHandleByUUID(identity if identity.startswith("GPU-") else f"GPU-{identity}"))
    except (pynvml.NVMLError, AttributeError):
        return None


def _peak_bytes(info: Any) -> int:
    """The most resident memory this process ever had; psutil knows it on Windows only."""
    if sys.platform == "win32":
        return int(info.peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def device_memory(device: torch.device) -> int | None:
    """The most bytes that tensors have held on an accelerator; None for the CPU and for backends that do not count."""
    if device.type == "cpu":
        return None
    try:
        return torch.accelerator.max_memory_allocated(device)
    except (RuntimeError, ValueError, NotImplementedError):
        return None
