"""Checks: functions that a plugin of some kinds must pass, each with a name that a test's id and `unsupported` use."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen

from drivetrain import PluginError
from drivetrain.registry import KINDS
from drivetrain_testing.subject import Subject, kind_of

if TYPE_CHECKING:
    import pytest

CheckFunction = Callable[[Subject], None]
_CHECKS: dict[str, tuple[tuple[str, ...], CheckFunction]] = {}
COMPONENTS = ("optimizer", "scheduler", "precision", "strategy", "callback", "tracker", "mode", "model", "dataset")
ORDINARY = tuple(kind for kind in COMPONENTS if kind != "dataset")  # kinds that take part in every step
_MODULES = ("options", "metadata", "runs", "steps", "optimizers", "parts", "others")


def check(*kinds: str) -> Callable[[CheckFunction], CheckFunction]:
    """Make a function a check of plugins of some kinds (of all, without any); its name is the check's."""

    def add(function: CheckFunction) -> CheckFunction:
        _CHECKS[function.__name__] = (kinds or KINDS, function)
        return function

    return add


@frozen
class Check:
    """One check of one plugin; calling it raises `ConformanceError` when the plugin does not pass."""

    name: str
    subject: Subject
    function: CheckFunction

    def __call__(self) -> None:
        joined = _joined()
        try:
            self.function(self.subject)
        finally:
            if _joined() and not joined:  # a strategy alone in this process: it would keep the group until the process ends
                torch.distributed.destroy_process_group()

    def __str__(self) -> str:
        return f"{self.subject.name}: {self.name}"


def _joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def checks_for(thing: Any, kind: str | None = None, **setting: Any) -> list[Check]:
    """Every check that applies to a plugin.

    Args:
        thing: a component with its options, or what the entry point of another kind names.
        kind: its kind, where it does not show.
        setting: `model`, `data`, `loss`, `environment`, `budget`, `allow`, see `Subject`.

    Raises:
        PluginError: when the kind is unknown.
    """
    found = kind or kind_of(thing)
    if found not in KINDS:
        raise PluginError(f"{thing!r} is of the kind {found!r}; say kind=... with one of {', '.join(KINDS)}.")
    for module in _MODULES:
        import_module(f"drivetrain_testing.checks.{module}")
    subject = Subject(thing, found, **setting)
    return [Check(name, subject, function) for name, (kinds, function) in _CHECKS.items() if found in kinds]


def conformance(
    *things: Any, kind: str | None = None, unsupported: Mapping[str, str] | None = None, **setting: Any
) -> pytest.MarkDecorator:
    """Parametrise a test with every check that applies, each with an id of its own:

        @conformance(MyOptimizer(lr=1e-3), unsupported={"sparse_gradients": "they are never sparse"})
        def test_conformance(check: Check) -> None:
            check()

    Args:
        things: plugins, each as `checks_for` takes it.
        kind: their kind, where it does not show.
        unsupported: checks that the plugin does not pass, with the reason; one that passes after all fails, so that what is
            said here stays true.
        setting: what the checks need, see `Subject`.
    """
    import pytest

    stated = dict(unsupported or {})
    every = [check for thing in things for check in checks_for(thing, kind, **setting)]
    if unknown := set(stated) - {check.name for check in every}:
        raise PluginError(f"unsupported names {_unknown(sorted(unknown), {check.name for check in every})}")
    rows = [
        pytest.param(
            one,
            id=one.name if len(things) == 1 else f"{one.subject.name}-{one.name}",
            marks=[pytest.mark.xfail(reason=stated[one.name], strict=True)] if one.name in stated else [],
        )
        for one in every
    ]
    return pytest.mark.parametrize("check", rows)


def _unknown(names: list[str], known: Iterable[str]) -> str:
    near = difflib.get_close_matches(names[0], sorted(known), 1)
    return f"no check: {', '.join(names)}. " + (
        f"Did you mean {near[0]!r}?" if near else f"Checks: {', '.join(sorted(known))}."
    )
