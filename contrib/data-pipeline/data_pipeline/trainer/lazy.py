"""Names of `drivetrain` under another module, each imported when it is first used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import drivetrain


def reexport(module: str, names: Sequence[str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module that has `names` from `drivetrain`."""

    def find(name: str) -> Any:
        if name in names:
            return getattr(drivetrain, name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find
