"""What devices can do: profiles as data files, each number with its source."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import attrs
import tomli

from drivetrain import ConfigError, DrivetrainError, Problem

Curve = Sequence[tuple[float, float]]  # (work, seconds), growing
FRAGMENTS = 0.03  # of a device's memory, an assumption; expandable segments leave less, many sizes more
Range = tuple[float, float, float]  # shares of the peak that are reached: at worst, usually, at best


def _triple(value: Sequence[float]) -> Range:
    worst, usual, best = (float(x) for x in value)
    return worst, usual, best


@attrs.frozen(kw_only=True)
class DeviceProfile:
    """One sort of device, and how such devices are connected.

    Attributes:
        rates: peak FLOP/s of dense matrix products by type ("bf16", "fp16", "tf32", "fp32").
        memory: bytes, as torch sees them (`get_device_properties(…).total_memory`): fewer than the seller's gigabytes.
        reserved: bytes of them that the driver's context and the communication take.
        bandwidth: bytes/s to and from that memory.
        per_node: devices on one machine.
        node_bandwidth, network_bandwidth: bytes/s in one direction, of one device to others on its machine, and off it.
        host_bandwidth: bytes/s from the device to the host's memory.
        latency: seconds of one hop of a collective.
        launch: seconds that the host needs for one operation.
        products, traffic, links: the shares of those peaks that programs reach (worst, usual, best).
        measured: curves of (FLOP or bytes, seconds) on this machine; they take the place of rates where there are some.
    """

    name: str
    rates: dict[str, float]
    memory: float
    bandwidth: float
    reserved: float = 0.0
    per_node: int = 1
    node_bandwidth: float = 1e9
    network_bandwidth: float = 1e9
    host_bandwidth: float = 1e10
    latency: float = 1e-5
    launch: float = 5e-6
    products: Range = attrs.field(default=(0.4, 0.65, 1.0), converter=_triple)
    traffic: Range = attrs.field(default=(0.5, 0.8, 1.0), converter=_triple)
    links: Range = attrs.field(default=(0.4, 0.7, 1.0), converter=_triple)
    waits: bool = False  # whether the host does the work itself, so that its time for an operation adds to it
    measured: dict[str, list[tuple[float, float]]] = attrs.field(factory=dict)
    sources: list[str] = attrs.field(factory=list)

    @property
    def usable(self) -> float:
        """Bytes that a run may take: without what is reserved, and a part for fragments of the allocator."""
        return (self.memory - self.reserved) * (1 - FRAGMENTS)

    def product(self, flops: float, dtype: str, share: int) -> float:
        """Seconds of a matrix product; `share` 0, 1, 2 for worst, usual, best."""
        if (curve := self.measured.get(f"products_{dtype}")) is not None:
            return seconds_on(curve, flops) * self.products[1] / self.products[share]
        return flops / (self.rates.get(dtype, self.rates["fp32"]) * self.products[share])

    def moved(self, size: float, share: int, heavy: bool = False) -> float:
        """Seconds of an operation that is bound by memory; `heavy` for exponentials and the like on a CPU."""
        curve = self.measured.get("heavy" if heavy else "traffic")
        if curve is not None:
            return seconds_on(curve, size) * self.traffic[1] / self.traffic[share]
        return size / (self.bandwidth * self.traffic[share])


def seconds_on(curve: Curve, work: float) -> float:
    """Between measured points a line in logarithms; beyond them the rate of the last."""
    if work <= 0:
        return 0.0
    if work <= curve[0][0]:
        return curve[0][1] * work / curve[0][0]
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if work <= x1:
            part = math.log(work / x0) / math.log(x1 / x0)
            return float(y0 * (y1 / y0) ** part)
    return curve[-1][1] * work / curve[-1][0]


def names() -> list[str]:
    """The profiles that come with this distribution."""
    return sorted(path.name.removesuffix(".toml") for path in resources.files("drivetrain_plan").joinpath("devices").iterdir())


def stored() -> Path:
    """Where `--calibrate` keeps this machine's profile."""
    root = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(root).expanduser() / "drivetrain" / "this-machine.toml"


def load_profile(name: str) -> DeviceProfile:
    """A profile by its name, "auto" (this machine as it was calibrated, else a plain CPU) or the path of a TOML file.

    Raises:
        ConfigError: for an unknown name or a wrong file.
    """
    if name == "auto":
        return load_profile(str(stored())) if stored().is_file() else load_profile("cpu")
    if name.endswith(".toml"):
        return _read(Path(name))
    if name not in names():
        known = ", ".join(names())
        raise ConfigError([Problem("--device", f"no profile is called {name!r}. There are {known}, or give a file.toml.")])
    return parse(resources.files("drivetrain_plan").joinpath("devices", f"{name}.toml").read_text(encoding="utf-8"), name)


def _read(path: Path) -> DeviceProfile:
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise DrivetrainError(f"the device profile {path} cannot be read: {error.strerror or error}.") from error


def parse(text: str, where: str) -> DeviceProfile:
    """A profile from TOML.

    Raises:
        ConfigError: saying which key is missing, unknown or of a wrong type.
    """
    try:
        table = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise ConfigError([Problem("", f"is no TOML: {error}")], where) from error
    fields = {f.name: f for f in attrs.fields(DeviceProfile)}
    problems = [
        Problem(key, f"is no key of a device profile; there are {', '.join(fields)}") for key in table if key not in fields
    ]
    for name, wanted in fields.items():
        if name not in table and wanted.default is attrs.NOTHING:
            problems.append(Problem(name, "is missing"))
        elif name in table and (wrong := _wrong(name, table[name])):
            problems.append(Problem(name, wrong))
    if problems:
        raise ConfigError(problems, where)
    return DeviceProfile(**table)


def _wrong(name: str, value: Any) -> str | None:
    numbers = {"memory", "bandwidth", "per_node", "node_bandwidth", "network_bandwidth", "host_bandwidth"}
    if name in numbers and not (isinstance(value, (int, float)) and value > 0):
        return f"expected a number above 0, got {value!r}"
    if name in ("reserved", "latency", "launch") and not (isinstance(value, (int, float)) and value >= 0):
        return f"expected a number of at least 0, got {value!r}"
    if name in ("products", "traffic", "links"):
        good = isinstance(value, list) and len(value) == 3 and all(isinstance(x, (int, float)) for x in value)
        if not good or not 0 < value[0] <= value[1] <= value[2]:
            return f"expected three growing numbers above 0, got {value!r}"
    if name == "rates" and not (isinstance(value, Mapping) and isinstance(value.get("fp32"), (int, float))):
        return "expected a table with at least fp32"
    return None
