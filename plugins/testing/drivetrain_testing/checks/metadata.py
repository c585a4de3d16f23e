"""The distribution: what its metadata promises, and what importing it does."""

from __future__ import annotations

import ast
import logging
import re
import signal
import sys
import tempfile
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from drivetrain_testing.kit import check
from drivetrain_testing.processes import ProcessError, run_processes
from drivetrain_testing.subject import Subject

_OWN = ("drivetrain_testing",)


@check()
def is_registered(subject: Subject) -> None:
    """An entry point of the group of its kind leads to it."""
    _distribution(subject)
    subject.require(
        subject.candidate,
        f"no entry point of the group drivetrain.{subject.kind} leads to {subject.label}",
        f'add [project.entry-points."drivetrain.{subject.kind}"] NAME = "{subject.module}:{subject.label}" to '
        "pyproject.toml and install again",
    )


@check()
def requires_the_core_by_range(subject: Subject) -> None:
    """So that a core it was not made for is refused by name, and one it was made for is not."""
    lines = [line for line in _distribution(subject).requires or () if re.match(r"drivetrain[-_.]core\b", line, re.IGNORECASE)]
    subject.require(lines, "its metadata does not require drivetrain-core", 'add "drivetrain-core>=0.1,<1" to dependencies')
    wanted = lines[0].partition(";")[0]
    subject.require(
        ">" in wanted and "<" in wanted and "==" not in wanted,
        f"it requires {lines[0]!r}",
        'give a range with both ends, "drivetrain-core>=0.1,<1": an exact version breaks with every release of the '
        "core, an open one with the first that changes",
    )


@check()
def has_a_licence(subject: Subject) -> None:
    """Who may use it is part of its metadata."""
    found: Any = _distribution(subject).metadata
    said = found.get("License-Expression") or found.get("License")
    said = said or any(line.startswith("License ::") for line in found.get_all("Classifier") or ())
    subject.require(said, "its metadata names no licence", 'add license = "Apache-2.0" (an SPDX expression) to [project]')


@check()
def is_typed(subject: Subject) -> None:
    """Type checkers read annotations only where a package has the file py.typed."""
    folders = _folders(subject)
    subject.require(
        any((folder / "py.typed").is_file() for folder in folders),
        f"the package {subject.package} has no py.typed",
        "add an empty file py.typed beside __init__.py",
    )


@check()
def imports_no_sibling(subject: Subject) -> None:
    """A plugin needs the core alone: another plugin may be missing, or of another version."""
    siblings = sorted(name for name in _imported_by(subject) if name != subject.package and name not in _OWN)
    subject.require(
        not siblings,
        f"it imports {', '.join(siblings)}",
        "use what drivetrain itself offers (make_component for parts "
        "that the user names), or move what both need into a library of its own",
    )


@check(processes=True)
def imports_in_silence(subject: Subject) -> None:
    """Importing it works without a GPU, prints nothing and changes nothing in the process."""
    try:
        said = _import_facts(subject.module)
    except ProcessError as error:
        subject.fail(
            f"it cannot be imported where there is no GPU:\n{error}",
            "touch devices in hooks, where ctx.device says which there is, not at the module's top",
        )
    subject.require(
        not said,
        f"importing it {' and '.join(said)}",
        "do at import time nothing but define; loggers come from "
        "logging.getLogger(__name__), and their handlers are the application's affair",
    )


def _distribution(subject: Subject) -> metadata.Distribution:
    if subject.distribution is None:
        subject.fail(
            f"the module {subject.module} belongs to no installed distribution with an entry point in a group drivetrain.KIND",
            f'add [project.entry-points."drivetrain.{subject.kind}"] to pyproject.toml and install it '
            "(pip install -e .); for a plugin that stays a file, state it as unsupported",
        )
    return metadata.distribution(subject.distribution)


def _folders(subject: Subject) -> list[Path]:
    spec = find_spec(subject.package)
    return [Path(place) for place in (spec.submodule_search_locations or ()) if spec] if spec else []


def _imported_by(subject: Subject) -> set[str]:
    """The modules of other plugins that any file of the package imports, also those imported inside functions."""
    spec = find_spec(subject.package)
    single = [Path(spec.origin)] if spec and spec.origin and not spec.submodule_search_locations else []
    files = [*single, *(file for folder in _folders(subject) for file in folder.rglob("*.py") if "templates" not in file.parts)]
    found: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            found |= {name.partition(".")[0] for name in names}
    return found & _plugin_packages(subject.package)


def _plugin_packages(own: str) -> set[str]:
    """The modules that installed plugins live in, and whatever is called like one."""
    points = [entry for group, entries in _groups().items() if group.startswith("drivetrain.") for entry in entries]
    named = {name for name in sys.modules if name.startswith("drivetrain_") and "." not in name}
    return {entry.value.partition(":")[0].split(".")[0] for entry in points} | named | {own}


def _groups() -> dict[str, Any]:
    found = metadata.entry_points()
    return {group: found.select(group=group) for group in found.groups}


@cache
def _import_facts(module: str) -> tuple[str, ...]:
    (facts,) = run_processes(_import_alone, [(module,)])
    return tuple(facts)


def _import_alone(module: str) -> list[str]:
    """Import a module in this process, which has imported torch and the core; returns what that did besides."""
    import os

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    before = (list(logging.root.handlers), logging.root.level, torch.get_default_dtype(), torch.is_grad_enabled())
    with tempfile.TemporaryFile() as said:
        kept = os.dup(1), os.dup(2)
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        try:
            import_module(module)
            sys.stdout.flush()
        finally:
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
        said.seek(0)
        printed = said.read().decode(errors="replace").strip()
    after = (list(logging.root.handlers), logging.root.level, torch.get_default_dtype(), torch.is_grad_enabled())
    facts = [f"prints {printed:.200}"] if printed else []
    facts += ["configures logging"] if before[:2] != after[:2] else []
    facts += ["changes torch's default type or gradient mode"] if before[2:] != after[2:] else []
    changed = handlers != [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return [*facts, *(["installs a signal handler"] if changed else [])]
