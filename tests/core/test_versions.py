"""What plugins and callers build on: recorded in api.txt, so that nothing of it goes or changes unnoticed.

`python tests/core/test_versions.py` records it anew: after additions whenever you like, after removals with a new major `API`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import drivetrain
from drivetrain import Callback, CallbackContext, commands, component, hooks, hookspecs, registry
from drivetrain.hookspecs import API, retiring

RECORD = Path(__file__).with_name("api.txt")


def contract() -> Iterator[str]:
    """One line for each thing that others rely on."""
    yield f"API {API[0]}.{API[1]}"
    yield from (f"entry points drivetrain.{kind}" for kind in registry.KINDS)
    for specs in hookspecs.SPECS:
        yield from (f"hook {name}{parameters(spec)}" for name, spec in vars(specs).items() if not name.startswith("_"))
    for name in [*drivetrain._HOME, "__version__"]:
        yield from lines_of(f"drivetrain.{name}", getattr(drivetrain, name))
    yield from lines_of("drivetrain.commands.Command", commands.Command)
    yield from lines_of("drivetrain.hooks.RunPluginManager", hooks.RunPluginManager)
    yield from lines_of("drivetrain.hooks.Events", hooks.Events)
    yield from lines_of("drivetrain.registry.Candidate", registry.Candidate)
    for function in (registry.candidates, registry.all_candidates, registry.find, registry.load, registry.is_installed):
        yield from lines_of(f"drivetrain.registry.{function.__name__}", function)


def lines_of(name: str, thing: Any) -> Iterator[str]:
    if isinstance(thing, FunctionType):
        yield f"{name}{parameters(thing)}"
    elif isinstance(thing, type):
        yield f"{name}{parameters(thing.__init__)}"
        own = [cls for cls in thing.__mro__ if cls.__module__.startswith("drivetrain")]
        attributes = {key for cls in own for key in [*vars(cls), *inspect.get_annotations(cls)] if not key.startswith("_")}
        for key in sorted(attributes):
            value = inspect.getattr_static(thing, key, None)
            function = getattr(value, "__func__", value)  # of static and class methods
            yield f"{name}.{key}{parameters(function) if isinstance(function, FunctionType) else ''}"
    else:
        yield name


def parameters(function: Any) -> str:
    """The names of the parameters, with `=` for those that may be left out and `*` for names only."""
    said = []
    for p in inspect.signature(function).parameters.values():
        keyword_only = p.kind is p.KEYWORD_ONLY
        rest = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        said.append(f"{'*' if keyword_only else rest}{p.name}{'' if p.default is p.empty else '='}")
    return f"({', '.join(said)})"


def gone(recorded: list[str], now: list[str]) -> list[str]:
    """Recorded lines that no longer hold; none once the major number has moved."""
    major = recorded[0].partition(".")[0]
    return [] if now[0].partition(".")[0] != major else [line for line in recorded[1:] if line not in now]


def test_nothing_recorded_has_gone() -> None:
    missing = gone(RECORD.read_text(encoding="utf-8").splitlines(), list(contract()))
    assert not missing, "others rely on this (docs/versions.md):\n" + "\n".join(missing)


def test_a_removal_and_a_new_parameter_are_noticed_until_the_major_number_moves() -> None:
    now = list(contract())
    (wrap,) = (line for line in now if line.startswith("drivetrain.Strategy.wrap("))
    changed = [line.replace("model)", "model, mesh)") if line == wrap else line for line in now if "hook on_loss" not in line]
    assert gone(now, changed) == ["hook on_loss(self, ctx)", wrap]
    assert gone(now, ["API 2.0", *changed[1:]]) == []
    assert gone(now, [*now, "hook on_something_new(self, ctx)"]) == []


def test_events_take_ctx_alone() -> None:
    assert {parameters(getattr(hookspecs.EventSpecs, event)) for event in hookspecs.EVENTS} == {"(self, ctx)"}


def test_implementing_a_hook_that_retires_warns_at_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        @retiring("on_log will go; use on_every")
        def on_log(self, ctx: CallbackContext) -> None: ...

    @component
    class Uses(Callback):
        def on_log(self, ctx: CallbackContext) -> None: ...

    @component
    class UsesNot(Callback):
        def on_every(self, ctx: CallbackContext) -> None: ...

    specs = type("Specs", (hookspecs.EventSpecs,), {"on_log": Old.on_log})
    monkeypatch.setattr(hooks, "SPECS", (hookspecs.MakeSpecs, specs))
    with pytest.warns(DeprecationWarning, match="use on_every") as told:
        hooks.RunPluginManager([Uses()])
    assert (told[0].filename, told[0].lineno) == (__file__, Uses.on_log.__code__.co_firstlineno)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hooks.RunPluginManager([UsesNot()])


def test_a_public_name_that_retires_warns_where_it_is_used_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drivetrain, "_RETIRING", {"Loss": "return a mean"})
    monkeypatch.delitem(vars(drivetrain), "Loss", raising=False)
    for _ in range(2):
        with pytest.warns(DeprecationWarning, match=r"drivetrain\.Loss will go: return a mean") as told:
            from drivetrain import Loss  # noqa: F401
        assert told[0].filename == __file__


if __name__ == "__main__":
    RECORD.write_text("\n".join(contract()) + "\n", encoding="utf-8")
