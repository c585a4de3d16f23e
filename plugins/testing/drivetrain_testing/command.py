"""`drivetrain check DISTRIBUTION`, also `drivetrain plugins check`: the conformance kit on an installed plugin."""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from drivetrain import Component, DrivetrainError, PluginError
from drivetrain.registry import Candidate, all_candidates
from drivetrain.structure import structure

if TYPE_CHECKING:
    from drivetrain_testing.kit import Check


class CheckCommand:
    """Run every check of the conformance kit on the plugins of an installed distribution."""

    help = "run the conformance kit on the plugins of an installed distribution"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("distribution", metavar="DISTRIBUTION", help="such as drivetrain-lion")
        more: dict[str, Any] = {"action": "append", "default": []}
        parser.add_argument("--plugin", metavar="KIND:NAME", **more, help="this plugin alone; may be repeated, as all of these")
        parser.add_argument("--only", metavar="CHECK", **more, help="this check alone")
        parser.add_argument("--option", metavar="NAME=VALUE", **more, help="an option of the plugins, the value as in TOML")
        parser.add_argument("--unsupported", metavar="CHECK=REASON", **more, help="a check that they do not pass, and why not")
        parser.add_argument("--environment", metavar="NAME=VALUE", **more, help="what the launcher sets, for the kind cluster")
        parser.add_argument("--model", metavar="MODULE:FUNCTION", help="makes a model that suits the plugins")
        parser.add_argument("--data", metavar="MODULE:FUNCTION", help="makes the data for it")
        parser.add_argument("--loss", metavar="MODULE:FUNCTION", help="loss(outputs, targets), where the model returns none")

    def run(self, arguments: argparse.Namespace) -> int:
        """Print a line for each check; 0 when all passed, else 1."""
        found = _chosen(arguments.distribution, arguments.plugin)
        stated = dict(_pair(text, "--unsupported") for text in arguments.unsupported)
        checks, failed = [], 0
        for candidate in found:
            try:
                checks += _checks(candidate, arguments)
            except Exception as error:  # whatever its import or its options raise
                failed += 1
                print(f"  FAILED   {candidate.kind}:{candidate.name}: it cannot be checked: {error}")
        names = {check.name for check in checks}
        if checks and (unknown := [name for name in (*arguments.only, *stated) if name not in names]):
            from drivetrain_testing.kit import unknown_check

            raise PluginError(unknown_check(unknown, names))
        checks = [check for check in checks if not arguments.only or check.name in arguments.only]
        failed += sum(not _passes(check, stated.get(check.name)) for check in checks)
        excused = sum(check.name in stated for check in checks)
        said = f", {excused} unsupported" if excused else ""
        print(f"{arguments.distribution}: " + (f"{failed} failed" if failed else f"all checks passed ({len(checks)}{said})"))
        return 1 if failed else 0


def _chosen(distribution: str, wanted: Sequence[str]) -> list[Candidate]:
    """The plugins of a distribution, or those of them that `wanted` names as "kind:name"."""
    found = [c for c in all_candidates() if c.distribution == distribution]
    if not found:
        known = ", ".join(sorted({c.distribution for c in all_candidates()}))
        raise PluginError(f"{distribution!r} is no installed distribution with plugins. Installed: {known or 'none'}.")
    names = {f"{c.kind}:{c.name}": c for c in found}
    if unknown := [name for name in wanted if name not in names]:
        raise PluginError(f"{distribution} has no plugin {', '.join(unknown)}. It has: {', '.join(names)}.")
    return [names[name] for name in wanted] if wanted else found


def _checks(candidate: Candidate, arguments: argparse.Namespace) -> list[Check]:
    from drivetrain_testing.kit import checks_for

    options = {name: _value(text) for name, text in (_pair(given, "--option") for given in arguments.option)}
    setting = {
        name: _named(getattr(arguments, name), f"--{name}") for name in ("model", "data", "loss") if getattr(arguments, name)
    }
    setting |= {"environment": dict(_pair(text, "--environment") for text in arguments.environment)}
    return checks_for(_made(candidate.load(), options), candidate.kind, **setting)


def _made(thing: Any, options: Mapping[str, Any]) -> Any:
    """An instance with the options, for components; the thing itself otherwise."""
    if not (isinstance(thing, type) and issubclass(thing, Component)):
        return thing
    try:
        return structure(options, thing, "--option")
    except DrivetrainError as error:
        raise PluginError(f"{error} (give --option NAME=VALUE)") from error


def _passes(check: Check, reason: str | None) -> bool:
    """Run one check and say how it went; one that is stated as unsupported must fail."""
    from drivetrain_testing.subject import CheckError, ConformanceError

    try:
        check()
    except CheckError as error:
        print(f"  FAILED   {check}\n           {error}")
        return False
    except ConformanceError as error:
        print(f"  FAILED   {check}\n           {error}" if reason is None else f"  not so   {check} ({reason})")
        return reason is not None
    print(f"  passed   {check}" if reason is None else f"  FAILED   {check}\n           it passes: take it from --unsupported")
    return reason is None


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise DrivetrainError(f"{option} {text}: write NAME=VALUE.")
    return name.strip(), value.strip()


def _value(text: str) -> Any:
    """A value as in TOML; a bare word is a text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _named(text: str, option: str) -> Any:
    """What "module:function" names."""
    module, _, name = text.partition(":")
    if os.getcwd() not in sys.path:  # a program, unlike `python -m`, does not look where it was started
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise DrivetrainError(
            f"{option} {text}: {error}. Write MODULE:FUNCTION, of a module that Python finds here."
        ) from error
