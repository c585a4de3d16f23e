"""Ctrl-C and SIGTERM, sent to a real process while it trains."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from drivetrain_cli.interrupt import Interruptible

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """Whatever runs the tests: as a background job they would ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def start(command: list[str]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a training whose steps take their time, and wait until it takes some."""
    started = []

    def run(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*command, "train", "run.toml", "--run-name", "a", "max_duration=1000ep", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("step 1")
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_the_first_stops_after_the_step_and_the_run_goes_on(start: Any, drivetrain: Any) -> None:
    process = start("callbacks=['slow', 'keep']")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "\ninterrupted by Ctrl-C: stopping after this step (once more to end at once)\n" in err
    assert "Traceback" not in err
    steps = int(re.search(r"stopped: interrupted by Ctrl-C \((\d+) steps?, ", out)[1])
    assert out.endswith("go on with: drivetrain resume runs/a\n")
    assert f"going on after step {steps}\n" in drivetrain("resume", "runs/a", f"max_duration={steps + 2}st").err


def test_the_second_ends_at_once(start: Any, project: Path) -> None:
    process = start("callbacks=[{use='slow', seconds=30.0}, 'keep']")
    process.send_signal(signal.SIGINT)
    while "stopping after this step" not in process.stderr.readline():
        pass
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, time.monotonic() - began < 10) == (130, True)
    assert "ended at once" in err
    assert "Traceback" not in err
    assert not (project / "runs/a/state.pt").exists()  # nothing ran that usually ends a run


def test_sigterm_stops_as_well(drivetrain: Any) -> None:
    said = drivetrain("train", "run.toml", f"callbacks=[{{use='signal', number={signal.SIGTERM:d}}}, 'keep']")
    assert said.code == 75
    assert said.out.startswith("stopped: interrupted by SIGTERM (3 steps, ")
    assert "go on with: drivetrain resume runs/" in said.out


def test_without_a_checkpoint_plugin_it_says_so(drivetrain: Any) -> None:
    said = drivetrain("train", "run.toml", f"callbacks=[{{use='signal', number={signal.SIGINT:d}}}]")
    assert said.code == 75
    assert said.out.endswith(
        "no checkpoint was saved, so the same command begins anew (see: drivetrain plugins show checkpoint)\n"
    )


def test_a_background_job_of_a_script_goes_on_ignoring_ctrl_c(drivetrain: Any) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        said = drivetrain("train", "run.toml", f"callbacks=[{{use='signal', number={signal.SIGINT:d}}}]")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (said.code, said.out.startswith("done: max_duration 2ep reached (16 steps, ")) == (0, True)


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_handlers_are_back_afterwards(fails: bool) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    heard: list[str] = []
    try:
        with Interruptible(heard.append, speaks=False) as interrupt:
            assert signal.getsignal(signal.SIGTERM) not in before
            signal.raise_signal(signal.SIGTERM)
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert heard == [interrupt.reason] == ["interrupted by SIGTERM"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_data_worker_outlives_ctrl_c_but_not_sigterm() -> None:
    heard: list[str] = []
    with Interruptible(heard.append, speaks=False):
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            if not heard:
                signal.raise_signal(signal.SIGTERM)
            os._exit(1)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
    assert not heard
