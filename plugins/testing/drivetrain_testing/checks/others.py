"""Plugins that are no components: commands, launch environments, presets, file formats, devices, checks of `doctor`."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

import torch

from drivetrain import ConfigError, TrainingConfig
from drivetrain.cluster import Cluster
from drivetrain_testing.harness import difference
from drivetrain_testing.kit import check
from drivetrain_testing.subject import Subject

_TABLE: dict[str, Any] = {"seed": 1, "lr": 0.5, "name": 'a "b" é', "on": True, "list": [1, 2.5, "x"], "table": {"a": {"b": 2}}}


@check("command")
def commands_explain_themselves(subject: Subject) -> None:
    """A command has a line of help without a full stop, and its own --help can be printed."""
    command = _made(subject)
    help = getattr(command, "help", None)
    fine = isinstance(help, str) and help.strip() and "\n" not in help and not help.endswith(".")
    subject.require(fine, f"its help is {help!r}", 'set help = "one line for people, without a full stop"')
    parser = argparse.ArgumentParser(prog=f"drivetrain {subject.name}")
    try:
        command.add_arguments(parser)
        parser.format_help()
    except Exception as error:
        subject.fail(
            f"its --help raises {type(error).__name__}: {error}",
            "add_arguments(self, parser) declares arguments; write % as %% in their help",
        )


@check("command")
def commands_can_run(subject: Subject) -> None:
    """`run` takes the parsed arguments."""
    command = _made(subject)
    parameters = list(inspect.signature(command.run).parameters) if callable(getattr(command, "run", None)) else []
    subject.require(
        len(parameters) == 1,
        f"run takes ({', '.join(parameters)})",
        "def run(self, arguments) -> int, which returns the exit code",
    )


@check("cluster")
def absent_launchers_are_not_seen(subject: Subject) -> None:
    """In an environment without the launcher's variables the answer is None."""
    found = subject.thing({"PATH": "bin"})
    subject.require(
        found is None, f"it sees {found} in an empty environment", "return None unless all the launcher's variables are there"
    )


@check("cluster")
def launchers_are_read(subject: Subject) -> None:
    """In the launcher's environment the answer is a place among the ranks, and the variables that say so."""
    if not subject.environment:
        subject.fail("the kit has no environment to show it", "give conformance(…, environment={the variables of one rank})")
    found = subject.thing(dict(subject.environment))
    if not isinstance(found, Cluster):
        subject.fail(f"it gives {found!r}", "return drivetrain.cluster.Cluster(launcher, rank, world_size, …)")
    sound = 0 <= found.rank < found.world_size and 0 <= found.local_rank < found.local_world_size
    subject.require(
        sound,
        f"rank {found.rank} of {found.world_size}, {found.local_rank} of {found.local_world_size} on this machine",
        "ranks count from 0",
    )
    subject.require(
        found.evidence and set(found.evidence) <= set(subject.environment),
        f"its evidence is {found.evidence}",
        "name the variables that were read, for errors and `drivetrain doctor`",
    )


@check("preset")
def presets_are_valid(subject: Subject) -> None:
    """A preset's table is a configuration."""
    try:
        TrainingConfig.from_table(subject.thing("a-model"), "preset")
    except ConfigError as error:
        subject.fail(f"its table is no configuration: {error}", "return keys of TrainingConfig with plain values")


@check("config_format")
def formats_give_back_what_they_write(subject: Subject) -> None:
    """`loads(dumps(table))` is the table."""
    format = _made(subject)
    if where := difference(format.loads(format.dumps(_TABLE)), _TABLE, "table"):
        subject.fail(
            f"a table written and read is another: {where}", "quote texts, and keep numbers and truth values what they are"
        )


@check("device")
def devices_are_torchs(subject: Subject) -> None:
    """The function gives a torch.device for a local rank."""
    try:
        found = subject.thing(0)
    except Exception as error:
        subject.fail(f"for local rank 0 it raises {type(error).__name__}: {error}", "say so as unsupported where there is none")
    subject.require(isinstance(found, torch.device), f"it gives {found!r} for local rank 0", "return torch.device(type, index)")


@check("check")
def checks_give_verdicts(subject: Subject) -> None:
    """A check of `drivetrain doctor` returns (ok, text, remedy) and raises nothing."""
    try:
        found = subject.thing()
    except Exception as error:
        subject.fail(f"it raises {type(error).__name__}: {error}", "catch it and return (False, what is wrong, what to do)")
    shaped = isinstance(found, tuple) and len(found) == 3 and isinstance(found[0], bool)
    subject.require(
        shaped and all(isinstance(text, str) for text in found[1:]), f"it gives {found!r}", "return (ok, text, remedy)"
    )


def _made(subject: Subject) -> Any:
    return subject.thing() if isinstance(subject.thing, type) else subject.thing
