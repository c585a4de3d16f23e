"""Averaged weights and anomalies with two real processes over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = str(Path(__file__).parent / "two_ranks.py")


def launch(processes: int, target: Path, what: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, SCRIPT, str(target), what], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(target.read_text())
    return found


@pytest.fixture(scope="module")
def anomalies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch(2, tmp_path_factory.mktemp("anomalies") / "two.json", "anomalies")


RUNS = [*(f"{how}-ddp" for how in ("nan-1-None", "inf-2-None", "spike-2-None", "nan-2-fp16", "inf-1-fp16"))]
RUNS += ["spike-1-fp16-ddp", "loss-2-None-ddp", "nan-1-None-fsdp", "spike-2-None-fsdp", "nan-2-fp16-fsdp"]
IGNORED = [name for name in RUNS if "spike" in name or "loss" in name or "fp16" in name or name == "nan-1-None-ddp"]


def overflows(name: str) -> bool:
    """Whether the loss scale leaves the bad step out: it does not count, and its loss is not in the log's mean."""
    return "fp16" in name and "spike" not in name


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", RUNS)
class TestAnomalies:
    """What hurts one rank only is found by both, in the same step; the reference never saw that window."""

    def test_rollback_is_a_run_that_never_saw_the_window(self, anomalies: dict[str, Any], name: str) -> None:
        found = anomalies[f"{name}-rollback"]
        assert found["equal"]
        assert found["steps"] == 15
        assert [(event["step"], event["window"], event["did"]) for event in found["events"]] == [(10, 9, "went back to step 8")]

    def test_skip(self, anomalies: dict[str, Any], name: str) -> None:
        found = anomalies[f"{name}-skip"]
        assert not found["equal"], "negative control for the one above: the step has counted"
        assert found["finite"]
        assert all(found["weights"])
        assert found["steps"] == 16 - overflows(name), "a loss scale leaves an overflow out without counting it"
        (event,) = found["events"]
        assert (event["step"], event["did"]) == (10, "left out")
        if name[:3] in ("nan", "inf"):
            assert event["loss"] in {"nan": ["NaN"], "inf": ["Infinity", "NaN"]}[name[:3]]
        else:  # the mean over the ranks and microbatches, of which one has about 1000² = 1e6
            assert event["loss"] == pytest.approx(1e6 / (4 if "-2-" in name else 2), rel=0.05)
        assert (event["kind"], event["tensor"] == "loss") == (
            ("nonfinite", True) if name[:3] in ("nan", "inf") else ("spike", name[:4] == "loss")
        )

    def test_raise(self, anomalies: dict[str, Any], name: str) -> None:
        found = anomalies[f"{name}-raise"]
        assert found["finite"]
        assert found["steps"] == 12
        assert len(set(found["errors"])) == 1 and "at step 10 (epoch 0, window 9)" in found["errors"][0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", IGNORED)
def test_ignore_makes_the_update_and_tells(anomalies: dict[str, Any], name: str) -> None:
    found, skipped = anomalies[f"{name}-ignore"], anomalies[f"{name}-skip"]
    first = found["events"][0]
    assert (first["step"], first["window"], first["policy"]) == (10, 9, "ignore")
    assert first["did"] == ("left out" if overflows(name) else "nothing"), "what a loss scale does, no policy changes"
    assert found["steps"] == 16 - overflows(name)
    assert found["finite"] == (name != "nan-1-None-ddp")
    assert (found["flat"] == skipped["flat"]) == overflows(name)


@pytest.fixture(scope="module")
def averages(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("averages")
    return {processes: launch(processes, folder / f"{processes}.json", "averages") for processes in (1, 2)}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
class TestAverages:
    def test_two_processes_average_as_one(self, averages: dict[int, dict[str, Any]], strategy: str) -> None:
        one, two = (torch.tensor(averages[n][strategy]["average"], dtype=torch.float64) for n in (1, 2))
        assert float((one - two).abs().max()) < 1e-6

    def test_resume_is_equal_bit_by_bit(self, averages: dict[int, dict[str, Any]], strategy: str) -> None:
        found = averages[2][strategy]
        assert found["step"] == 12
        assert found["resumed"] and found["state"]
