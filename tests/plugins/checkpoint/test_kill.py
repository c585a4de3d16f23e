"""Killed at random instants and started again by the same command, a run ends with the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the trials fork their training processes")
def test_killed_at_random_instants(tmp_path):
    """Row F1, a few of them; the many are in tests/faults."""
    trials, kills, met = 4, 2, 0
    script = Path(__file__).with_name("kill_trials.py")
    for attempt in range(5):
        command = [sys.executable, str(script), str(tmp_path / str(attempt)), str(trials), str(kills), str(1 + attempt)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10 * trials + 60, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        count = json.loads(done.stdout)
        assert count["failed"] == 0, done.stderr
        assert count["killed"] >= 1  # else the kills came too late to mean anything
        assert count["equal"] == count["tidy"] == trials
        if met := count["unfinished_saves"]:
            break
    assert met >= 1  # a state of 3 MB, saved at each step: of 40 kills some must have met a save
