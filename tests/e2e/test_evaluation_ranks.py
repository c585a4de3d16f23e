"""Evaluation shared by four ranks: 53 samples in batches of 4, and 3 samples, for which one rank has none, against one process."""

from __future__ import annotations

import importlib.util
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


pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    folder = tmp_path_factory.mktemp("evaluation")
    return {n: load("launching").launch("evaluating.py", n, folder / f"{n}.json") for n in (1, 4)}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("samples", [53, 3])
@pytest.mark.parametrize("sort", ["means", "objects"])
def test_every_sample_counts_once(results: dict[int, Any], strategy: str, samples: int, sort: str) -> None:
    """Weighted means; objects that count, collect lists (torchmetrics, where it is installed) or refuse a sample seen twice."""
    one, four = (results[n][f"{strategy} {sort} {samples}"] for n in (1, 4))
    assert four == pytest.approx(one, rel=1e-6, nan_ok=True)
    assert sort == "means" or four["eval/seen"] == samples


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_an_object_that_cannot_be_joined_is_refused(results: dict[int, Any], strategy: str) -> None:
    assert results[1][f"{strategy} alone"]["eval/seen"] == 5
    assert "has no merge_state(other)" in results[4][f"{strategy} alone"]
