"""The arithmetic of the table of peers; the trials themselves are run by hand (docs/reliability.md)."""

from __future__ import annotations

from typing import Any


def test_a_run_that_ends_with_other_weights_is_told_from_one_that_is_stuck(script: Any) -> None:
    faults = script("peers/faults")
    kill = {"trials": 20, "killed": 40, "by_itself": 15, "equal": 17, "equal_by_itself": 12, "left_MB": 7}
    damage = {"trials": 8, "silent": 3, "error": 2, "anew": 1, "equal": 2}
    sigterm = {"trials": 4, "exit 0": 3, "exit -15": 1, "steps_lost": 2, "by_itself": 4, "equal": 1}
    disk = {"trials": 10, "exit 1": 9, "exit 0": 1, "by_itself": 8, "equal_by_itself": 8, "left_MB": 0}
    results = {"kill": kill, "damage": damage, "sigterm": sigterm, "full disk": disk}
    lines = list(faults.table({"one": {"versions": "one 1.0", **results}}))
    assert lines[0] == "| | one 1.0 |"
    assert "| 12 of 20; 5 stuck until a person helped; 3 **silently other weights**; 7 MB left behind |" in lines[2]
    assert [line for line in lines if line.endswith("| **3**, 2, 1, 2 of 8 |")]
    assert [line for line in lines if line.endswith("| 0, -15; 0.5 steps; 1 of 4 |")]
    assert sum("| not run |" in line for line in lines) == 5
    assert [line for line in lines if line.endswith("| 1, 0; 8 of 10; 2 stuck until a person helped |")]
    assert len(list(faults.table({"one": {"versions": "one 1.0", **results}}, "full disk"))) == 3
