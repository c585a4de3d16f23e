"""`drivetrain launch`: several processes of one run, on this machine through torchrun's agent, or as a SLURM job."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from drivetrain import DrivetrainError, load_training_config
from drivetrain.registry import candidates

__all__ = ["Launch"]
_OF_SLURM: dict[str, Any] = {"nodes": 1, "gpus": None, "time": None, "sbatch": [], "output": None}  # with their defaults


class Launch:
    """Start the same command in several processes that train together."""

    help = "start a run in several processes, on this machine or as a SLURM job"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments; everything from the command on belongs to the command."""
        parser.usage = "drivetrain launch [--nproc N] [--slurm …] train FILE [key=value …]"
        parser.add_argument(
            "--nproc", metavar="N", type=_positive, help="processes on each machine; by default one for each device"
        )
        parser.add_argument(
            "--max-restarts", metavar="N", type=int, default=0, help="start all again this often after a failure (0)"
        )
        parser.add_argument(
            "--grace", metavar="SECONDS", type=int, default=600, help="time to save after SIGTERM or Ctrl-C (600)"
        )
        parser.add_argument("--slurm", action="store_true", help="write a file for sbatch instead, which requeues itself")
        slurm = parser.add_argument_group("with --slurm")
        slurm.add_argument("--nodes", metavar="N", type=_positive, default=1, help="machines (1)")
        slurm.add_argument("--gpus", metavar="N", type=int, help="GPUs on each machine; by default as many as processes")
        slurm.add_argument("--time", metavar="LIMIT", help="the job's time limit, such as 24:00:00")
        slurm.add_argument(
            "--sbatch", metavar="KEY=VALUE", action="append", default=[], help="another line, such as partition=gpu"
        )
        slurm.add_argument("--output", metavar="FILE", type=Path, help="by default the configuration's name with .sbatch")
        parser.add_argument("command", nargs=argparse.REMAINDER, metavar="train FILE …", help="a command, or a Python script")

    def run(self, arguments: argparse.Namespace) -> int:
        """Start the processes and return the exit code of the run, or write the job's file."""
        command = _checked(arguments.command)
        if arguments.slurm:
            from drivetrain_launch.slurm import write_job

            print(f"sbatch {write_job(arguments, command)}")
            return 0
        if given := [f"--{name}" for name, default in _OF_SLURM.items() if getattr(arguments, name) != default]:
            raise DrivetrainError(f"{', '.join(given)} goes with --slurm; on one machine give --nproc alone.")
        if command[0] == "train" and len(command) > 1 and not command[1].startswith("-"):
            values = [word for word in command[2:] if "=" in word and not word.startswith("-")]
            load_training_config(command[1], overrides=values)  # a mistake is told once, before anything is started
        from drivetrain_launch.local import launch  # torch, which --help need not wait for

        return launch(command, arguments.nproc, arguments.max_restarts, arguments.grace)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _checked(command: list[str]) -> list[str]:
    """The command without a leading "--".

    Raises:
        DrivetrainError: for one that every process would refuse.
    """
    words = command[1:] if command[:1] == ["--"] else command
    if not words:
        raise DrivetrainError("what is to be launched? For example: drivetrain launch --nproc 2 train run.toml")
    name = words[0]
    if name.endswith(".py"):
        if not os.path.isfile(name):
            raise DrivetrainError(f"there is no script {name}.")
    elif name not in {"train", "resume", *candidates("command")} or name == "launch":
        raise DrivetrainError(f"{name!r} is no command to launch; give train, resume or a Python script.")
    return words
