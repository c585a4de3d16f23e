"""Sophia on two processes: every rank has the curvature of the whole step's data, with labels drawn on each rank by itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def launch(*arguments: Any) -> Any:
    spec = importlib.util.spec_from_file_location("e2e_launching", Path(__file__).with_name("launching.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.launch(*arguments)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made: dict[str, Any] = launch("sophia_ranks.py", 2, tmp_path_factory.mktemp("sophia") / "two.json")
    return made


def difference(one: list[float], other: list[float]) -> float:
    a, b = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    return float((a - b).abs().max() / a.abs().max())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_estimate_is_that_of_all_ranks_data_at_once(found: dict[str, Any], strategy: str) -> None:
    one = found[strategy]
    assert one["positions"][0] != one["positions"][1], "the ranks have unequal numbers of labels"
    for estimate in one["estimate"]:
        assert difference(one["by hand"], estimate) < 1e-6  # B is a float32
    assert difference(one["by hand"], one["same labels on both"]) > 1e-2, "control: each rank draws its own"
    assert difference(one["by hand"], one["mean of the ranks' squares"]) > 1e-2, "control: gradients are averaged, then squared"


def test_sharded_or_not_it_is_the_same_training(found: dict[str, Any]) -> None:
    for what in ("weights", "curvature"):
        assert difference(found["ddp"][what][0], found["fsdp"][what][0]) < 1e-6


@pytest.mark.parametrize(
    ("run", "what"),
    [("ddp", "weights"), ("ddp", "curvature"), ("fsdp", "weights"), ("fsdp", "curvature"), ("sophia_h", "weights")],
)
def test_the_ranks_stay_together(found: dict[str, Any], run: str, what: str) -> None:
    first, second = found[run][what]
    assert first == second
    assert any(first)
