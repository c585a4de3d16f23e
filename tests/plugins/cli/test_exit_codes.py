"""The exit codes of the program, as a process of its own gives them, and config.json through a crash."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from drivetrain import RunError, TrainingConfig
from drivetrain_cli import session
from drivetrain_cli.errors import exit_code


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        pytest.param(
            ["train", "run.toml", 'callbacks=["boom"]'], 1, "RuntimeError: the data went away", marks=pytest.mark.slow
        ),
        (["train", "run.toml", 'callbacks=[{use="boom", fails=true}]'], 1, "error: the data went away"),
        (["train", "run.toml", 'callbacks=[{use="boom", mistake=true}]'], 2, "error: the data went away"),
        pytest.param(["train", "run.toml", "optimizer.lr='a'"], 2, "expected a number", marks=pytest.mark.slow),
        pytest.param(["train", "absent.toml"], 2, "absent.toml", marks=pytest.mark.slow),
        (["train", "run.toml", f'callbacks=["keep", {{use="signal", number={int(signal.SIGTERM)}}}]'], 75, "after this step"),
    ],
)
def test_of_a_process(shell: Any, words: list[str], code: int, said: str) -> None:
    done = shell(*words)
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    assert ("--debug" in done.stderr) is ("RuntimeError" in said)  # only for what may be a bug


def test_of_errors() -> None:
    class Full(RunError):
        """A disk's, as a plugin may have it."""

    assert [exit_code(error) for error in (Full("x"), OSError(28, "No space left"), FileNotFoundError(2, "no", "f"))] == [
        1,
        1,
        2,
    ]


class TestConfigFile:
    @pytest.mark.parametrize("place", ["save", "_make_durable", "replace"])
    def test_a_crash_leaves_it_whole_or_absent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
        """As of a kill: nothing after the point is done, clean-up neither."""
        path, old = tmp_path / "config.json", TrainingConfig(seed=1)
        session._keep(old, path)
        before = path.read_bytes()
        if (child := os.fork()) == 0:
            owner: Any = {"save": TrainingConfig, "_make_durable": session, "replace": os}[place]
            monkeypatch.setattr(owner, place, lambda *_: os._exit(9))
            session._keep(TrainingConfig(seed=2), path)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert path.read_bytes() == before
        session._keep(TrainingConfig(seed=3), path)
        assert json.loads(path.read_text())["seed"] == 3
        assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
