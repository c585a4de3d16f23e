"""The conformance kit for Drivetrain plugins, and a harness for tiny trainings, ranks and killed runs."""

from __future__ import annotations

from drivetrain_testing.harness import (
    PlainSgd,
    Restore,
    difference,
    discovery_blocked,
    final_state,
    state_after,
    tiny_data,
    tiny_model,
    tiny_trainer,
    weights,
)
from drivetrain_testing.kit import Check, checks_for, conformance
from drivetrain_testing.processes import GlooStrategy, ProcessError, kill_and_resume, run_processes, spawn_ranks
from drivetrain_testing.subject import CheckError, ConformanceError, Subject

__all__ = [
    "Check",
    "CheckError",
    "ConformanceError",
    "GlooStrategy",
    "PlainSgd",
    "ProcessError",
    "Restore",
    "Subject",
    "checks_for",
    "conformance",
    "difference",
    "discovery_blocked",
    "final_state",
    "kill_and_resume",
    "run_processes",
    "spawn_ranks",
    "state_after",
    "tiny_data",
    "tiny_model",
    "tiny_trainer",
    "weights",
]
