"""`--calibrate`: what this machine's accelerator or CPU does in a second, measured."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from attrs import evolve
from torch import nn

from drivetrain import DeviceManager, DrivetrainError
from drivetrain_plan.profiles import DeviceProfile
from drivetrain_plan.recorder import Recorder
from drivetrain_plan.roofline import phase_seconds

_SIZES = (16, 32, 64, 128, 256, 512, 1024)
_ELEMENTS = tuple(2**i for i in range(10, 25, 2))
_LARGE = (2048, 4096, 8192)  # beside those, on accelerators
_TRIES = 15
_WIDTHS = (48, 192)  # of the reference models


def calibrate(device: str = "auto") -> DeviceProfile:
    """Measure matrix products, memory traffic, the cost of an operation, copies to the host, and all-reduce between two processes
    here, and on a CPU whole training steps; about 30 s.

    Args:
        device: "auto" for the accelerator that torch finds, else the CPU; "cpu", "cuda", "xpu", …

    Raises:
        DrivetrainError: when there is no such device.
    """
    place = DeviceManager(device)
    bench = _Bench(place.device)
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    types |= {} if bench.waits else {"fp16": torch.float16}
    measured = {f"products_{name}": bench.products(dtype) for name, dtype in types.items()}
    measured["traffic"] = bench.curve(_added)
    measured["heavy"] = bench.curve(_exponential)
    rates = {name.removeprefix("products_"): max(x / s for x, s in curve) for name, curve in measured.items() if "pro" in name}
    bandwidth = measured["traffic"][-1][0] / measured["traffic"][-1][1]
    if bench.waits:
        memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        name = f"this CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    else:
        memory, name = float(place.total_memory or 0), place.name
    link, latency = _all_reduce() if bench.waits else _between_accelerators(place.count)
    profile = DeviceProfile(
        name=name,
        rates=rates,
        memory=memory,
        reserved=0.0 if bench.waits else 2.0**30,
        bandwidth=bandwidth,
        per_node=1 if bench.waits else place.count,
        node_bandwidth=link,
        network_bandwidth=link,
        host_bandwidth=bandwidth if bench.waits else bench.to_host(),
        latency=latency,
        launch=bench.launch(),
        products=(0.5, 1.0, 1.6) if bench.waits else (0.7, 1.0, 1.1),
        traffic=(0.5, 1.0, 1.6) if bench.waits else (0.7, 1.0, 1.1),
        links=(0.5, 1.0, 1.6),
        waits=bench.waits,
        measured=measured,
        sources=[f"measured with torch {torch.__version__} on {name}"],
    )
    return _as_in_a_step(profile, bench) if bench.waits else profile


class _Bench:
    """Measures one device.

    Attributes:
        waits: whether the host does the work itself.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.waits = device, device.type == "cpu"
        self.sizes = _SIZES if self.waits else (*_SIZES, *_LARGE)
        self.elements = _ELEMENTS if self.waits else (*_ELEMENTS, 2**26, 2**28)

    def best(self, call: Callable[[], object]) -> float:
        """Seconds of one call: the least of several tries, each of at least a few milliseconds."""
        call()
        times = max(1, int(4e-3 / max(self._timed(call, 1), 1e-7)))
        return min(self._timed(call, times) for _ in range(_TRIES)) / times

    def _timed(self, call: Callable[[], object], times: int) -> float:
        self._done()
        began = time.perf_counter()
        for _ in range(times):
            call()
        self._done()
        return time.perf_counter() - began

    def _done(self) -> None:
        if not self.waits:
            torch.accelerator.synchronize(self.device)

    def products(self, dtype: torch.dtype) -> list[tuple[float, float]]:
        """Seconds by FLOP."""
        curve = []
        for size in self.sizes:
            a = torch.randn(4 * size, size, dtype=dtype, device=self.device)
            b = torch.randn(size, size, dtype=dtype, device=self.device)
            out = torch.empty(4 * size, size, dtype=dtype, device=self.device)
            curve.append((8.0 * size**3, self.best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))))  # type: ignore[misc]
        return _growing(curve)

    def curve(self, make: Callable[[int, torch.device], tuple[float, Callable[[], object]]]) -> list[tuple[float, float]]:
        """Seconds by bytes read and written."""
        return _growing([(size, self.best(call)) for size, call in (make(n, self.device) for n in self.elements)])

    def to_host(self) -> float:
        """Bytes/s from the device to page-locked host memory."""
        tensor = torch.empty(2**26, dtype=torch.uint8, device=self.device)
        target = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
        return 2.0**26 / self.best(lambda: target.copy_(tensor, non_blocking=True))

    def launch(self) -> float:
        """Seconds of one operation in a training step beyond its work: of a model whose work is next to nothing."""
        layers = [layer for _ in range(20) for layer in (nn.Linear(8, 8), nn.SiLU(), nn.LayerNorm(8))]
        model, batch = nn.Sequential(*layers).to(self.device), torch.randn(4, 8, device=self.device)

        def step() -> None:
            model(batch).sum().backward()
            for parameter in model.parameters():
                parameter.grad = None

        recorder = Recorder()
        with recorder:
            step()
        return self.best(step) / sum(recorder.operations.values())


