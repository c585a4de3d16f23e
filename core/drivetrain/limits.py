"""Between which numbers an option may be: one check, said in one way."""

from __future__ import annotations

import math
from typing import Any

from attrs import frozen


@frozen
class Limits:
    """None stands for no limit. NaN is within none, and infinity only if it need not be `finite`."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    finite: bool = True

    def __str__(self) -> str:
        sides = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{name} {value:g}" for name, value in sides.items() if value is not None)

    def check(self, value: Any) -> None:
        """Raise ValueError for a number outside, alone or in a list; what is no number is reported by its type."""
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(item, (int, float)):
                continue
            if not self._allow(item):
                raise ValueError(f"must be {self}, got {item!r}")
            if self.finite and math.isinf(item) and str(self):
                raise ValueError(f"must be finite, got {item!r}")

    def _allow(self, value: float) -> bool:
        low = (self.at_least is None or value >= self.at_least) and (self.above is None or value > self.above)
        return low and (self.at_most is None or value <= self.at_most) and (self.below is None or value < self.below)
