"""Memory, throughput and efficiency from 1 to 4,096 ranks as a picture or a page."""

from __future__ import annotations

import argparse
import copy
import html
import math
from pathlib import Path
from typing import Any, NamedTuple

from drivetrain import ConfigError, DrivetrainError, Problem, TrainingConfig
from drivetrain_plan.planning import _RESERVED, _for_device
from drivetrain_plan.profiles import DeviceProfile, load_profile
from drivetrain_plan.report import amount, count
from drivetrain_plan.roofline import step_time
from drivetrain_plan.scaling import scaled
from drivetrain_plan.simulate import simulate

RANKS = tuple(2**i for i in range(13))


class Point(NamedTuple):
    """One number of ranks, each with the configuration's own share of samples."""

    ranks: int
    memory: int  # bytes of a rank at its peak
    low: float  # tokens/s of all ranks
    likely: float
    high: float
    efficiency: float  # of one rank's rate, against a single one's without communication


def curve(config: TrainingConfig, device: str | DeviceProfile = "auto") -> tuple[str, DeviceProfile, list[Point]]:
    """The strategy, the device, and a point for each number of ranks; scaled from one simulated step.

    Raises:
        DrivetrainError: when the run cannot be put together or the step cannot be simulated.
    """
    profile = load_profile(device) if isinstance(device, str) else device
    config = copy.copy(_for_device(config, profile, []))
    accumulation, config.gradient_accumulation_steps, config.global_batch_size = config.gradient_accumulation_steps, 1, None
    name = config.distributed["use"] if isinstance(config.distributed, dict) else config.distributed
    sharded = name == "fsdp"
    config.distributed = config.distributed if sharded else "none"
    base = simulate(config, 2 if sharded else 1, profile.per_node)
    if not base.complete:
        raise DrivetrainError(base.problems[-1])
    points = []
    for ranks in RANKS:
        found = scaled(base, ranks, accumulation=accumulation)
        low, likely, high = step_time(found, profile).total
        per_step = (found.tokens or found.samples_per_microbatch) * accumulation * ranks
        alone = step_time(scaled(base, 1, accumulation=accumulation), profile).total.likely
        points.append(Point(ranks, found.peak, per_step / high, per_step / likely, per_step / low, alone / likely))
    return ("fsdp" if sharded else "ddp"), profile, points


def command(config: TrainingConfig, arguments: argparse.Namespace) -> int:
    """Draw the curve into a file."""
    target: Path = arguments.curve
    if target.suffix not in (".png", ".html", ".svg"):
        raise ConfigError([Problem("--curve", f"{target.name} ends in neither .png nor .html")])
    strategy, profile, points = curve(config, arguments.device)
    title = f"{strategy} on {profile.name}"
    if target.suffix == ".html":
        _write(target, page(title, points, profile))
    else:
        draw(title, points, profile, target)
    print(f"wrote {target}")
    return 0


def draw(title: str, points: list[Point], profile: DeviceProfile, target: Path) -> None:
    """Three panels over the number of ranks.

    Raises:
        DrivetrainError: when matplotlib is not installed or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: it would look for a display
    except ImportError as error:
        message = (
            "a .png is drawn with matplotlib, which is not installed: pip install 'drivetrain-plan[plot]', or ask for .html"
        )
        raise DrivetrainError(message) from error
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    axes: Any = figure.subplots(1, 3)
    ranks = [point.ranks for point in points]
    axes[0].plot(ranks, [point.memory / 2**30 for point in points], marker="o", color="#3366cc")
    usable = profile.memory * (1 - _RESERVED)
    if usable < 20 * points[0].memory:  # else it would press the curve flat
        axes[0].axhline(usable / 2**30, color="#cc3333", linestyle="--", linewidth=1.2)
    axes[0].set_title(f"memory of each rank, GiB ({usable / 2**30:.3g} usable)", loc="left", fontsize=10)
    axes[0].set_ylim(bottom=0)
    axes[1].fill_between(ranks, [p.low for p in points], [p.high for p in points], alpha=0.2, color="#3366cc", linewidth=0)
    axes[1].plot(ranks, [point.likely for point in points], marker="o", color="#3366cc")
    axes[1].set_yscale("log")
    axes[1].set_title("tokens/s of all ranks (likely, and bounds)", loc="left", fontsize=10)
    axes[2].plot(ranks, [100 * point.efficiency for point in points], marker="o", color="#3366cc")
    axes[2].set_ylim(0, 105)
    axes[2].set_title("likely efficiency of a rank, %", loc="left", fontsize=10)
    for panel in axes:
        panel.set_xscale("log", base=2)
        panel.set_xticks(ranks[::2], [f"{rank:,}" for rank in ranks[::2]], fontsize=8)
        panel.set_xlabel("ranks")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}, estimated", x=0.01, ha="left", fontsize=12)
    try:
        figure.savefig(target, dpi=130)
    except (OSError, ValueError) as error:
        raise DrivetrainError(f"{target} cannot be written: {error}") from error


# -- a page without any other file ---------------------------------------------------------------------------------------------

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}td,th{padding:.2rem .9rem;text-align:right;border-bottom:1px solid #ddd}
.charts{display:flex;flex-wrap:wrap;gap:1.5rem}figure{margin:0}figcaption{font-size:13px;color:#555}"""


def page(title: str, points: list[Point], profile: DeviceProfile) -> str:
    """The curve as HTML, with its numbers."""
    usable = profile.memory * (1 - _RESERVED)
    charts = [
        _chart("memory of each rank, GiB (red: usable)", [p.memory / 2**30 for p in points], usable / 2**30),
        _chart("tokens/s of all ranks, logarithmic", [math.log10(max(p.likely, 1e-9)) for p in points], None, "10^"),
        _chart("likely efficiency of a rank, %", [100 * p.efficiency for p in points], None),
    ]
    rows = "".join(
        f"<tr><td>{p.ranks:,}</td><td>{amount(p.memory)}</td><td>{count(p.likely)}</td><td>{count(p.low)} to {count(p.high)}</td>"
        f"<td>{p.efficiency:.0%}</td></tr>"
        for p in points
    )
    head = "<tr><th>ranks</th><th>memory of each</th><th>tokens/s</th><th>bounds</th><th>efficiency</th></tr>"
    sources = "".join(f"<li>{html.escape(source)}</li>" for source in profile.sources)
    return (
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><p>Estimated: one simulated step, scaled; times by roofline.</p>"
        f"<div class='charts'>{''.join(charts)}</div><h2>Numbers</h2><table>{head}{rows}</table>"
        f"<h2>The device</h2><ul>{sources}</ul>\n"
    )


def _chart(caption: str, values: list[float], line: float | None, prefix: str = "") -> str:
    width, height, left = 280, 180, 44
    top = max([*values, line or 0.0]) * 1.05 or 1.0
    low = min(0.0, *values) if not prefix else min(values) * 0.95

    def at(index: float, value: float) -> tuple[float, float]:
        return left + index * (width - left - 8) / (len(values) - 1), height - 22 - (value - low) * (height - 34) / (top - low)

    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(i, v) for i, v in enumerate(values)))
    dots = "".join(
        f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.5' fill='#36c'/>" for x, y in (at(i, v) for i, v in enumerate(values))
    )
    (x0, y0), (x1, y1) = at(0, low), at(len(values) - 1, top)
    marks = "".join(
        f"<text x='{at(i, 0)[0]:.0f}' y='{height - 6}' font-size='10' text-anchor='middle'>{2**i:,}</text>"
        for i in (0, 4, 8, 12)
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
