"""What an engine finds installed: its own distributions and what they need, nothing of what the others brought.

Else a peer pays for its neighbours: transformers imports each of dozens of packages that it finds, and Accelerate looks for one of them
in every step, along a `sys.path` that editable installs make long. Ours keeps the whole environment, which is not to its advantage.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent


def closure(names: Iterable[str]) -> set[str]:
    """Distributions and all that they need here, without extras."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        needs = map(Requirement, metadata.requires(name) or ())
        waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


@cache
def linked(names: tuple[str, ...]) -> Path:
    """A folder that holds the closure of these distributions, as links."""
    folder = Path(tempfile.mkdtemp(prefix="environment-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in closure(names):
        distribution = metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (folder / top).exists():
                (folder / top).symlink_to(str(distribution.locate_file(top)))
    return folder


def python(names: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """The interpreter's command and its variables, with these distributions; with none, everything that is installed."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if not names:
        return [sys.executable], variables | {"PYTHONPATH": str(HERE)}
    return [sys.executable, "-S"], variables | {"PYTHONPATH": os.pathsep.join([str(HERE), str(linked(names))])}
