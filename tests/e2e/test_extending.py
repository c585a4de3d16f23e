"""What those who extend do, as they do it: in a fresh environment, from wheels, outside of the repository."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.test_install import ROOT, Environment

pytestmark = [pytest.mark.install, pytest.mark.timeout(1200)]

KINDS = sorted(
    path.name.partition(".")[0]
    for path in (ROOT / "plugins" / "scaffold").rglob("*.py.template")
    if path.parent.name == "kinds"
)
OURS = ("core", "plugins/cli", "plugins/doctor", "plugins/logging", "plugins/scaffold", "plugins/testing")
# Trains by the configuration file given; what it names is found by name alone.
TRAIN = """
import json, os, sys
import torch
from torch import nn
from torch.utils.data import TensorDataset
from drivetrain import Trainer, load_training_config

config = load_training_config(sys.argv[1], ["max_duration=4st", "standard_callbacks=false", "output_dir=runs"])
torch.manual_seed(0)
x = torch.randn(64, 6)
model = None if config.model else nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1))
data = None if config.data else TensorDataset(x, x.sum(1, keepdim=True))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01) if config.optimizer is None else None
trainer = Trainer(model, config, data, loss=nn.MSELoss(), optimizer=optimizer)
output = trainer.train()
assert output.completed and output.steps == 4, output
said = {"plugins": trainer.plugins(), "rank": trainer.ctx.strategy.rank, "why": trainer.ctx.strategy.reason}
print(json.dumps(said | {"weights": [p.tolist() for p in trainer.model.parameters()]}))
"""
USES = {
    "optimizer": {"optimizer": "toy_optimizer"},
    "scheduler": {"scheduler": "toy_scheduler"},
    "precision": {"precision": "toy_precision"},
    "callback": {"callbacks": ["toy_callback"]},
    "tracker": {"callbacks": [{"use": "logging", "trackers": ["toy_tracker"]}]},
    "mode": {"training_mode": "toy_mode"},
    "model": {"model": "toy_model", "optimizer": "toy_optimizer"},
    "dataset": {"data": "toy_dataset"},
}


class Workshop(Environment):
    """A fresh environment with our wheels, and a folder to work in."""

    def program(self, *words: str | Path) -> str:
        return self.checked("-m", "drivetrain_cli", *words)

    def checked(self, *words: str | Path) -> str:
        clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "DRIVETRAIN_PLUGINS")}
        env = clean | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run([self.interpreter, *words], cwd=self.cwd, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
        return result.stdout

    def train(self, table: dict[str, Any]) -> list[str]:
        """Train by a file that holds `table`; returns the names of the run's plugins."""
        file = self.cwd / "run.json"
        file.write_text(json.dumps(table))
        return json.loads(self.checked("-c", TRAIN, file).splitlines()[-1])["plugins"]

    def publish(self, project: Path) -> None:
        """Build a wheel of a folder and install that."""
        wheels = self.cwd / f"wheels-{project.name}"
        self.pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, project)
        self.pip("install", "-q", "-c", ROOT / "constraints.txt", *wheels.glob("*.whl"))  # its dependencies are here already


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    found = Workshop(tmp_path_factory.mktemp("extending"))
    found.pip("install", "-q", "-c", ROOT / "constraints.txt", "flit_core", "wheel", *(ROOT / folder for folder in OURS))
    return found


@pytest.fixture(scope="module")
def plugins(workshop: Workshop) -> Workshop:
    """A plugin of each kind, made from an empty directory, published and installed."""
    for kind in KINDS:
        workshop.program("new", "plugin", f"toy-{kind}", "--kind", kind)
        workshop.publish(workshop.cwd / f"toy-{kind}")
    return workshop


def test_the_tests_of_every_kind_pass_on_what_is_installed(plugins: Workshop) -> None:
    folders = [plugins.cwd / f"toy-{kind}" / "tests" for kind in KINDS]
    said = plugins.checked("-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", plugins.cwd, *folders)
    assert " passed" in said and "failed" not in said


