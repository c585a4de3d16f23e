"""YAML as a configuration format: the core schema of YAML 1.2, plain data only, every doubt an error with its line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drivetrain_yaml.reading import read
from drivetrain_yaml.writing import write

__all__ = ["Yaml"]


class Yaml:
    """The format behind the suffixes .yaml and .yml. It has no state: both methods are static."""

    @staticmethod
    def loads(text: str) -> dict[str, Any]:
        """The table in a YAML text.

        Numbers, truth values and null are those of the YAML 1.2 core schema (section 10.3): `1e-3` and `0o14` are numbers,
        `0755` is 755, and `no`, `12:30:00` and `2024-01-01` are texts. An empty text is an empty table.

        Raises:
            ConfigError: with line and column, for malformed YAML, a top level that is no mapping, keys that stand twice or are
                no text, tags, merge keys, a second document, and what is too large or nested too deeply.
        """
        return read(text)

    @staticmethod
    def dumps(table: Mapping[str, Any]) -> str:
        """A table of plain data as YAML, in the order of its keys; `loads` reads it back equal, and so do YAML 1.1 readers."""
        return write(table)
