"""Checks: functions that a plugin of some kinds must pass, each with a name that a test's id and `unsupported` use."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen

from drivetrain import PluginError
from drivetrain.registry import KINDS
from drivetrain_testing.subject import CheckError, ConformanceError, Subject, kind_of

if TYPE_CHECKING:
    import pytest

CheckFunction = Callable[[Subject], None]
_CHECKS: dict[str, tuple[tuple[str, ...], CheckFunction]] = {}
_PROCESSES: set[str] = set()  # checks that start some, and take seconds
COMPONENTS = ("optimizer", "scheduler", "precision", "strategy", "callback", "tracker", "mode", "model", "dataset")
ORDINARY = tuple(kind for kind in COMPONENTS if kind != "dataset")  # kinds that take part in every step
_STATIC = ("drivetrain_testing.checks.options", "drivetrain_testing.checks.metadata")  # what needs no run
_MODULES = ("options", "metadata", "runs", "steps", "optimizers", "parts", "strategies", "others")


def check(*kinds: str, processes: bool = False) -> Callable[[CheckFunction], CheckFunction]:
    """Make a function a check of plugins of some kinds (of all, without any); its name is the check's."""

    def add(function: CheckFunction) -> CheckFunction:
        _CHECKS[function.__name__] = (kinds or KINDS, function)
        _PROCESSES.update([function.__name__] if processes else [])
        return function

    return add


@frozen
class Check:
    """One check of one plugin.

    Calling it raises `ConformanceError` when the plugin does not pass, and `CheckError` when the check could not find out.
    """

    name: str
    subject: Subject
    function: CheckFunction

    def __call__(self) -> None:
        joined = _joined()
        try:
            self.function(self.subject)
        except (ConformanceError, CheckError):
            raise
        except Exception as error:
            notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
            raise CheckError(
                f"{self.subject.name}: {self.name} came to no verdict: {type(error).__name__}: {error}{notes}, at {_place(error)}\n"
                "  → mend that first: the checks `trains` and `failures_pass_through` are about runs that fail; a plugin that the "
                "kit's own model or data do not suit gives it some (model=, data=, loss=)"
            ) from error
        finally:
            if _joined() and not joined:  # a strategy alone in this process: it would keep the group until the process ends
                torch.distributed.destroy_process_group()

    def __str__(self) -> str:
        return f"{self.subject.name}: {self.name}"


def _place(error: BaseException) -> str:
    """The line at which it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "an unknown place"


def _joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def checks_for(thing: Any, kind: str | None = None, **setting: Any) -> list[Check]:
    """Every check that applies to a plugin.

    Args:
        thing: a component with its options, or what the entry point of another kind names.
        kind: its kind, where it does not show.
        setting: `model`, `data`, `loss`, `environment`, `budget`, `allow`, `config`, see `Subject`.

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
    *things: Any,
    kind: str | None = None,
    unsupported: Mapping[str, str] | None = None,
    processes: pytest.MarkDecorator | None = None,
    unavailable: str | None = None,
    **setting: Any,
) -> pytest.MarkDecorator:
    """Parametrise a test with every check that applies, each with an id of its own:

        @conformance(MyOptimizer(lr=1e-3), unsupported={"sparse_gradients": "they are never sparse"})
        def test_conformance(check: Check) -> None:
            check()

    Args:
        things: plugins, each as `checks_for` takes it.
        kind: their kind, where it does not show.
        unsupported: checks that the plugin does not pass, with the reason; one that passes after all fails, so that what is
            said here stays true, and so does one that ends in anything but its own verdict.
        unavailable: why no run can be had here, such as "needs a GPU": checks other than those of options and metadata are skipped.
        processes: a mark of your own for checks that start processes and take seconds, to leave them out of a quick suite.
        setting: what the checks need, see `Subject`.
    """
    import pytest

    stated = dict(unsupported or {})
    every = [check for thing in things for check in checks_for(thing, kind, **setting)]
    if unknown := set(stated) - {check.name for check in every}:
        raise PluginError(f"unsupported names {unknown_check(sorted(unknown), {check.name for check in every})}")
    rows = []
    for one in every:
        marks = [pytest.mark.xfail(reason=stated[one.name], strict=True, raises=ConformanceError)] if one.name in stated else []
        marks += [pytest.mark.skip(reason=unavailable)] if unavailable and one.function.__module__ not in _STATIC else []
        marks += [processes] if processes is not None and one.name in _PROCESSES else []
        rows.append(pytest.param(one, id=one.name if len(things) == 1 else f"{one.subject.name}-{one.name}", marks=marks))
    return pytest.mark.parametrize("check", rows)


def unknown_check(names: list[str], known: Iterable[str]) -> str:
    """What to say of names that no check has."""
    near = difflib.get_close_matches(names[0], sorted(known), 1)
    return f"no check: {', '.join(names)}. " + (
        f"Did you mean {near[0]!r}?" if near else f"Checks: {', '.join(sorted(known))}."
    )
