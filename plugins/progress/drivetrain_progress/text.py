"""Numbers, names and positions as a person reads them. Pure functions."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping

_HIDDEN = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")  # control, formatting (bidi), private, surrogates, line and paragraph separators


def clean(text: str, encoding: str = "utf-8") -> str:
    """A text that can do nothing to the terminal: control characters become `?`, and so does what it cannot show."""
    seen = "".join("?" if unicodedata.category(char) in _HIDDEN else char for char in text)
    return seen.encode(encoding, "replace").decode(encoding)


def number(value: float, digits: int = 3) -> str:
    """1.71, 0.0312, 4.1e-4, 12.3k, nan: `digits` significant ones, of the same width while the value stays near."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    value = float(f"{value:.{digits - 1}e}")  # round first, or 9.999 is written with one digit more than 10.0
    size = math.floor(math.log10(abs(value)))
    if size < -3 or size >= 15:
        mantissa, _, exponent = f"{value:.{digits - 2}e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    group = max(0, size // 3)
    return f"{value / 1000**group:.{max(0, digits - 1 - (size - 3 * group))}f}{['', 'k', 'M', 'G', 'T'][group]}"


def small(value: float) -> str:
    """A learning rate: 4.1e-4."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value and math.isfinite(value) else f"{value:g}"


def count(value: float) -> str:
    """1.20M, 950k, 512: whole things, shortened from a thousand on."""
    return f"{value:.0f}" if value < 1000 else number(value)


def clock(seconds: float) -> str:
    """0:49, 12:05, 3:20:00, 2d 04:10."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def place(position: float, length: float, unit: str) -> str:
    """Where the run is: `step 812/1600`, `1.2M/5M tok`, `0:31/2:00:00`, `epoch 1.25/3`; without a length just the position."""
    known = math.isfinite(length)
    if unit == "st":
        return f"step {position:.0f}" + (f"/{length:.0f}" if known else "")
    if unit == "ep":
        return f"epoch {position:.2f}" + (f"/{length:g}" if known else "")
    name = {"tok": " tok", "sp": " samples", "s": ""}[unit]
    show = clock if unit == "s" else count
    end = show(length) if known else ""
    if "." in end:  # 5M, though it is 1.20M on the way there, where the width must not jump
        end = end[:-1].rstrip("0").rstrip(".") + end[-1]
    return show(position) + (f"/{end}" if known else "") + name


def step(number: int, length: float, unit: str) -> str:
    """The step before a line of values: `step  60` of a run of 240, so that lines stand below each other."""
    return f"step {number:{len(f'{length:.0f}') if unit == 'st' and math.isfinite(length) else 0}}"


def values(metrics: Mapping[str, float]) -> list[str]:
    """What of a log is shown beside the bar, the most important first."""
    shown = []
    if "train/loss" in metrics:
        shown.append(f"loss {number(metrics['train/loss'])}")
    if "train/lr" in metrics:
        shown.append(f"lr {small(metrics['train/lr'])}")
    for name, unit in (("speed/tokens_per_second", "tok/s"), ("speed/samples_per_second", "samples/s")):
        if name in metrics:
            shown.append(f"{number(metrics[name])} {unit}")
            break
    if "speed/data_wait" in metrics:
        shown.append(f"data wait {metrics['speed/data_wait']:.0%}")
    return shown
