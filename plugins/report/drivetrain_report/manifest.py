"""A run's configuration and environment as rows: key, value as text, origin."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from attrs import frozen

# The configuration's key for a kind of component, where it is not the kind's own name.
_KEYS = {"dataset": "data", "strategy": "distributed", "callback": "callbacks", "mode": "training_mode"}
_OF_THE_PROGRAM = "drivetrain_cli."  # its own two callbacks, which nobody configures
# How a checkpoint writes what JSON has no word for.
_MARKED: Mapping[str, Callable[[Any], Any]] = {
    "$tuple": lambda items: [plain(item) for item in items],
    "$dict": lambda pairs: {str(key): plain(value) for key, value in pairs},
    "$int": lambda text: int(text, 16),
    "$float": lambda text: str(struct.unpack(">d", bytes.fromhex(text))[0]),
}


@frozen
class Setting:
    """One value with its dotted key. `origin` is where it comes from, empty where that is not known."""

    key: str
    value: str
    origin: str = ""


def plain(value: Any) -> Any:
    """A part of a checkpoint's tree as plain data."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and (read := _MARKED.get(next(iter(value)))):
        try:
            return read(next(iter(value.values())))
        except (ValueError, TypeError, struct.error):
            return str(value)
    return {str(key): plain(item) for key, item in value.items()}


def config_settings(manifest: Mapping[str, Any], saved: Mapping[str, Any]) -> list[Setting]:
    """The configuration from a checkpoint's manifest, whose values have origins, or else from config.json.

    The manifest does not tell where a component's options come from; those that config.json spells out were set.
    """
    if not isinstance(manifest.get("config"), dict):
        return [Setting(key, text(value), "config.json") for key, value in flat(saved).items()]
    rows = []
    for key, row in manifest["config"].items():
        value, origin = (row.get("value"), str(row.get("origin", ""))) if isinstance(row, dict) else (row, "")
        rows += [Setting(name, text(one), origin) for name, one in flat({key: value}).items()]
    for name, part in _mapping(manifest.get("components")).items():
        rows += _component(str(name), part if isinstance(part, dict) else {}, saved)
    return rows


def environment_settings(manifest: Mapping[str, Any]) -> list[Setting]:
    """What a manifest says besides the configuration."""
    rest = {key: value for key, value in manifest.items() if key not in ("config", "components") and value != {}}
    rows = [Setting(key, text(value)) for key, value in flat(rest).items()]
    parts = [part for part in _mapping(manifest.get("components")).values() if isinstance(part, dict)]
    plugins = dict(sorted(str(part.get("origin", "")).split(" ", 1) for part in parts if " " in str(part.get("origin", ""))))
    return [*rows, *(Setting(f"plugins.{name}", version) for name, version in plugins.items())]


def flat(table: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys; lists of components by the components' names, as in `callbacks.checkpoint.every`."""
    if isinstance(table, dict) and table:
        rows: dict[str, Any] = {}
        for key, value in table.items():
            rows |= flat(value, f"{prefix}.{key}" if prefix else str(key))
        return rows
    if isinstance(table, list) and any(isinstance(item, dict) and "use" in item for item in table):
        rows = {}
        for item in table:
            name, options = (str(item.get("use")), item) if isinstance(item, dict) else (str(item), {})
            rows |= flat({key: value for key, value in options.items() if key != "use"} or "active", f"{prefix}.{name}")
        return rows
    return {prefix: table} if prefix else {}


def text(value: Any) -> str:
    """A value as a person would write it."""
    if value is None:
        return "—"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _component(name: str, part: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[Setting]:
    """The component itself, with the distribution it is from, and its options."""
    kind, _, used = name.partition(":")
    origin, key = str(part.get("origin", "")), _KEYS.get(kind, kind)
    if origin.startswith(_OF_THE_PROGRAM):
        return
    if kind == "callback":
        key, used = f"{key}.{used}", "active"
    yield Setting(key, used, origin)
    spelled = _spelled(saved, kind, name.partition(":")[2])
    for option, value in flat(_mapping(part.get("options"))).items():
        top = option.partition(".")[0]
        said = "" if spelled is None else "set" if top in spelled else "default"
        yield Setting(f"{key}.{option}", text(value), said)


def _spelled(saved: Mapping[str, Any], kind: str, used: str) -> set[str] | None:
    """The options of a component that config.json spells out; None when there is no such file."""
    if not saved:
        return None
    given = saved.get(_KEYS.get(kind, kind))
    for item in given if isinstance(given, list) else [given]:
        if isinstance(item, dict) and item.get("use") == used:
            return {str(key) for key in item}
    return set()


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
