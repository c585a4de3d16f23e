"""The trial: two uninterrupted runs, and one that is killed and started again until it is done."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

from drivetrain import DrivetrainError
from drivetrain_verify.compare import Divergence, Record, first_divergence, read_records, unrepeatable

_MODEL = ("model", "optimizer", "samples", "batch", "rng", "progress", "precision")


@frozen
class Report:
    """What a trial found.

    Attributes:
        steps: how many steps the uninterrupted run took.
        kills: how many processes were killed.
        resumed_at: the step after which each process that followed a kill went on.
        compared: states compared.
        ignored: parts that differ between two uninterrupted runs, such as clocks, and were left out.
        unstable: what differs between two uninterrupted runs and must not; then resuming cannot be judged.
        divergence: where the killed run first differs; None when it does not.
        finished: whether the killed run came to the same last step.
    """

    steps: int
    kills: int
    resumed_at: list[int]
    compared: int
    ignored: list[str]
    unstable: Divergence | None
    divergence: Divergence | None
    finished: bool

    @property
    def passed(self) -> bool:
        """Whether everything was equal, bit for bit, and something was tested at all."""
        return self.unstable is None and self.divergence is None and self.finished and any(self.resumed_at)

    def __str__(self) -> str:
        begun = f"{self.kills} kills; went on after steps {', '.join(map(str, self.resumed_at)) or 'none'}"
        if self.unstable is not None:
            return (
                f"two uninterrupted runs differ, so nothing can be said of resuming: {self.unstable}\n"
                "Make the run repeatable first (torch.use_deterministic_algorithms, seeds of your own generators)."
            )
        lines = [f"{self.steps} steps, {begun}; {self.compared} states compared bit by bit"]
        if self.ignored:
            lines.append(f"left out, for it differs between two uninterrupted runs: {', '.join(self.ignored)}")
        lines.append(self._verdict())
        return "\n".join(lines)

    def _verdict(self) -> str:
        if self.divergence is not None:
            return f"NOT EQUAL {self.divergence}"
        if not self.finished:
            return "NOT EQUAL: the killed run did not come to the same last step"
        if not any(self.resumed_at):
            return "NOTHING TESTED: no process went on from a checkpoint. Is the checkpoint callback active (drivetrain-checkpoint)?"
        return "EQUAL: the killed run saw the same samples and has the same weights and state"


@define
class _Runs:
    """Starts sittings of one configuration, each run in a directory of its own below `folder`."""

    file: str
    overrides: list[str]
    steps: int
    folder: Path
    count: dict[str, int] = field(factory=dict)
    _server: Any = None

    def __enter__(self) -> _Runs:
        command = [sys.executable, "-m", "drivetrain_verify.sitting"]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.kill()
        self._server.wait()

    def records(self, run: str) -> Path:
        return self.folder / f"{run}.jsonl"

    def start(self, run: str) -> int:
        """Start the next sitting of a run, with the same configuration each time; returns the process's id."""
        sitting = self.count[run] = self.count.get(run, -1) + 1
        order = {
            "file": self.file,
            "overrides": [*self.overrides, f"output_dir={json.dumps(str(self.folder))}", f'run_name="{run}"', 'resume="auto"'],
            "records": str(self.records(run)),
            "log": str(self._log(run)),
            "sitting": sitting,
            "steps": self.steps,
        }
        path = self.folder / f"{run}.order.json"
        path.write_text(json.dumps(order))
        self._server.stdin.write(f"{path}\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def has_ended(self) -> bool:
        """Whether the sitting in progress is over."""
        return bool(select.select([self._server.stdout], [], [], 0)[0])

    def exit_code(self) -> int:
        """Wait for the sitting in progress."""
        return int(self._server.stdout.readline())

    def check(self, run: str, code: int) -> None:
        """Raise `DrivetrainError` with the end of what a sitting said when it failed."""
        if code:
            said = self._log(run).read_text(errors="replace").strip().splitlines()[-15:]
            raise DrivetrainError(f"a process of the {run} run ended with exit code {code}:\n" + "\n".join(said))

    def _log(self, run: str) -> Path:
        return self.folder / f"{run}.log"


def verify_resume(
    file: str,
    overrides: Sequence[str] = (),
    *,
    steps: int = 20,
    kills: int = 3,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run a configuration for `steps` steps twice, then once more with `kills` SIGKILLs at random instants, and compare.

    Everything is written to a temporary directory, which is removed. The configuration's own checkpoint callback is used, with a
    period that suits so few steps.

    Args:
        file: the configuration.
        overrides: `key=value` texts.
        seed: chooses the instants.
        say: told what happens.

    Raises:
        DrivetrainError: when the configuration is wrong, or a process fails by itself.
    """
    if not hasattr(os, "fork"):
        raise DrivetrainError("verify-resume needs a system with fork and SIGKILL.")
    every = f'callbacks.checkpoint.every="{max(1, steps // 8)}st"'
    with (
        tempfile.TemporaryDirectory(prefix="drivetrain-verify-") as folder,
        _Runs(file, [every, *overrides], steps, Path(folder)) as runs,
    ):
        for name in ("reference", "repeated"):
            say(f"{name}: {steps} steps without interruption")
            runs.start(name)
            runs.check(name, runs.exit_code())
        reference, repeated = (read_records(runs.records(name)) for name in ("reference", "repeated"))
        if not reference:
            raise DrivetrainError("the run took no step.")
        ignored = unrepeatable(reference, repeated)
        if must := {leaf for leaf in ignored if leaf.split("/")[0] in _MODEL}:
            unstable = first_divergence(reference, repeated, ignored - must)
            return Report(reference[-1].step - 1, 0, [], 0, sorted(ignored - must), unstable, None, False)
        killed = _kill(runs, reference, kills, random.Random(seed), say)
        return _judge(reference, read_records(runs.records("killed")), killed, ignored)


def _kill(runs: _Runs, reference: list[Record], kills: int, chance: random.Random, say: Callable[[str], None]) -> int:
    """Kill processes at random instants between the first and the last step; return how many were."""
    steps = max(reference[-1].step - 1, 2)
    pause = (reference[-1].clock - reference[0].clock) / steps  # how long a step takes
    done = 0
    for target in sorted(chance.sample(range(1, steps), min(kills, steps - 1))):
        process = runs.start("killed")
        if _wait_for(runs, target):
            time.sleep(chance.uniform(0.0, pause))
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if (code := runs.exit_code()) == -signal.SIGKILL:
            done += 1
            say(f"killed during or soon after step {target}")
        else:
            runs.check("killed", code)
    runs.start("killed")
    runs.check("killed", runs.exit_code())
    return done


def _wait_for(runs: _Runs, step: int) -> bool:
    """Wait until the sitting in progress has begun a step; False when it ended before."""
    while not runs.has_ended():
        sitting, records = runs.count["killed"], read_records(runs.records("killed"))
        if any(record.step >= step and record.sitting == sitting for record in records):
            return True
        time.sleep(0.002)
    return False


def _judge(reference: list[Record], trial: list[Record], kills: int, ignored: set[str]) -> Report:
    resumed = [record.step - 1 for record in trial if record.first]
    finished = bool(trial) and trial[-1].place == reference[-1].place
    divergence = first_divergence(reference, trial, ignored)
    return Report(reference[-1].step - 1, kills, resumed, len(trial), sorted(ignored), None, divergence, finished)
