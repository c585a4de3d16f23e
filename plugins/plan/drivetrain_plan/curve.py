"""Memory, throughput and efficiency from 1 to 4,096 ranks as a picture or a page."""

from __future__ import annotations

import argparse
import copy
import html
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import attrs

from drivetrain import ConfigError, DrivetrainError, Problem, TrainingConfig
from drivetrain_plan.planning import for_device
from drivetrain_plan.profiles import DeviceProfile, load_profile
from drivetrain_plan.report import amount, count
from drivetrain_plan.scaling import Family, Size
from drivetrain_plan.simulate import Simulation, simulate

RANKS = tuple(2**i for i in range(13))


class Point(NamedTuple):
    """One number of ranks, each with the configuration's own share of samples."""

    ranks: int
    memory: int  # bytes of a rank at its peak
    low: float  # tokens/s (samples/s) of all ranks
    likely: float
    high: float
    efficiency: float  # of one rank's rate, against one that waits for no communication


@attrs.frozen
class Curve:
    """What one configuration gives on more and more ranks. `unit` is what throughput is counted in, "tokens" or "samples"."""

    strategy: str
    device: DeviceProfile
    unit: str
    points: list[Point]


def curve(config: TrainingConfig, device: str | DeviceProfile = "auto", **given: Any) -> Curve:
    """A point for each power of two that the strategy can be divided into (`shards`, `tensor_parallel`); from one simulated step.

    Raises:
        DrivetrainError: when the run cannot be put together or the step cannot be simulated.
    """
    profile = load_profile(device) if isinstance(device, str) else device
    config = copy.copy(for_device(config, profile, []))
    accumulation, config.gradient_accumulation_steps, config.global_batch_size = config.gradient_accumulation_steps, 1, None
    spec = config.distributed if isinstance(config.distributed, Mapping) else {}
    tensor = int((spec.get("tensor_parallel") or {}).get("size", 1))
    base = _base(config, profile, tensor, {**given, "seen": {}})
    family = Family(base, base, tensor)
    group = int(spec.get("shards") or 0)
    compiled, tf32 = bool(config.compile), base.precision == "tf32"
    points = []
    for ranks in RANKS:
        data_ranks = ranks // tensor
        if ranks % tensor or (group and data_ranks % group):
            continue
        size = Size(ranks, (group or data_ranks) if family.sharded else 1, base.samples_per_microbatch, accumulation)
        time = family.time(size, profile, compiled, tf32)
        low, likely, high = time.total
        per_step = (base.tokens or base.samples_per_microbatch) * accumulation * data_ranks
        alone = time.compute / likely
        points.append(Point(ranks, family.peak(size), per_step / high, per_step / likely, per_step / low, alone))
    strategy = _named(base, tensor, group)
    return Curve(strategy, profile, "tokens" if base.tokens else "samples", points)


def _base(config: TrainingConfig, profile: DeviceProfile, tensor: int, given: dict[str, Any]) -> Simulation:
    """A step of one process, or of fsdp in two shards; with "auto" the engine says which."""
    simulated = copy.copy(config)
    memory = None if profile.waits else profile.memory
    if config.distributed == "auto":
        chosen = simulate(config, 2, profile.per_node, memory, **given).strategy
        simulated.distributed = "fsdp" if chosen == "fsdp" else "none"
    elif isinstance(config.distributed, Mapping) and config.distributed.get("use") == "fsdp":
        simulated.distributed = {key: value for key, value in config.distributed.items() if key != "shards"}
    elif config.distributed != "fsdp":
        simulated.distributed = "none"
    sharded = simulated.distributed != "none"
    base = simulate(simulated, 2 * tensor if sharded else 1, profile.per_node, memory, **given)
    if not base.complete:
        raise DrivetrainError(base.problems[-1])
    return base


def _named(base: Simulation, tensor: int, group: int) -> str:
    if base.strategy != "fsdp":
        return "ddp"
    words = ["hsdp" if group else "fsdp", f"shards {group}" if group else "", f"tensor parallel {tensor}" if tensor > 1 else ""]
    return ", ".join(word for word in words if word)


def command(config: TrainingConfig, arguments: argparse.Namespace) -> int:
    """Draw the curve into a file; with --json its points are printed as well."""
    target: Path = arguments.curve
    if target.suffix not in (".png", ".html", ".svg"):
        raise ConfigError([Problem("--curve", f"{target.name} ends in neither .png nor .html")])
    found = curve(config, arguments.device)
    if target.suffix == ".html":
        _write(target, page(found))
    else:
        draw(found, target)
    if arguments.json:
        print(json.dumps(_data(found), indent=2))
    else:
        print(f"wrote {target}")
    return 0


def _data(found: Curve) -> dict[str, Any]:
    points = [point._asdict() for point in found.points]
    return {"strategy": found.strategy, "device": found.device.name, "unit": found.unit, "points": points}


