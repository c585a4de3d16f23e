"""One type for every length of training: `"3ep"`, `"1000st"`, `"1e9tok"`, `"2h"`, `"10%"`."""

from __future__ import annotations

import re

from attrs import field, frozen, validators

_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_NAMES = {
    "ep": "epochs",
    "st": "steps",
    "sp": "samples",
    "tok": "tokens",
    "s": "seconds",
    "%": "percent of the run",
}
_UNITS = {**dict.fromkeys(_SECONDS, "s"), "ep": "ep", "st": "st", "sp": "sp", "tok": "tok", "%": "%"}
_TEXT = re.compile(r"\s*(\d+(?:[_\d]*\d)?(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\d+)\s*([A-Za-z%]+)\s*")


@frozen
class Duration:
    """A length of training: `value` in `unit`, one of "ep" (epochs), "st" (optimizer steps), "sp" (samples), "tok" (tokens),
    "s" (seconds of wall time; "min", "h" and "d" are converted) or "%" (of the whole run)."""

    value: float
    unit: str = field(validator=validators.in_(_NAMES))

    def __attrs_post_init__(self) -> None:
        if not 0 < self.value < float("inf"):
            raise ValueError(f"a duration must be more than zero and finite, got '{self.value:g}{self.unit}'")
        if self.unit in ("st", "sp", "tok") and self.value != int(self.value):
            raise ValueError(f"'{self.value:g}{self.unit}' is not a whole number of {self.unit_name}")

    @classmethod
    def parse(cls, text: Duration | str) -> Duration:
        """Read `"3ep"`, `"1000st"`, `"1e9tok"`, `"90min"`, `"5%"`.

        Raises:
            ValueError: for a missing or unknown unit, or a length that is not positive.
        """
        if isinstance(text, Duration):
            return text
        hint = "write a number and a unit, such as '3ep', '1000st', '1e9tok', '2h' or '10%'"
        if not isinstance(text, str):
            raise ValueError(f"expected a duration, got {text!r} ({hint})")
        match = _TEXT.fullmatch(text)
        if match is None or match[2] not in _UNITS:
            raise ValueError(f"expected a duration, got {text!r} ({hint})")
        return cls(float(match[1]) * _SECONDS.get(match[2], 1.0), _UNITS[match[2]])

    @property
    def unit_name(self) -> str:
        """The unit as a word: "epochs", "steps", …"""
        return _NAMES[self.unit]

    def __str__(self) -> str:
        return f"{int(self.value) if self.value == int(self.value) else self.value}{self.unit}"
