"""`--calibrate`: what this machine's CPU does in a second, measured."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from drivetrain import DrivetrainError
from drivetrain_plan.profiles import DeviceProfile
from drivetrain_plan.recorder import Recorder

_SIZES = (16, 32, 64, 128, 256, 512, 1024)
_ELEMENTS = tuple(2**i for i in range(10, 25, 2))
_TRIES = 15


def calibrate() -> DeviceProfile:
    """Measure matrix products, memory traffic, the cost of an operation, and all-reduce between two processes; about 20 s."""
    measured = {f"products_{name}": _products(dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    measured["traffic"] = _curve(_added)
    measured["heavy"] = _curve(_exponential)
    rates = {name.removeprefix("products_"): max(x / s for x, s in curve) for name, curve in measured.items() if "pro" in name}
    bandwidth = measured["traffic"][-1][0] / measured["traffic"][-1][1]
    link, latency = _all_reduce()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return DeviceProfile(
        name=f"this CPU ({platform.machine()}, {torch.get_num_threads()} threads)",
        rates=rates,
        memory=float(pages),
        bandwidth=bandwidth,
        node_bandwidth=link,
        network_bandwidth=link,
        host_bandwidth=bandwidth,
        latency=latency,
        launch=_launch(),
        products=(0.5, 1.0, 1.6),
        traffic=(0.5, 1.0, 1.6),
        links=(0.5, 1.0, 1.6),
        waits=True,
        measured=measured,
        sources=[f"measured with torch {torch.__version__} on {torch.get_num_threads()} threads"],
    )


def _best(call: Callable[[], object]) -> float:
    """Seconds of one call: the least of several tries, each of at least a few milliseconds."""
    call()
    began = time.perf_counter()
    call()
    times = max(1, int(4e-3 / max(time.perf_counter() - began, 1e-7)))
    least = float("inf")
    for _ in range(_TRIES):
        began = time.perf_counter()
        for _ in range(times):
            call()
        least = min(least, (time.perf_counter() - began) / times)
    return least


def _products(dtype: torch.dtype) -> list[tuple[float, float]]:
    curve = []
    for size in _SIZES:
        a, b = torch.randn(4 * size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
        out = torch.empty(4 * size, size, dtype=dtype)
        curve.append((8.0 * size**3, _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))))  # type: ignore[misc]
    return _growing(curve)


def _added(count: int) -> tuple[float, Callable[[], object]]:
    a, b = torch.randn(count), torch.randn(count)
    return 12.0 * count, lambda: a + b


def _exponential(count: int) -> tuple[float, Callable[[], object]]:
    a = torch.randn(count)
    return 8.0 * count, lambda: nn.functional.silu(a)


def _curve(make: Callable[[int], tuple[float, Callable[[], object]]]) -> list[tuple[float, float]]:
    return _growing([(size, _best(call)) for size, call in map(make, _ELEMENTS)])


def _growing(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A smaller piece of work takes no longer than a larger one; where it did, something else had the processor."""
    for index in reversed(range(len(curve) - 1)):
        curve[index] = (curve[index][0], min(curve[index][1], curve[index + 1][1]))
    return curve


def _launch() -> float:
    """Seconds of one operation in a training step beyond its work: of a model whose work is next to nothing."""
    model = nn.Sequential(*[layer for _ in range(20) for layer in (nn.Linear(8, 8), nn.SiLU(), nn.LayerNorm(8))])
    batch = torch.randn(4, 8)

    def step() -> None:
        model(batch).sum().backward()
        for parameter in model.parameters():
            parameter.grad = None

    recorder = Recorder()
    with recorder:
        step()
    operations = sum(recorder.operations.values())
    return _best(step) / operations


def _all_reduce() -> tuple[float, float]:
    """Bytes/s of the links between two processes here, and seconds of a hop."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "drivetrain_plan.calibrate", folder]
        workers = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise DrivetrainError("plan: two processes of this machine could not reduce a tensor; see their message above.")
    bandwidth, latency = map(float, outputs[0].split())
    return bandwidth, latency


def _worker(folder: str, rank: int) -> None:
    store = dist.FileStore(str(Path(folder) / "store"), 2)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found = []
    for size in (1, 1 << 22):
        tensor = torch.zeros(size)
        dist.all_reduce(tensor)
        least = float("inf")
        for _ in range(10):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            least = min(least, time.perf_counter() - began)
        found.append(least)
    if rank == 0:
        print((1 << 24) / max(found[1] - found[0], 1e-9), found[0])
    dist.destroy_process_group()


def save(profile: DeviceProfile, path: Path) -> Path:
    """Write a profile as TOML that `load_profile` reads.

    Raises:
        DrivetrainError: when the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_toml(profile), encoding="utf-8")
    except OSError as error:
        raise DrivetrainError(f"the profile cannot be written to {path}: {error.strerror or error}") from error
    return path


def _toml(profile: DeviceProfile) -> str:
    single = ("memory", "bandwidth", "per_node", "node_bandwidth", "network_bandwidth", "host_bandwidth", "latency", "launch")
    lines = [f'name = "{profile.name}"', *(f"{key} = {getattr(profile, key):.6g}" for key in single)]
    lines += [f"waits = {str(profile.waits).lower()}"]
    lines += [f"{key} = {[float(x) for x in getattr(profile, key)]}" for key in ("products", "traffic", "links")]
    lines += ["sources = [", *(f'  "{source}",' for source in profile.sources), "]", "", "[rates]"]
    lines += [f"{key} = {value:.6g}" for key, value in profile.rates.items()]
    lines += ["", "[measured]  # work (FLOP or bytes) and seconds"]
    lines += [f"{key} = [{', '.join(f'[{x:.6g}, {s:.6g}]' for x, s in curve)}]" for key, curve in profile.measured.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    _worker(sys.argv[1], int(sys.argv[2]))
