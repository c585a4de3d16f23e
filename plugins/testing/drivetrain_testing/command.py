"""`drivetrain check DISTRIBUTION`, also `drivetrain plugins check`: the conformance kit on an installed plugin."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from drivetrain import Component, PluginError
from drivetrain.registry import Candidate, all_candidates


class CheckCommand:
    """Run every check of the conformance kit on the plugins of an installed distribution, with their default options."""

    help = "run the conformance kit on the plugins of an installed distribution"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("distribution", metavar="DISTRIBUTION", help="such as drivetrain-lion")
        parser.add_argument("--only", metavar="CHECK", action="append", default=[], help="this check alone; may be repeated")

    def run(self, arguments: argparse.Namespace) -> int:
        """Print a line for each check; 0 when all passed, else 1."""
        found = [c for c in all_candidates() if c.distribution == arguments.distribution]
        if not found:
            known = ", ".join(sorted({c.distribution for c in all_candidates()}))
            raise PluginError(
                f"{arguments.distribution!r} is no installed distribution with plugins. Installed: {known or 'none'}."
            )
        failed = sum(_check(candidate, arguments.only) for candidate in found)
        print(f"{arguments.distribution}: {f'{failed} checks failed' if failed else 'all checks passed'}")
        return 1 if failed else 0


def _check(candidate: Candidate, only: list[str]) -> int:
    """Run the checks of one plugin; returns how many failed."""
    from drivetrain_testing.kit import checks_for

    try:
        thing = _made(candidate.load())
    except Exception as error:
        print(f"  skipped  {candidate.kind}:{candidate.name} cannot be made without options: {error}", file=sys.stderr)
        return 0
    failed = 0
    for check in checks_for(thing, candidate.kind):
        if only and check.name not in only:
            continue
        try:
            check()
        except AssertionError as error:
            failed += 1
            print(f"  FAILED   {check}\n           {error}")
        else:
            print(f"  passed   {check}")
    return failed


def _made(thing: Any) -> Any:
    """An instance with default options, for components; the thing itself otherwise."""
    return thing() if isinstance(thing, type) and issubclass(thing, Component) else thing
