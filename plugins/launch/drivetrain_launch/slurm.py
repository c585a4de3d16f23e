"""A SLURM job as a file for sbatch: every task is one process of the run, and an interrupted job puts itself back into the queue."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from drivetrain import DrivetrainError

_SCRIPT = """\
#!/bin/bash
{lines}
# Two minutes before the time limit every task gets SIGUSR1: the run saves and ends with 75.
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

# When one task ends, the others have a minute to end by themselves.
srun --kill-on-bad-exit=0 --wait=60 {command}
code=$?
# 75: interrupted in good order, to go on from the checkpoint.
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def write_job(arguments: argparse.Namespace, command: list[str]) -> Path:
    """Write the file and return its path.

    Raises:
        DrivetrainError: when something is missing, or the file is there already and says something else.
    """
    if arguments.nproc is None:
        raise DrivetrainError(
            "--slurm needs --nproc, the number of processes on each machine; this one may have other devices."
        )
    name = next((Path(word).stem for word in command if Path(word).suffix), "drivetrain")
    gpus = arguments.nproc if arguments.gpus is None else arguments.gpus
    values = {
        "job-name": name,
        "nodes": arguments.nodes,
        "ntasks-per-node": arguments.nproc,
        "gpus-per-node": gpus or None,
        "time": arguments.time,
        "output": "%x-%j.log",
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in values.items() if value is not None]
    lines += [f"#SBATCH --{line.removeprefix('--')}" for line in arguments.sbatch]
    program = ["python", *command] if command[0].endswith(".py") else ["drivetrain", *command]
    text = _SCRIPT.format(lines="\n".join(lines), command=shlex.join(program))
    path: Path = arguments.output or Path(f"{name}.sbatch")
    if path.exists() and path.read_text() != text:
        raise DrivetrainError(f"{path} exists already with other content; remove it or give --output.")
    path.write_text(text)
    return path
