"""From YAML to plain data. PyYAML parses; what its events mean is decided here, so nothing but plain data is ever made."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import yaml

from drivetrain import ConfigError, Problem
from drivetrain_yaml.schema import resolve

MAX_BYTES = 1 << 20
MAX_DEPTH = 50
MAX_ALIASES = 100  # uses of anchors
MAX_VALUES = 10_000  # keys, items and values, those that aliases repeat included: nested aliases multiply


def read(text: str) -> dict[str, Any]:
    """The table in a YAML text; see `Yaml.loads`.

    Raises:
        ConfigError: with line and column.
    """
    if len(text) > MAX_BYTES or len(text.encode(errors="replace")) > MAX_BYTES:
        raise ConfigError([Problem("", f"is larger than {MAX_BYTES} bytes")])
    try:
        return _Reader(text).table()
    except yaml.MarkedYAMLError as error:
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise _error(error.problem_mark or error.context_mark, said or "is not YAML") from error
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        where = f"line {before.count(chr(10)) + 1}, column {error.position - before.rfind(chr(10))}"
        raise ConfigError([Problem("", f"{where}: the character {error.character!r} is not allowed in YAML")]) from error


class _Reader:
    """Turns the parser's events into values, one recursive call for each level."""

    def __init__(self, text: str) -> None:
        self.parser = yaml.SafeLoader(text)  # used as a parser only; it constructs nothing
        self.anchors: dict[str, tuple[Any, int]] = {}  # value and the number of values in it
        self.aliases = self.values = 0

    def table(self) -> dict[str, Any]:
        """The one document, which must be a mapping."""
        self._next()
        if isinstance(self._next(), yaml.StreamEndEvent):
            return {}
        first = self._peek()
        value = self._value(depth=1)
        if not isinstance(value, dict):
            raise _error(first.start_mark, "the top level must be a mapping, such as 'seed: 1'")
        self._next()
        if not isinstance(extra := self._next(), yaml.StreamEndEvent):
            raise _error(extra.start_mark, "a second document begins here; a configuration is one")
        return value

    def _next(self) -> Any:
        return self._guarded(self.parser.get_event)

    def _peek(self) -> Any:
        return self._guarded(self.parser.peek_event)

    def _guarded(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except (ValueError, OverflowError) as error:  # an escape such as "\UFFFFFFFF" is no character
            raise _error(self.parser.get_mark(), f"is not YAML: {error}") from error

    def _value(self, depth: int) -> Any:
        event = self._next()
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        if event.tag is not None:
            raise _error(event.start_mark, f"the tag {event.tag!r:.80} is not allowed: a configuration holds plain data only")
        if depth > MAX_DEPTH:
            raise _error(event.start_mark, f"is nested deeper than {MAX_DEPTH} levels")
        before = self.values
        self._count(1, event)
        if isinstance(event, yaml.ScalarEvent):
            value = _scalar(event)
        else:
            value = self._mapping(depth) if isinstance(event, yaml.MappingStartEvent) else self._sequence(depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = (value, self.values - before)
        return value

    def _count(self, more: int, event: Any) -> None:
        self.values += more
        if self.values > MAX_VALUES:
            raise _error(event.start_mark, f"has more than {MAX_VALUES} values here, aliases included")

    def _alias(self, event: Any) -> Any:
        """A copy of what the anchor stands for: two keys must not share one changeable table."""
        if event.anchor not in self.anchors:
            raise _error(event.start_mark, f"the alias *{event.anchor} stands for nothing above it")
        self.aliases += 1
        if self.aliases > MAX_ALIASES:
            raise _error(event.start_mark, f"has more than {MAX_ALIASES} aliases")
        value, size = self.anchors[event.anchor]
        self._count(size, event)
        return copy.deepcopy(value)

    def _sequence(self, depth: int) -> list[Any]:
        items = []
        while not isinstance(self._peek(), yaml.SequenceEndEvent):
            items.append(self._value(depth + 1))
        self._next()
        return items

    def _mapping(self, depth: int) -> dict[str, Any]:
        table: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(self._peek(), yaml.MappingEndEvent):
            event = self._peek()
            key = self._key(event, self._value(depth + 1))
            if key in table:
                raise _error(event.start_mark, f"the key {key!r:.80} stands twice, first in line {lines[key]}")
            lines[key] = event.start_mark.line + 1
            table[key] = self._value(depth + 1)
        self._next()
        return table

    def _key(self, event: Any, key: Any) -> str:
        if not isinstance(key, str):
            kind = "that is a mapping or list" if isinstance(key, (dict, list)) else json.dumps(key)
            raise _error(event.start_mark, f"the key {kind} is no text; write it in quotes if it is a name")
        if key == "<<" and isinstance(event, yaml.ScalarEvent) and event.style is None:
            raise _error(event.start_mark, "merge keys (<<) are not part of YAML 1.2; write the keys out")
        return key


def _scalar(event: Any) -> Any:
    text = event.value
    try:
        text.encode()
        return resolve(text) if event.style is None else text
    except UnicodeEncodeError:
        raise _error(event.start_mark, f"{text!r} holds half of a character (a lone surrogate)") from None
    except ValueError:
        raise _error(event.start_mark, f"the number has {len(text)} digits, too many") from None


def _error(mark: Any, message: str) -> ConfigError:
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return ConfigError([Problem("", where + message)])
