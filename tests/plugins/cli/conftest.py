"""A distribution made of files in a temporary folder: a model, data, an optimizer, a checkpoint callback and commands.

It stands for what other people publish, so that these tests need the core and the command line alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ENTRY_POINTS = """
[drivetrain.model]
line = toy_plugin:Line
[drivetrain.dataset]
points = toy_plugin:Points
[drivetrain.optimizer]
plain_sgd = toy_plugin:PlainSgd
[drivetrain.scheduler]
fall = toy_plugin:Fall
[drivetrain.precision]
exact = toy_plugin:Exact
[drivetrain.callback]
keep = toy_plugin:Keep
boom = toy_plugin:Boom
slow = toy_plugin:Slow
signal = toy_plugin:Signal
warns = toy_plugin:Warns
[drivetrain.command]
greet = toy_plugin:Greet
incomplete = toy_plugin:Incomplete
broken = a_module_that_is_not_there:Thing
"""
RUN = """
model = "line"
data = "points"
optimizer = { use = "plain_sgd", lr = 0.1 }
callbacks = ["keep"]
max_duration = "2ep"
device = "cpu"
"""


def add_distribution(site: Path, name: str, entry_points: str, requires: str = "drivetrain-core>=0.1,<1") -> None:
    """Metadata as an installer leaves it."""
    folder = site / f"{name}-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: {requires}\n")
    (folder / "entry_points.txt").write_text(entry_points)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed distributions on this process's path, and on that of processes it starts."""
    folder = tmp_path / "site"
    add_distribution(folder, "toy", ENTRY_POINTS)
    shutil.copy(Path(__file__).with_name("toy_plugin.py"), folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("DRIVETRAIN_PLUGINS", "toy,drivetrain-cli")  # whatever else this environment holds
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "100")
    return folder


@pytest.fixture
def install(site: Path) -> Callable[..., None]:
    """Add one more distribution: `install(name, entry_points, requires)`."""
    return partial(add_distribution, site)


@pytest.fixture
def project(tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of a person with a run.toml in it."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "run.toml").write_text(RUN)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def command(project: Path) -> list[str]:
    """How a process runs the program."""
    return [sys.executable, "-m", "drivetrain_cli"]


@pytest.fixture
def shell(command: list[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the program in a process of its own."""

    def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *words], capture_output=True, text=True, env=os.environ | variables, timeout=60)

    return run


class Said:
    """What one call of `main` gave."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def drivetrain(project: Path, capsys: Any) -> Callable[..., Said]:
    """Run the program in this process, which is faster: torch is imported once."""
    from drivetrain_cli import main

    def run(*words: str) -> Said:
        capsys.readouterr()
        try:
            code = main(words)
        except SystemExit as end:  # how argparse leaves
            code = int(end.code or 0)
        return Said(code, *capsys.readouterr())

    return run
