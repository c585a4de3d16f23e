"""Every kind of plugin that `drivetrain new` makes passes its own tests; a project trains."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from flit_core import buildapi

from drivetrain import DrivetrainError, Trainer, TrainingConfig
from drivetrain_scaffold import KINDS, New, make_plugin, make_project
from drivetrain_testing import Check, conformance


@conformance(New())
def test_conformance(check: Check) -> None:
    check()


def run(*words: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=100)


# A plugin of each kind, and some that are called like what their templates import or define.
NAMES = {f"toy-{kind}": kind for kind in KINDS}
NAMES |= {"momentum": "optimizer", "precision": "precision", "tensor-dataset": "dataset", "exception": "callback"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plugin of each kind, and their metadata as an installer would write it."""
    folder = tmp_path_factory.mktemp("plugins")
    for name, kind in NAMES.items():
        project = make_plugin(name, kind, folder, author='Ann "Å" Example')
        here = Path.cwd()
        os.chdir(project)
        try:
            buildapi.prepare_metadata_for_build_wheel(str(folder))
        finally:
            os.chdir(here)
    return folder


@pytest.fixture(scope="module")
def results(made: Path) -> str:
    """What pytest says of all of them, in one process; the checks that start processes are left to `nox -s install`."""
    path = os.pathsep.join(map(str, [made, *(made / name for name in NAMES)]))
    quick = "not killed and not ranks and not collectives and not names and not silence and not partial and not fit_other"
    command = ["-m", "pytest", "-v", "-p", "no:cacheprovider", "--rootdir", made, "-c", os.devnull, "-k", quick, "."]
    result = run(*command, cwd=made, PYTHONPATH=path)
    return result.stdout + result.stderr


@pytest.mark.parametrize("name", NAMES)
def test_the_tests_of_a_new_plugin_pass_at_once(results: str, name: str) -> None:
    mine = [line for line in results.splitlines() if line.startswith(f"{name}/tests/test_{name.replace('-', '_')}.py::")]
    assert len(mine) >= 5, results[-3000:]
    assert [line for line in mine if "PASSED" not in line] == [], results[-3000:]


def test_a_new_model_learns_from_a_new_data_set_by_configuration_alone(made: Path, tmp_path: Path) -> None:
    kinds = ("model", "dataset", "optimizer")
    config = TrainingConfig(
        plugins=[str(made / f"toy-{kind}" / f"toy_{kind}" / "__init__.py") for kind in kinds],
        model="toy_model",
        data="toy_dataset",
        optimizer={"use": "toy_optimizer", "lr": 0.05},
        max_duration="60st",
        standard_callbacks=False,
        output_dir=tmp_path,
    )
    losses = [step.loss for step in Trainer(None, config).steps()]
    assert losses[-1] < losses[0] / 2


def test_a_new_plugin_is_complete(made: Path) -> None:
    project = made / "toy-callback"
    files = {
        str(path.relative_to(project)) for path in project.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert files == {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        ".gitignore",
        ".github/workflows/tests.yml",
        "tests/test_toy_callback.py",
        "toy_callback/__init__.py",
        "toy_callback/py.typed",
    }
    texts = [(project / file).read_text() for file in files]
    assert not any("{{" in text.replace("${{ matrix.python }}", "") for text in texts)
    assert "python-version: ${{ matrix.python }}" in (project / ".github/workflows/tests.yml").read_text()
    table = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    assert table["entry-points"]["drivetrain.callback"] == {"toy_callback": "toy_callback:ToyCallback"}
    assert table["authors"] == [{"name": 'Ann "Å" Example'}]
    assert (project / "LICENSE").read_text() == (Path(__file__).parents[3] / "LICENSE").read_text()


def test_classes_that_their_template_has_a_meaning_for_get_their_kind_behind(made: Path) -> None:
    for name, found in {
        "momentum": "MomentumOptimizer",
        "precision": "PrecisionPrecision",
        "tensor-dataset": "TensorDatasetDataset",
    }.items():
        assert f":{found}" in (made / name / "pyproject.toml").read_text()


def test_a_new_plugin_is_laid_out_and_typed(made: Path) -> None:
    for tool in (
        ["ruff", "format", "--check", "--line-length", "128", "."],
        ["ruff", "check", "--select=E,F,W,UP,B,SIM", "--line-length=128", "."],
    ):
        result = run("-m", *tool, cwd=made)
        assert result.returncode == 0, result.stdout + result.stderr


def _has(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def test_a_new_project_is_complete(tmp_path: Path) -> None:
    project = make_project("digits", tmp_path)
    assert sorted(path.name for path in project.iterdir()) == [
        ".gitignore", "README.md", "data.py", "model.py", "test_train.py", "train.py", "train.toml",
    ]  # fmt: skip
    assert tomllib.loads((project / "train.toml").read_text())["run_name"] == "digits"


def test_a_new_project_passes_its_test(tmp_path: Path) -> None:
    if not _has("drivetrain-optimizers"):
        pytest.skip("the project's optimizer comes with drivetrain-optimizers")
    project = make_project("digits", tmp_path)
    result = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", project, "-c", os.devnull, cwd=project)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [("a b", "cannot be a name"), ("1st", "cannot be a name"), ("../up", "cannot be a name"), ("random", "exists already"),
     ("torch", "exists already"), ("pytest", "exists already"),
     ("adamw", "comes with drivetrain-optimizers"), ("class", "cannot be a name"), ("taken", "taken exists already")],
)  # fmt: skip
def test_names_that_cannot_be_are_refused_before_anything_is_written(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(DrivetrainError, match=said):
        make_plugin(name, "optimizer", tmp_path)
    assert list(tmp_path.rglob("*")) == [tmp_path / "taken"]


def test_the_command_says_what_to_do_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    command = New()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(["plugin", "loss-floor", "--kind", "callback"])) == 0
    assert "cd loss-floor" in capsys.readouterr().out
    assert (tmp_path / "loss-floor" / "loss_floor" / "__init__.py").is_file()
