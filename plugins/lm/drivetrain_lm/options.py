"""Checks of options, for attrs."""

from __future__ import annotations

from typing import Any

from drivetrain import ConfigError, Problem


def between(low: float, high: float | None = None) -> Any:
    """An attrs validator: low ≤ value, and value < high if it is given."""

    def check(_instance: Any, attribute: Any, value: Any) -> None:
        if not isinstance(value, (int, float)):  # what is no number is reported by its type
            return
        if not (low <= value and (high is None or value < high)):
            limit = "" if high is None else f" and less than {high}"
            raise ConfigError([Problem(attribute.name, f"must be at least {low}{limit}, got {value}")])

    return check
