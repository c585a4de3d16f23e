"""Import every installed plugin in another process, in which it may print, hang or end the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from attrs import frozen

from drivetrain.registry import Candidate

_SECONDS = 600.0  # for all of them
# Says on a pipe of its own which plugin it begins with, and how that ended; what plugins print goes to a file that is read for it.
_CHILD = """
import json, os, sys, tempfile
from drivetrain.registry import all_candidates

pipe = os.fdopen(os.dup(1), "w")
with tempfile.TemporaryFile() as said:
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    for index, candidate in enumerate(all_candidates()):
        if index < int(sys.argv[1]):
            continue
        print(json.dumps({"begins": index}), file=pipe, flush=True)
        error, start = "", said.seek(0, 2)
        try:
            candidate.load()
        except BaseException as raised:
            error = str(raised) if isinstance(raised, Exception) else f"importing it ends the process with {raised!r}"
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        said.seek(start)
        printed = said.read().decode(errors="replace")
        print(json.dumps({"index": index, "error": error, "printed": printed}), file=pipe, flush=True)
"""


@frozen
class Imported:
    """How the import of a plugin went: `error` is empty when it worked."""

    error: str
    printed: str = ""


def import_all(plugins: Sequence[Candidate]) -> list[Imported]:
    """Import all of what `all_candidates()` gives, each once; one that ends the process does not keep the others from it."""
    found: list[Imported] = []
    while len(found) < len(plugins):
        lines, code = _child(len(found))
        found += [Imported(line["error"], line["printed"]) for line in lines if "index" in line]
        if len(found) < len(plugins):
            found.append(Imported(f"importing it ends the process ({code})"))
    return found[: len(plugins)]


def _child(start: int) -> tuple[list[dict[str, str]], str]:
    """What a process says that begins with plugin `start`, and how it ended."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run([sys.executable, "-c", _CHILD, str(start)], env=env, capture_output=True, timeout=_SECONDS)
        output, code = done.stdout, f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output, code = error.stdout or b"", f"it was not done after {_SECONDS:.0f} s"
    return [json.loads(line) for line in output.splitlines() if line.endswith(b"}")], code
