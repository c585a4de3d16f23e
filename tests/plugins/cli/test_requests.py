"""A file STOP, the end of a SLURM job and SIGUSR1 stop a run in good order."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

RUN = ("train", "run.toml", "--run-name", "a", "log_interval=1st")


def test_a_file_stops_the_run_and_is_taken_away(drivetrain: Any, project: Path) -> None:
    (project / "runs/a").mkdir(parents=True)
    (project / "runs/a/STOP").touch()
    said = drivetrain(*RUN)
    assert (said.code, said.out.startswith("stopped: the file STOP was found (1 step, ")) == (75, True)
    assert not (project / "runs/a/STOP").exists()
    assert drivetrain(*RUN).code == 0


@pytest.mark.parametrize(("left", "code"), [(-5, 75), (0, 75), (100_000, 0)])
def test_the_end_of_a_slurm_job(drivetrain: Any, monkeypatch: Any, left: int, code: int) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + left))
    said = drivetrain(*RUN)
    assert said.code == code
    assert ("stopped: the SLURM job's time is nearly over (1 step, " in said.out) == (code == 75)


def test_an_end_that_is_no_number_is_ignored(drivetrain: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", "soon")
    assert drivetrain(*RUN).code == 0


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="POSIX")
def test_sigusr1_stops_as_well(drivetrain: Any) -> None:
    said = drivetrain(*RUN, f"callbacks=[{{use='signal', number={signal.SIGUSR1:d}}}, 'keep']")
    assert said.code == 75
    assert said.out.startswith("stopped: interrupted by SIGUSR1 (3 steps, ")