@pytest.mark.parametrize("kind", USES)
def test_a_configuration_uses_it_by_name(plugins: Workshop, kind: str) -> None:
    active = plugins.train(USES[kind])
    expected = "callback:logging" if kind == "tracker" else f"{kind}:toy_{kind}"
    assert expected in active
    if kind == "tracker":
        assert list((plugins.cwd / "runs").glob("*/toy_tracker.csv"))


def test_two_processes_use_the_strategy_by_name(plugins: Workshop) -> None:
    script = plugins.cwd / "strategy.py"
    script.write_text(TRAIN)
    (plugins.cwd / "ranks.toml").write_text('distributed = "toy_strategy"\n')
    said = plugins.checked("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, "ranks.toml")
    assert said.count("strategy:toy_strategy") == 2


def test_a_launcher_of_ones_own_starts_two_processes(plugins: Workshop) -> None:
    """The plugin `toy_cluster`, once it is named, reads its variables: one run of two processes with the same weights."""
    first, second = launched(plugins, DRIVETRAIN_CLUSTER="toy_cluster")
    assert (first["rank"], second["rank"]) == (0, 1)
    assert "2 processes, started by toy_cluster" in first["why"]
    assert first["weights"] == second["weights"]
    unnamed = launched(plugins)
    assert [said["rank"] for said in unnamed] == [0, 0], "negative control: its variables alone say nothing"


def launched(plugins: Workshop, **variables: str) -> list[dict[str, Any]]:
    """What two processes say that a launcher with variables of its own started at the same time."""
    (plugins.cwd / "launched.toml").write_text('distributed = "toy_strategy"\n')
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "DRIVETRAIN_PLUGINS")}
    clean |= {"OMP_NUM_THREADS": "1"} | variables
    processes = [
        subprocess.Popen(
            [plugins.interpreter, "-c", TRAIN, "launched.toml"],
            cwd=plugins.cwd,
            env=clean | {"TOY_CLUSTER_RANK": str(rank), "TOY_CLUSTER_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    ended = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


def test_the_command_is_one_of_the_program(plugins: Workshop) -> None:
    assert plugins.program("toy_command", "--times", "2") == "hello\nhello\n"
    assert "toy_command" in plugins.program("--help")


def test_the_list_the_check_and_the_doctor_know_them(plugins: Workshop) -> None:
    listed = {row["name"]: row for row in json.loads(plugins.program("plugins", "list", "--json"))}
    assert {f"toy_{kind}" for kind in KINDS} <= set(listed)
    assert all(row["status"] == "ok" for row in listed.values())
    assert "all checks passed" in plugins.program("plugins", "check", "toy-callback")
    assert "listens to  on_log" in plugins.program("plugins", "show", "callback:toy_callback")
    found = json.loads(plugins.program("doctor", "--json"))
    assert all(row["ok"] for row in found), found


def test_the_sample_plugin_passes_its_tests_and_trains_by_name(workshop: Workshop) -> None:
    sample = ROOT / "docs" / "examples" / "third-party-plugin"
    workshop.publish(sample)
    said = workshop.checked("-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, sample / "tests")
    assert " passed" in said
    assert "optimizer:signum" in workshop.checked("-c", TRAIN, sample / "run.toml")


def test_a_new_project_trains_at_once(workshop: Workshop) -> None:
    standard = (ROOT / "plugins" / name for name in ("optimizers", "schedulers", "precision"))
    workshop.pip("install", "-q", "-c", ROOT / "constraints.txt", *standard)
    workshop.program("new", "project", "digits")
    project = workshop.cwd / "digits"
    result = subprocess.run([workshop.interpreter, "train.py"], cwd=project, capture_output=True, text=True)
    assert "accuracy 0.9" in result.stdout, result.stdout + result.stderr
    result = subprocess.run([workshop.interpreter, "-m", "pytest", "-q"], cwd=project, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
