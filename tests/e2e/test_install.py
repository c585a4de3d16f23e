"""What `pip install` gives a person, in a virtual environment of its own: `nox -s install`."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = [pytest.mark.install, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]

PARTS = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from drivetrain import DrivetrainError, Trainer, TrainingConfig

torch.manual_seed(0)
x = torch.randn(64, 4)
data = TensorDataset(x, x.sum(1, keepdim=True))
model = nn.Linear(4, 1)
loss, optimizer = nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1)
"""
TRAIN_IN_SILENCE = f"""{PARTS}
before = loss(model(x), data.tensors[1]).item()
output = Trainer(model, TrainingConfig(max_duration="5ep"), data, loss=loss, optimizer=optimizer).train()
assert output.steps == 40 and output.completed and output.run_dir is None, output
assert loss(model(x), data.tensors[1]).item() < 0.01 * before
"""
STOP_EARLY = f"""{PARTS}
config = TrainingConfig(max_duration="50ep", callbacks=[{{"use": "early_stopping", "patience": 2}}])
try:
    output = Trainer(model, config, data, data, loss=loss, optimizer=optimizer).train()
except DrivetrainError as error:
    raise SystemExit(str(error))
print(output.stop_reason)
"""
# Reads the metadata with what pip itself brings: distributions that the core needs, directly and in all.
CLOSURE = """
import json
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

def needs(name):
    wanted = [Requirement(line) for line in requires(name) or []]
    return {canonicalize_name(r.name) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})}

every = open_ = {"drivetrain-core"}
while open_:
    open_ = set().union(*map(needs, open_)) - every
    every = every | open_
print(json.dumps([sorted(needs("drivetrain-core")), sorted(every)]))
"""


class Environment:
    """A fresh virtual environment and the folder in which its programs run."""

    def __init__(self, folder: Path) -> None:
        self.cwd = folder / "empty"
        self.cwd.mkdir()
        venv.create(folder / "env", with_pip=True, symlinks=sys.platform != "win32")
        scripts = "Scripts" if sys.platform == "win32" else "bin"
        self.interpreter = folder / "env" / scripts / "python"

    def python(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.interpreter, "-I", *arguments], cwd=self.cwd, capture_output=True, text=True)

    def pip(self, *arguments: str | Path) -> str:
        result = self.python("-m", "pip", *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout


@pytest.fixture(scope="module")
def core_alone(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    env = Environment(tmp_path_factory.mktemp("core"))
    env.pip("install", "-q", "-c", ROOT / "constraints.txt", ROOT / "core")
    return env


def test_the_core_trains_in_silence_and_leaves_no_file(core_alone: Environment) -> None:
    torch_itself = core_alone.python("-c", "import torch").stderr  # it warns when there is no NumPy
    result = core_alone.python("-c", TRAIN_IN_SILENCE)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", torch_itself)
    assert list(core_alone.cwd.iterdir()) == []


def test_the_core_brings_its_five_dependencies_and_theirs(core_alone: Environment) -> None:
    installed = {item["name"].lower().replace("_", "-") for item in json.loads(core_alone.pip("list", "--format", "json"))}
    direct, every = json.loads(core_alone.python("-c", CLOSURE).stdout)
    assert direct == ["attrs", "cattrs", "pluggy", "tomli", "torch"]
    assert installed - {"pip", "setuptools"} == set(every) - {"setuptools"}


def test_installing_a_plugin_makes_its_name_usable_and_uninstalling_it_says_how_to_get_it(core_alone: Environment) -> None:
    core_alone.pip("install", "-q", ROOT / "plugins" / "early-stopping")
    used = core_alone.python("-c", STOP_EARLY)
    assert used.returncode == 0, used.stderr
    assert "eval/loss" in used.stdout

    core_alone.pip("uninstall", "-q", "-y", "drivetrain-early-stopping")
    refused = core_alone.python("-c", STOP_EARLY)
    assert refused.returncode == 1
    assert "callbacks[0]" in refused.stderr and "pip install drivetrain-early-stopping" in refused.stderr
