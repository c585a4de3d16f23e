"""Two real processes over gloo: an error of rank 0 reaches both, and both go on from the same checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank met, all scenarios in one pair of processes; a rank that waits for ever ends the test by its timeout."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(folder), str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    for process in ranks:
        try:
            _, said = process.communicate(timeout=100)
        except subprocess.TimeoutExpired:
            for one in ranks:
                one.kill()
            raise
        assert process.returncode == 0, said[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("asynchronous", ["background", "at once"])
def test_an_error_of_rank_0_reaches_all(results, asynchronous):
    first, second = (found[f"full disk, {asynchronous}"] for found in results)
    assert "checkpoint of step 3 could not be written: No space left on device" in first["error"]
    assert second["error"] == f"on rank 0: {first['error']}"
    # at the next logging step after the writing has failed, at the next save at the latest
    assert first["step"] == second["step"] in ((3,) if asynchronous == "at once" else (3, 4, 5, 6))


def test_a_full_disk_that_is_to_be_warned_of_ends_neither(results):
    first, second = (found["warn"] for found in results)
    assert (first["error"], second["error"]) == ("", "") and first["step"] == second["step"] == 8
    assert (first["warnings"], second["warnings"]) == (1, 0)


def test_what_is_found_before_the_first_step_reaches_all(results):
    for scenario, text in (("read-only", "Read-only file system"), ("in use", "is in use by"), ("nowhere", "is neither a run")):
        first, second = (found[scenario] for found in results)
        assert text in first["error"] and text in second["error"], scenario
        assert first["step"] == second["step"] == 0


def test_rank_0_decides_from_where_and_both_end_as_if_uninterrupted(results):
    for found in results:
        assert found["resumed"]["from"] == "step-00000004"  # that of step 6 is damaged
        assert found["resumed"]["weights"] == found["reference"]["weights"] == results[0]["reference"]["weights"]
        assert found["resumed"]["announced"] == results[0]["resumed"]["announced"] == [6, 8]
    assert results[0]["resumed"]["warnings"] == 1 and results[1]["resumed"]["warnings"] == 0


def test_control_ranks_that_choose_for_themselves_differ(results):
    """What would be without agreement: rank 1, which sees another directory, starts afresh."""
    assert [found["each for itself"]["from"] for found in results] == ["step-00000004", ""]


def test_control_each_rank_needs_its_own_random_state(results):
    for found in results:
        assert found["one random state for both"]["from"] == "step-00000006"
        assert found["one random state for both"]["weights"] != found["reference"]["weights"]


def test_a_rank_that_cannot_see_the_checkpoint_says_so_on_all(results):
    first, second = (found["not shared"]["error"] for found in results)
    assert first == f"on rank 1: {second}" and "there is no such checkpoint directory" in second


def test_what_ranks_want_differently_is_agreed_upon(results):
    """The best by a metric that only rank 0 has, and a preemption that only rank 1 has heard of."""
    for found in results:
        assert found["own metric"]["announced"] == [2]
        assert found["preempted on rank 1"]["announced"] == [8]
