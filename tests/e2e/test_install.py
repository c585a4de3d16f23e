"""What `pip install` gives a person, in a virtual environment of its own: `nox -s install`."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
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
# Prints which of the names are there, and what is said of the others; with "load", imports those whose dependencies are installed.
LOOK_UP = """
import json, sys
from importlib import metadata
from drivetrain import PluginError, registry

def has_dependencies(candidate):
    from pip._vendor.packaging.requirements import Requirement
    wanted = [Requirement(line) for line in candidate.requires]
    found = {d.name.lower().replace("_", "-") for d in metadata.distributions()}
    return {r.name.lower().replace("_", "-") for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})} <= found

there, said, loaded = [], {}, []
for kind, name in json.load(sys.stdin):
    try:
        candidate = registry.find(kind, name)
    except PluginError as error:
        said[f"{kind}:{name}"] = str(error)
        continue
    there.append(f"{kind}:{name}")
    if has_dependencies(candidate):
        candidate.load()
        loaded.append(f"{kind}:{name}")
print(json.dumps([there, said, loaded]))
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

    def python(self, *arguments: str | Path, given: str = "") -> subprocess.CompletedProcess[str]:
        command = [self.interpreter, "-I", *arguments]
        return subprocess.run(command, cwd=self.cwd, capture_output=True, text=True, input=given)

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


def test_every_plugin_is_usable_by_name_when_installed_and_says_how_to_get_it_when_not(core_alone: Environment) -> None:
    """Without their other dependencies, which `isolated` has: what is asked here is that nothing else must be done."""
    folders = [path.parent for kind in ("plugins", "contrib") for path in sorted((ROOT / kind).glob("*/pyproject.toml"))]
    names, home = [], {}
    for folder in folders:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for group, entries in project.get("entry-points", {}).items():
            if group.startswith("drivetrain."):
                names += [(group.removeprefix("drivetrain."), name) for name in entries]
                home |= {f"{group.removeprefix('drivetrain.')}:{name}": project["name"] for name in entries}
    assert len(names) > 90 and len(set(home.values())) > 35, "the plugins' metadata is read"

    def look_up() -> tuple[list[str], dict[str, str], list[str]]:
        found = core_alone.python("-c", LOOK_UP, given=json.dumps(names))
        assert found.returncode == 0, found.stderr
        return json.loads(found.stdout)  # type: ignore[no-any-return]

    core_alone.pip("install", "-q", "-c", ROOT / "constraints.txt", "flit_core")  # else pip fetches it for each of them
    core_alone.pip("install", "-q", "--no-deps", "--no-build-isolation", *folders)
    there, said, loaded = look_up()
    assert (set(there), said) == (set(home), {})
    assert len(loaded) > 50, "the names of plugins that need nothing else are imported"

    core_alone.pip("uninstall", "-q", "-y", *set(home.values()))
    there, said, _ = look_up()
    assert there == []
    assert {name for name, message in said.items() if f"pip install {home[name]}" not in message} == set()
