"""From measurements to JSON, a Markdown table and a plot."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """What a number needs beside it."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "load": round(os.getloadavg()[0], 1),
    }


def _processor() -> str:
    rows = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    said = {key.strip(): value.strip() for key, _, value in (row.partition(":") for row in rows)}
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in said.get("flags", "").split()]
    # a virtual machine's name for it may hide the generation
    numbers = [f"{key.removeprefix('cpu ')} {said[key]}" for key in ("cpu family", "model") if key in said]
    return f"{said.get('model name', platform.machine())} ({', '.join(numbers + wide)})"


def save(folder: Path, name: str, result: dict[str, Any]) -> None:
    """Write the JSON, whose numbers the tables are made of."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def markdown(result: dict[str, Any]) -> str:
    """One table, the fastest first, and what it was measured with."""
    rows, gpt = result["rows"], result["task"]["model"] != "mlp"
    unit = "tokens/s" if gpt else "µs/step"
    head = ["", unit, "× tuned loop", "quartiles", "held-out loss" if gpt else "Python calls/step"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name, row in sorted(rows.items(), key=lambda item: item[1]["ratio"]):
        speed = f"{row['per_second']:,.0f}" if gpt else f"{row['us_per_step']:.0f}"
        last = f"{row['loss']:.3f}" if gpt else f"{row['calls_per_step']:.0f}"
        low, high = row["quartiles"]
        lines.append(f"| {name} | {speed} | {row['ratio']:.3f} | {low:.3f} – {high:.3f} | {last} |")
    where = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    task = result["task"]
    turns = (task["steps"] - 1 - task["warmup"]) // task["turn"] if task.get("turn") else 0
    taken = (
        f"{turns * result['rounds']} turns of {task['turn']} steps"
        if turns
        else f"{result['rounds']} rounds of {task['steps']} steps"
    )
    said = f"{result['title']}; medians of {taken}, side by side. "
    said += f"{where['processor']}, {where['cores']} cores, load {where['load']}; Python {where['python']}, {versions}."
    return "\n".join([*lines, "", said[0].upper() + said[1:], ""])


def plot(path: Path, result: dict[str, Any]) -> None:
    """Time per step beside the tuned loop's, as bars; our own in another colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted(result["rows"].items(), key=lambda item: -item[1]["ratio"])
    names = [name for name, _ in rows]
    ratios = [row["ratio"] for _, row in rows]
    spread = [[r["ratio"] - r["quartiles"][0] for _, r in rows], [r["quartiles"][1] - r["ratio"] for _, r in rows]]
    colours = ["#1f6feb" if n.startswith("drivetrain") else "#9aa4b2" if not n.startswith("raw") else "#57606a" for n in names]
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # the line at 1 does not cross a number
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(names) + 1.3), dpi=150)
    axes.barh(names, ratios, color=colours, xerr=spread, error_kw={"ecolor": "#24292f", "elinewidth": 0.8})
    for index, (_, row) in enumerate(rows):
        axes.text(row["quartiles"][1] + 0.02 * max(ratios), index, f"{row['ratio']:.2f}×", va="center", fontsize=9, bbox=behind)
    axes.axvline(1.0, color="#24292f", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1.15 * max(row["quartiles"][1] for _, row in rows))
    axes.set_xlabel("time per step, tuned raw loop = 1")
    axes.set_title(result["title"], fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