def draw(found: Curve, target: Path) -> None:
    """Three panels over the number of ranks.

    Raises:
        DrivetrainError: when matplotlib is not installed or the file cannot be written.
    """
    try:
        from matplotlib import ticker
        from matplotlib.figure import Figure  # not pyplot: it would look for a display
    except ImportError as error:
        message = (
            "a .png is drawn with matplotlib, which is not installed: pip install 'drivetrain-plan[plot]', or ask for .html"
        )
        raise DrivetrainError(message) from error
    points, usable = found.points, found.device.usable
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    axes: Any = figure.subplots(1, 3)
    ranks = [point.ranks for point in points]
    axes[0].plot(ranks, [point.memory / 2**30 for point in points], marker="o", color="#3366cc")
    if usable < 20 * points[0].memory:  # else it would press the curve flat
        axes[0].axhline(usable / 2**30, color="#cc3333", linestyle="--", linewidth=1.2)
    axes[0].set_title(f"memory of each rank, GiB ({usable / 2**30:.3g} usable)", loc="left", fontsize=10)
    axes[0].set_ylim(bottom=0)
    axes[1].fill_between(ranks, [p.low for p in points], [p.high for p in points], alpha=0.2, color="#3366cc", linewidth=0)
    axes[1].plot(ranks, [point.likely for point in points], marker="o", color="#3366cc")
    axes[1].set_yscale("log")
    axes[1].yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: count(value)))
    axes[1].set_title(f"{found.unit}/s of all ranks (likely, and bounds)", loc="left", fontsize=10)
    axes[2].plot(ranks, [100 * point.efficiency for point in points], marker="o", color="#3366cc")
    axes[2].set_ylim(0, 105)
    axes[2].set_title("likely efficiency of a rank, %", loc="left", fontsize=10)
    shown = ranks[:: -(-len(ranks) // 7)]
    for panel in axes:
        panel.set_xscale("log", base=2)
        panel.set_xticks(shown, [f"{rank:,}" for rank in shown], fontsize=8)
        panel.set_xlabel("ranks")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{found.strategy} on {found.device.name}, estimated", x=0.01, ha="left", fontsize=12)
    try:
        figure.savefig(target, dpi=130)
    except (OSError, ValueError) as error:
        raise DrivetrainError(f"{target} cannot be written: {error}") from error


# -- a page without any other file ---------------------------------------------------------------------------------------------

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}td,th{padding:.2rem .9rem;text-align:right;border-bottom:1px solid #ddd}
.charts{display:flex;flex-wrap:wrap;gap:1.5rem}figure{margin:0}figcaption{font-size:13px;color:#555}"""


def page(found: Curve) -> str:
    """The curve as HTML, with its numbers."""
    points, profile, title = found.points, found.device, f"{found.strategy} on {found.device.name}"
    usable, ranks = profile.usable, [p.ranks for p in points]
    charts = [
        _chart("memory of each rank, GiB (red: usable)", ranks, [p.memory / 2**30 for p in points], usable / 2**30),
        _chart(
            f"{found.unit}/s of all ranks, logarithmic", ranks, [math.log10(max(p.likely, 1e-9)) for p in points], None, "10^"
        ),
        _chart("likely efficiency of a rank, %", ranks, [100 * p.efficiency for p in points], None),
    ]
    rows = "".join(
        f"<tr><td>{p.ranks:,}</td><td>{amount(p.memory)}</td><td>{count(p.likely)}</td><td>{count(p.low)} to {count(p.high)}</td>"
        f"<td>{p.efficiency:.0%}</td></tr>"
        for p in points
    )
    head = f"<tr><th>ranks</th><th>memory of each</th><th>{found.unit}/s</th><th>bounds</th><th>efficiency</th></tr>"
    sources = "".join(f"<li>{html.escape(source)}</li>" for source in profile.sources)
    return (
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><p>Estimated: one simulated step, scaled; times by roofline.</p>"
        f"<div class='charts'>{''.join(charts)}</div><h2>Numbers</h2><table>{head}{rows}</table>"
        f"<h2>The device</h2><ul>{sources}</ul>\n"
    )


def _chart(caption: str, ranks: list[int], values: list[float], line: float | None, prefix: str = "") -> str:
    width, height, left = 280, 180, 44
    line = line if line is not None and line < 20 * max(values) else None  # else it would press the curve flat
    top = max([*values, line or 0.0]) * 1.05 or 1.0
    low = min(0.0, *values) if not prefix else min(values) * 0.95

    def at(index: float, value: float) -> tuple[float, float]:
        return left + index * (width - left - 8) / max(1, len(values) - 1), height - 22 - (value - low) * (height - 34) / (
            top - low
        )

    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(i, v) for i, v in enumerate(values)))
    dots = "".join(
        f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.5' fill='#36c'/>" for x, y in (at(i, v) for i, v in enumerate(values))
    )
    (x0, y0), (x1, y1) = at(0, low), at(len(values) - 1, top)
    marks = "".join(
        f"<text x='{at(i, 0)[0]:.0f}' y='{height - 6}' font-size='10' text-anchor='middle'>{ranks[i]:,}</text>"
        for i in sorted({0, len(ranks) // 3, 2 * len(ranks) // 3, len(ranks) - 1})
    )
    marks += "".join(
        f"<text x='{left - 5}' y='{at(0, v)[1] + 3:.0f}' font-size='10' text-anchor='end'>{prefix}{v:.3g}</text>"
        for v in (low, (low + top) / 2, top)
    )
    limit = ""
    if line is not None:
        y = at(0, line)[1]
        limit = f"<line x1='{x0}' x2='{x1}' y1='{y:.1f}' y2='{y:.1f}' stroke='#c33' stroke-dasharray='4 3'/>"
    frame = f"<path d='M{x0},{y1:.1f} V{y0:.1f} H{x1:.1f}' fill='none' stroke='#999'/>"
    drawn = f"{frame}{limit}<polyline points='{places}' fill='none' stroke='#36c' stroke-width='1.8'/>{dots}{marks}"
    picture = f"<svg width='{width}' height='{height}' role='img'>{drawn}</svg>"
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _write(target: Path, content: str) -> None:
    try:
        target.write_text(content, encoding="utf-8")
    except OSError as error:
        raise DrivetrainError(f"{target} cannot be written: {error.strerror or error}") from error
