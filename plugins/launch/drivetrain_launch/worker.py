"""One launched process: `python -m drivetrain_launch.worker RECORDS COMMAND …`, with the environment that torchrun's agent sets.

Runs the command as the `drivetrain` program would, and leaves its exit code in a file. To the agent an interruption in good order (75)
is a success, or it would end the others while they save. A mistake (2) is a failure, or the others would wait for one that has refused;
starting all again would not mend it, so that a new attempt ends at once.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

from drivetrain_launch.records import Records

MISTAKE, PREEMPTED = 2, 75


def main(folder: str, command: list[str]) -> int:
    """Run the command; returns what the agent is to see."""
    records, parent = Records(Path(folder)), os.getppid()
    records.begin(os.environ)
    if MISTAKE in records.codes():
        records.end(os.environ, MISTAKE)
        return MISTAKE
    threading.Thread(target=_end_with, args=(parent,), name="drivetrain-launch", daemon=True).start()
    code = 1
    try:
        code = _run(command)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    finally:
        with contextlib.suppress(OSError):  # the launcher may have been killed, and its folder removed
            records.end(os.environ, code)
    return 0 if code == PREEMPTED else code


def _run(command: list[str]) -> int:
    if command[0].endswith(".py"):
        sys.argv = command
        sys.path[0] = str(Path(command[0]).resolve().parent)  # as for `python script.py`
        runpy.run_path(command[0], run_name="__main__")
        return 0
    programs = metadata.entry_points(group="console_scripts", name="drivetrain")
    if not programs:
        sys.exit("error: there is no program drivetrain here: pip install drivetrain-cli")
    sys.argv = ["drivetrain", *command]
    return int(next(iter(programs)).load()() or 0)


def _end_with(parent: int) -> None:
    """Ask this process to end in good order when the launcher has been killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
