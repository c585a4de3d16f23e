"""A curve as text: Braille patterns, eight dots in each character, between a scale of numbers and one of positions."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

# The dots of a Braille pattern by column and row (Unicode 15, section 21.1: the code point is 0x2800 plus these bits).
_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_NICE = (1.0, 1.2, 1.6, 2.0, 2.4, 3.2, 4.0, 6.0, 8.0, 10.0)  # tops of a scale whose quarters are short numbers


def chart(values: Sequence[float], end: float, width: int, height: int = 16, dots: bool = True) -> list[str]:
    """The curve of values over positions from 0 to `end`, as lines of at most `width` characters.

    Args:
        values: at equal distances, none of them negative; any number, those that share a column become a vertical line.
        end: the position on the right.
        width: columns of the whole, scale included.
        height: rows of the curve alone, a multiple of 4.
        dots: Braille patterns; False for asterisks, which every terminal has.
    """
    top = nice_top(max(values))
    labels = [number(top * quarter / 4) for quarter in (4, 3, 2, 1, 0)]
    margin = max(map(len, labels)) + 1
    columns = max(16, (width - margin - 2) // 4 * 4)
    across, down = (2, 4) if dots else (1, 1)
    spans = _spans(values, columns * across, top, height * down)
    marks = labels[:-1]
    lines = []
    for row, text in enumerate(_patterns(spans, columns, height) if dots else _asterisks(spans, columns, height)):
        label, edge = (marks[row * 4 // height], "┤" if dots else "+") if row * 4 % height == 0 else ("", "│" if dots else "|")
        lines.append(f"{label:>{margin}}{edge}{text}".rstrip())
    tick, corner, line = ("┴", "└", "─") if dots else ("+", "+", "-")
    lines.append(f"{labels[-1]:>{margin}}{corner}" + (line * (columns // 4 - 1) + tick) * 4)
    return [*lines, _positions(end, margin, columns)]


def nice_top(highest: float) -> float:
    """The smallest number with short quarters that is not below `highest`; 1 for 0."""
    if highest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(highest))
    return next(power * step for step in _NICE if power * step >= highest * (1 - 1e-9))


def number(value: float) -> str:
    """A number in few characters: "0", "0.0003", "1.2e-6"."""
    return re.sub(r"e([+-])0*", lambda sign: "e-" if sign[1] == "-" else "e", f"{value:.3g}")


def _spans(values: Sequence[float], columns: int, top: float, rows: int) -> list[tuple[int, int]]:
    """For each column of dots the lowest and the highest one, counted from 0 at the bottom, without gaps between columns."""
    spans: list[tuple[int, int]] = []
    for column in range(columns):
        first = column * len(values) // columns
        last = max(first + 1, (column + 1) * len(values) // columns)
        found = [min(rows - 1, round(value / top * (rows - 1))) for value in values[first:last]]
        low, high = min(found), max(found)
        if spans:  # meet the column before
            low, high = min(low, spans[-1][1] + 1), max(high, spans[-1][0] - 1)
        spans.append((low, high))
    return spans


def _patterns(spans: list[tuple[int, int]], columns: int, height: int) -> list[str]:
    cells = [[0] * columns for _ in range(height)]
    for x, (low, high) in enumerate(spans):
        for y in range(low, high + 1):
            row, dot = divmod(height * 4 - 1 - y, 4)
            cells[row][x // 2] |= _BITS[x % 2][dot]
    return ["".join(chr(0x2800 + bits) if bits else " " for bits in row) for row in cells]


def _asterisks(spans: list[tuple[int, int]], columns: int, height: int) -> list[str]:
    return ["".join("*" if low <= height - 1 - row <= high else " " for low, high in spans) for row in range(height)]


def _positions(end: float, margin: int, columns: int) -> str:
    """The scale below: each number ends at its tick."""
    line = f"{'0':>{margin + 1}}"
    for quarter in (1, 2, 3, 4):
        line = f"{line:<{margin}}{number_at(end * quarter / 4):>{margin + 1 + columns * quarter // 4 - len(line)}}"
    return line


def number_at(position: float) -> str:
    """A position in few characters: "400", "12.5", "24927", "1.5e9"."""
    return f"{position:.0f}" if 100 <= position < 1e6 else number(position)
