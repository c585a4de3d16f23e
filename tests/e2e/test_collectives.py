"""The collectives of each step, counted by a process group that wraps gloo's, against a script written without Drivetrain."""

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


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load("launching").launch("collectives.py", 2, tmp_path_factory.mktemp("collectives") / "found.json")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", ["mean", "weighted", "hours", "stream", "tokens"])
def test_no_step_has_more_collectives_or_reads_than_a_script(found: Any, strategy: str, case: str) -> None:
    """Whole steps with what is done between them. Unequal weights have to be added up by a script as well, one number, and a run that
    ends after a number of tokens has to read how many there were, which travels with the weights."""
    counts = found[f"{strategy} {case}"]
    assert len(counts["trainer"]) == len(counts["script"]) == 5
    assert counts["trainer"] == counts["script"]


def test_reads_are_counted(found: Any) -> None:
    """Negative control: where a value has to be read, it is seen."""
    for strategy in ("ddp", "fsdp"):
        assert all("reads" in step for step in found[f"{strategy} tokens"]["script"])
        assert not any("reads" in step for step in found[f"{strategy} mean"]["script"])


@pytest.mark.parametrize(("strategy", "groups"), [("ddp", 1), ("fsdp", 4)])
def test_a_window_of_microbatches_is_reduced_once(found: Any, strategy: str, groups: int) -> None:
    """Reductions so far after the backward of each microbatch: none after a window's first."""
    assert found[f"{strategy} mean"]["reductions"] == [0, groups] * 6


def test_unequal_weights_cost_one_reduction_of_one_number(found: Any) -> None:
    for strategy in ("ddp", "fsdp"):
        mean, weighted = found[f"{strategy} mean"]["trainer"], found[f"{strategy} weighted"]["trainer"]
        assert [step["allreduce"] for step in weighted] == [step["allreduce"] + 1 for step in mean]