def _as_in_a_step(profile: DeviceProfile, bench: _Bench) -> DeviceProfile:
    """The same with all times as much longer as whole training steps take than their operations, each measured alone, with its
    data in the processor's cache: by how much in a narrow model and in a wide one, and in between by the size of an operation."""
    narrow, wide = (_step(profile, bench, width) for width in _WIDTHS)
    measured = {}
    for name, curve in profile.measured.items():
        ends = [(step.products if name.startswith("products") else step.traffic, step.factor) for step in (narrow, wide)]
        measured[name] = [(work, _between(ends, work) * seconds) for work, seconds in curve]
    return evolve(profile, measured=measured, launch=narrow.factor * profile.launch)


class _Step(NamedTuple):
    """Of a reference model: its time over that of its operations, and the FLOP and bytes that an operation typically has."""

    factor: float
    products: float
    traffic: float


def _step(profile: DeviceProfile, bench: _Bench, width: int) -> _Step:
    model = _Reference(width).to(bench.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    ids = torch.randint(256, (8, 128), device=bench.device)

    def step() -> None:
        model(ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    recorder = Recorder()
    with recorder:
        step()
    (alone,) = phase_seconds(recorder, profile).values()
    products = _typical([operation.flops for operation in recorder.operations if operation.flops])
    traffic = _typical([operation.traffic for operation in recorder.operations if not operation.flops])
    return _Step(bench.best(step) / alone[1], products, traffic)


def _typical(sizes: list[int]) -> float:
    """The size of operations by which most of the work is done: the mean, each weighted by its size."""
    return sum(size**2 for size in sizes) / sum(sizes)


def _between(ends: list[tuple[float, float]], work: float) -> float:
    """On the line between two points in the logarithm of the work; outside of them the nearer one's value."""
    (x0, y0), (x1, y1) = ends
    share = (math.log(work) - math.log(x0)) / (math.log(x1) - math.log(x0))
    return y0 + min(1.0, max(0.0, share)) * (y1 - y0)


class _Reference(nn.Module):
    """A small language model: torch's own layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True) for _ in range(3)
        )
        self.head = nn.Linear(width, 256)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def _added(count: int, device: torch.device) -> tuple[float, Callable[[], object]]:
    a, b = torch.randn(count, device=device), torch.randn(count, device=device)
    return 12.0 * count, lambda: a + b


def _exponential(count: int, device: torch.device) -> tuple[float, Callable[[], object]]:
    a = torch.randn(count, device=device)
    return 8.0 * count, lambda: nn.functional.silu(a)


def _growing(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A smaller piece of work takes no longer than a larger one; where it did, something else had the processor."""
    for index in reversed(range(len(curve) - 1)):
        curve[index] = (curve[index][0], min(curve[index][1], curve[index + 1][1]))
    return curve


def _between_accelerators(count: int) -> tuple[float, float]:
    """Bytes/s of a copy from one device to its neighbour, and an assumed latency; with a single one, what PCIe 4.0 gives."""
    if count < 2:
        return 2e10, 1e-5
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    a, b = (torch.empty(2**28, dtype=torch.uint8, device=torch.device(kind.type, i)) for i in range(2))
    return 2.0**28 / _Bench(a.device).best(lambda: b.copy_(a)), 1e-5


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
    single = (
        "memory",
        "reserved",
        "bandwidth",
        "per_node",
        "node_bandwidth",
        "network_bandwidth",
        "host_bandwidth",
        "latency",
        "launch",
    )
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
