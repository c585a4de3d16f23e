"""Configuration files as plain tables: TOML and JSON here, others through plugins of the kind `config_format`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli

from drivetrain.errors import ConfigError, DrivetrainError, Problem
from drivetrain.registry import candidates, load

_LIMIT = 1 << 20  # a configuration of more than a mebibyte is a mistake or an attack


def read_table(path: Path) -> dict[str, Any]:
    """The table in a configuration file.

    Raises:
        ConfigError: when the file is missing, too large, of an unknown format or malformed.
    """
    suffix = path.suffix.removeprefix(".").lower()
    try:
        if path.stat().st_size > _LIMIT:
            raise ConfigError([Problem("", f"the file is larger than {_LIMIT} bytes; is it a configuration?")], str(path))
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError([Problem("", f"cannot be read: {error.strerror or error}")], str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError([Problem("", f"is not UTF-8 text: {error}")], str(path)) from error
    try:
        table = _loads(suffix, text)
    except ConfigError as error:
        raise ConfigError(error.problems, str(path)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            [Problem("", f"is not valid {suffix.upper()}: {error or type(error).__name__}")], str(path)
        ) from error
    if not isinstance(table, dict):
        raise ConfigError([Problem("", f"must hold a table of keys, not {type(table).__name__}")], str(path))
    return table


def write_table(path: Path, table: Mapping[str, Any]) -> None:
    """Write a table in the format of the file's suffix; `read_table` gives it back equal."""
    suffix = path.suffix.removeprefix(".").lower()
    path.write_text(_dumps(suffix, dict(table)), encoding="utf-8")


def _loads(suffix: str, text: str) -> Any:
    if suffix == "toml":
        return tomli.loads(text)
    if suffix == "json":
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_constant)
    return _plugin(suffix).loads(text)


def _dumps(suffix: str, table: dict[str, Any]) -> str:
    if suffix == "toml":
        return to_toml(table)
    if suffix == "json":
        return json.dumps(table, indent=2) + "\n"
    return str(_plugin(suffix).dumps(table))


def _plugin(suffix: str) -> Any:
    try:
        return load("config_format", suffix)
    except DrivetrainError as error:
        known = ", ".join(["toml", "json", *candidates("config_format")])
        raise ConfigError([Problem("", f"the format {suffix!r} cannot be read. {error} Readable: {known}.")]) from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"the key {key!r} stands twice")
        table[key] = value
    return table


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError(f"{name} is not a JSON number")
    return float(name)  # infinity: JSON has none, so this is how Python and JavaScript write it


def to_toml(table: Mapping[str, Any]) -> str:
    """A table as TOML: plain values first, then sub-tables. Keys whose value is None are left out, TOML has no word for it."""
    plain = {k: v for k, v in table.items() if v is not None and not isinstance(v, Mapping)}
    lines = [f"{_key(k)} = {toml_value(v)}" for k, v in plain.items()]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{_key(key)}]", *(f"{_key(k)} = {toml_value(v)}" for k, v in value.items() if v is not None)]
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """One value as TOML on one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {toml_value(v)}" for k, v in value.items() if v is not None) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)
