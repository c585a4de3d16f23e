"""The names of a checkpoint's files, and their JSON. Nothing here needs torch: a checkpoint can be looked at without it."""

from __future__ import annotations

import json
from typing import Any

MODEL_FILE, STATE_FILE, TREE_FILE = "model.safetensors", "state.safetensors", "state.json"
INDEX_FILE = "index.json"  # of tensors that several files have a part of
MAX_TREE_BYTES = 1 << 28  # of state.json, and of index.json; bulk data belongs into tensors


def dump_json(value: Any, indent: int | None = None) -> bytes:
    """The one way in which a value is written as JSON: ASCII, keys in their order."""
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(value, indent=indent, separators=separators, allow_nan=False).encode("ascii")


def load_json(data: bytes) -> Any:
    """Read JSON.

    Raises:
        ValueError: also for NaN, numbers of thousands of digits and text that is not UTF-8.
        RecursionError: when it is nested too deeply.
    """
    return json.loads(data, parse_constant=_no_constant)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
