"""What was measured, for people and as plain data."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attrs import asdict, frozen

if TYPE_CHECKING:
    from drivetrain_bench.measure import Speed

_WORTH = 1.03  # of the lower quartile; gains below are within the noise of a short measurement


@frozen
class Advice:
    """One change and what it gave: `gain` times the speed, or None when it does not run.

    `quartiles` are the lower and the upper one of the gain over the turns.
    """

    change: str
    gain: float | None
    note: str = ""
    quartiles: tuple[float, float] | None = None

    @property
    def is_worth_it(self) -> bool:
        """Whether most turns say that it is a gain."""
        return self.gain is not None and (self.quartiles or (self.gain,))[0] >= _WORTH

    @property
    def text(self) -> str:
        """The gain and its quartiles: "1.16 × (1.02 – 1.20)"; without a gain, why."""
        if self.gain is None:
            return self.note
        spread = f" ({self.quartiles[0]:.2f} – {self.quartiles[1]:.2f})" if self.quartiles else ""
        return f"{self.gain:.2f} ×{spread}"


@frozen
class Report:
    """The result of `bench`; as text, tables for a terminal.

    Attributes:
        facts: device, precision, parameters, torch.
        speeds: by name: the loop by hand, the engine alone, the engine with the configuration's callbacks.
        losses: of the engine's trainings after all turns.
        parts: seconds by part of the work, with callbacks; empty without drivetrain-goodput.
        advice: what was tried, the best first.
        left_out: what the configuration asks for and was not measured.
    """

    facts: Mapping[str, Any]
    speeds: Mapping[str, Speed]
    losses: Mapping[str, float]
    parts: Mapping[str, float]
    advice: tuple[Advice, ...]
    left_out: str = ""

    def ratio(self, name: str) -> float:
        """Time per step, that of the loop by hand being 1."""
        return self.speeds[name].over(next(iter(self.speeds.values())))

    def plain(self) -> dict[str, Any]:
        """All of it as numbers and texts."""
        rows = {
            name: {
                "ms_per_step": 1e3 * speed.middle,
                "samples_per_second": speed.samples / speed.middle,
                "ratio": self.ratio(name),
            }
            for name, speed in self.speeds.items()
        }
        advice = [asdict(row) for row in self.advice]
        seconds = dict(self.parts)
        return {"facts": dict(self.facts), "speeds": rows, "left_out": self.left_out, "seconds": seconds, "advice": advice}

    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *self._costs(), *self._where(), *self._faster()])

    def _head(self) -> Iterator[str]:
        facts, count = self.facts, len(next(iter(self.speeds.values())).seconds)
        size = f"{facts['parameters'] / 1e6:.3g} M parameters"
        yield f"{facts['device']} ({facts['precision']}) · {size} · torch {facts['torch']} · {count} turns"

    def _costs(self) -> Iterator[str]:
        tokens = any(speed.tokens for speed in self.speeds.values())
        yield f"{'':24}{'ms/step':>10}{'tokens/s' if tokens else 'samples/s':>12}{'× by hand':>12}"
        for name, speed in self.speeds.items():
            rate = (speed.tokens if tokens else speed.samples) / speed.middle
            yield f"{name:24}{1e3 * speed.middle:>10.2f}{rate:>12,.0f}{self.ratio(name):>12.3f}"
        if self.left_out:
            yield f"left out: {self.left_out}"

    def _where(self) -> Iterator[str]:
        whole = sum(self.parts.values())
        if not whole:
            return
        yield "\nwhere the time goes, with your callbacks"
        for name, seconds in sorted(self.parts.items(), key=lambda item: -item[1]):
            if seconds / whole >= 0.001:
                yield f"  {name:28}{100 * seconds / whole:>6.1f} %"

    def _faster(self) -> Iterator[str]:
        if not self.advice:
            return
        count = len(next(iter(self.speeds.values())).seconds)
        yield "\nwhat would be faster" + (", and the quartiles of the turns" if count > 1 else "")
        better = [row for row in self.advice if row.is_worth_it]
        for row in better:
            yield _wrapped(f"{row.text} with {row.change}{f' ({row.note})' if row.note else ''}")
        if not better:
            yield "  nothing of what was tried"
        for row in self.advice:
            if row not in better:
                yield _wrapped(
                    f"no {'sure ' * (row.gain is not None and row.gain >= _WORTH)}gain from {row.change}: {row.text}"
                )


def _wrapped(text: str) -> str:
    """One row in the terminal's width, broken between words."""
    width = max(40, shutil.get_terminal_size().columns)
    return textwrap.fill(
        text, width, initial_indent="  ", subsequent_indent="      ", break_long_words=False, break_on_hyphens=False
    )
