"""Strict structuring: from the plain tables of a file to typed objects, with every mistake found in one pass.

cattrs does the work; strict here means that a text is never taken for a number, that no key is ignored, and that each
problem carries the dotted path of the value that caused it.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

import attrs
from cattrs import Converter
from cattrs.errors import (
    ClassValidationError,
    ForbiddenExtraKeysError,
    IterableValidationError,
)
from cattrs.gen import make_dict_structure_fn

from drivetrain.duration import Duration
from drivetrain.errors import ConfigError, Problem, suggest

T = TypeVar("T")


def structure(value: Any, wanted: type[T] | Any, path: str = "", source: str = "configuration") -> T:
    """Turn plain data into `wanted`.

    Raises:
        ConfigError: with one `Problem` for every value that does not fit, each at its own path below `path`.
    """
    try:
        return cast(T, _converter().structure(value, wanted))
    except Exception as error:
        raise ConfigError([problem.under(path) for problem in problems_of(error)], source) from None


def unstructure(value: Any) -> Any:
    """Turn options back into plain data (numbers, texts, lists, tables) that `structure` reads."""
    return _converter().unstructure(value)


def problems_of(error: BaseException) -> list[Problem]:
    """Flatten what cattrs raised into problems with paths."""
    if isinstance(error, ConfigError):
        return list(error.problems)
    if isinstance(error, ClassValidationError):
        return _of_class(error)
    if isinstance(error, IterableValidationError):
        noted, rest = error.group_exceptions()
        found = [p.under(f"[{note.index!r}]") for inner, note in noted for p in problems_of(inner)]
        return found + [p for inner in rest for p in problems_of(inner)]
    if isinstance(error, (ValueError, TypeError, KeyError)):
        return [Problem("", str(error.args[0]) if error.args else str(error))]
    raise error


def _of_class(error: ClassValidationError) -> list[Problem]:
    noted, rest = error.group_exceptions()
    found = []
    for inner, note in noted:
        if isinstance(inner, KeyError):
            found.append(Problem(note.name, "is missing; it has no default"))
        else:
            found += [problem.under(note.name) for problem in problems_of(inner)]
    for inner in rest:
        if isinstance(inner, ForbiddenExtraKeysError):
            known = [f.name for f in attrs.fields(inner.cl) if f.init]
            found += [Problem(key, unknown_key(key, known)) for key in sorted(inner.extra_fields)]
        else:
            found += problems_of(inner)
    return found


def unknown_key(key: str, known: list[str]) -> str:
    """The message for a key that nobody reads."""
    return f"unknown key.{suggest(key, known) or ' Known: ' + ', '.join(known) + '.' if known else ' No options exist here.'}"


@cache
def _converter() -> Converter:
    converter = Converter(forbid_extra_keys=True, detailed_validation=True)
    converter.register_structure_hook(bool, lambda v, _: _exactly(v, bool, "true or false"))
    converter.register_structure_hook(int, lambda v, _: _integer(v))
    converter.register_structure_hook(float, lambda v, _: _number(v))
    converter.register_structure_hook(str, lambda v, _: _exactly(v, str, "a text"))
    converter.register_structure_hook(Path, lambda v, _: v if isinstance(v, Path) else Path(_exactly(v, str, "a path")))
    converter.register_structure_hook(Duration, lambda v, _: Duration.parse(v))
    converter.register_structure_hook(enum.Enum, _enum)
    converter.register_structure_hook_factory(attrs.has, lambda cls: _table(converter, cls))
    converter.register_structure_hook_func(_is_literal, _literal)
    converter.register_structure_hook_func(_is_union, lambda v, t: _union(converter, v, t))
    converter.register_structure_hook_func(_is_dict, lambda v, t: _dict(converter, v, t))
    converter.register_structure_hook_func(_is_sequence, lambda v, t: _sequence(converter, v, t))
    converter.register_unstructure_hook(Duration, str)
    converter.register_unstructure_hook(Path, str)
    converter.register_unstructure_hook(enum.Enum, lambda v: v.name)
    converter.register_unstructure_hook_func(_is_tuple, lambda v: [*map(unstructure, v)])
    return converter


def _said(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, bool):
        return str(value).lower()
    return "a table" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)


def _table(converter: Converter, cls: type[T]) -> Callable[[Any, Any], T]:
    """What structures a class of options; cattrs alone takes for granted that it gets a table."""
    inner = make_dict_structure_fn(cls, converter, _cattrs_forbid_extra_keys=True, _cattrs_detailed_validation=True)

    def read(value: Any, wanted: Any) -> T:
        if not isinstance(value, Mapping):
            raise ValueError(f"expected a table, got {_said(value)}")
        return inner(value, wanted)

    return read


def _exactly(value: Any, wanted: type[T], name: str) -> T:
    if type(value) is not wanted:
        raise ValueError(f"expected {name}, got {_said(value)}")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"expected a number, got {_said(value)}{_quoted(value, float)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"expected a number of at most 1.8e308, got one of {value.bit_length()} bits") from None


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"expected a whole number, got {_said(value)}{_quoted(value, int)}")
    if value.bit_length() > 63:  # more than torch can count
        raise ValueError(f"expected a whole number of at most 9.2e18, got one of {value.bit_length()} bits")
    return value


def _quoted(value: Any, wanted: type[int] | type[float]) -> str:
    """A remedy for the commonest slip: a number written in quotes."""
    try:
        wanted(value) if isinstance(value, str) else wanted("no")
    except ValueError:
        return ""
    return " (remove the quotes)"


def _enum(value: Any, wanted: type[enum.Enum]) -> enum.Enum:
    if isinstance(value, wanted):
        return value
    names = {member.name.lower(): member for member in wanted}
    if isinstance(value, str) and value.lower() in names:
        return names[value.lower()]
    hint = suggest(value.lower(), names) if isinstance(value, str) else ""
    raise ValueError(f"expected one of {', '.join(m.name for m in wanted)}, got {_said(value)}.{hint}")


def _literal(value: Any, wanted: Any) -> Any:
    for allowed in get_args(wanted):
        if type(value) is type(allowed) and value == allowed:
            return value
    options = ", ".join(map(repr, get_args(wanted)))
    hint = suggest(value, [a for a in get_args(wanted) if isinstance(a, str)]) if isinstance(value, str) else ""
    raise ValueError(f"expected one of {options}, got {_said(value)}.{hint}")


def _is_literal(wanted: Any) -> bool:
    return get_origin(wanted) is Literal


def _is_sequence(wanted: Any) -> bool:
    return get_origin(wanted) in (list, tuple)


def _is_tuple(wanted: Any) -> bool:
    return wanted is tuple or get_origin(wanted) is tuple


def _is_union(wanted: Any) -> bool:
    return get_origin(wanted) in (Union, types.UnionType)


def _union(converter: Converter, value: Any, wanted: Any) -> Any:
    """Try each member in the order written; report them all when none fits."""
    members = get_args(wanted)
    if type(None) in members and (value is None or (value is False and bool not in members)):  # TOML has no word for none
        return None
    said = []
    for member in members:
        if member is type(None):
            continue
        try:
            return converter.structure(value, member)
        except Exception as error:
            problems = problems_of(error)
            if attrs.has(member) and isinstance(value, Mapping):  # a table meant for this member: its own problems say more
                raise
            said += [p.message for p in problems]
    none = type(None) in members and bool not in members and str(value).lower() in ("null", "none")
    raise ValueError("; or ".join(dict.fromkeys(said)) + (" (none is written false)" if none else ""))


def _is_dict(wanted: Any) -> bool:
    return (get_origin(wanted) or wanted) in (dict, Mapping)


def _dict(converter: Converter, value: Any, wanted: Any) -> dict[str, Any]:
    """A table whose keys are free; its values have the type that the option says."""
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a table, got {_said(value)}")
    item_type = (*get_args(wanted), Any, Any)[1]
    problems, result = [], {}
    for key, item in value.items():
        try:
            result[_exactly(key, str, "a text as key")] = converter.structure(item, item_type)
        except Exception as error:
            problems += [p.under(str(key)) for p in problems_of(error)]
    if problems:
        raise ConfigError(problems)
    return result


def _sequence(converter: Converter, value: Any, wanted: Any) -> Any:
    """Lists and tuples; a text is not a list of its letters."""
    kind, items = get_origin(wanted), get_args(wanted)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"expected a list, got {_said(value)}")
    if kind is tuple and items and items[-1] is not Ellipsis:
        if len(items) != len(value):
            raise ValueError(f"expected a list of {len(items)} values, got {len(value)}")
        types_of = items
    else:
        types_of = (items[0] if items else Any,) * len(value)
    problems, result = [], []
    for index, (item, item_type) in enumerate(zip(value, types_of, strict=True)):
        try:
            result.append(converter.structure(item, item_type))
        except Exception as error:
            problems += [p.under(f"[{index}]") for p in problems_of(error)]
    if problems:
        raise ConfigError(problems)
    return kind(result)
