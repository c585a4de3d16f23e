"""F20: what every earlier release has written is read bit by bit, and its runs go on. `python kept.py` keeps a new release's."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from tests.plugins.checkpoint import kept

from drivetrain_checkpoint import find_checkpoints, read_checkpoint, verify

RELEASES = sorted(path.name for path in kept.KEPT.iterdir() if path.is_dir())


def newest(run: Path) -> Path:
    return find_checkpoints(run)[0].path


def test_this_release_is_among_them():
    assert version("drivetrain-checkpoint") in RELEASES, "python tests/plugins/checkpoint/kept.py"


@pytest.mark.parametrize("release", RELEASES)
def test_it_is_read_bit_by_bit(release):
    path = newest(kept.KEPT / release / "run")
    recorded = json.loads((kept.KEPT / release / "bits.json").read_text())
    assert verify(path) == []
    assert {place.split("/")[1] for place in recorded} >= {"model", "optimizer"}
    assert kept.bits(read_checkpoint(path)) == recorded


@pytest.mark.parametrize("release", RELEASES)
def test_what_several_processes_wrote_is_whole(release, diff):
    path = newest(kept.KEPT / release / "divided")
    assert (path / "index.json").is_file() and verify(path) == []
    assert diff(read_checkpoint(path), kept.divided()) == []


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.filterwarnings("ignore")  # of other versions and another commit
def test_its_run_goes_on(tmp_path, monkeypatch, release):
    """To the same weights as a run of this release; not bit for bit where torch or the processor is another one."""
    pytest.importorskip("numpy", reason="these runs have its random state")
    monkeypatch.setenv("DRIVETRAIN_PLUGINS", "drivetrain-checkpoint")
    whole = kept.trainer(tmp_path / "whole")
    whole.train()
    (tmp_path / "gone-on").mkdir()
    shutil.copytree(kept.KEPT / release / "run", tmp_path / "gone-on" / "run")
    again = kept.trainer(tmp_path / "gone-on")
    assert [step.number for step in again.steps()] == list(range(kept.STEPS // 2 + 1, kept.STEPS + 1))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_a_state_that_was_not_read_would_be_noticed(tmp_path, monkeypatch):
    """Negative control: without the optimizer's moments the weights are others by far."""
    monkeypatch.setenv("DRIVETRAIN_PLUGINS", "drivetrain-checkpoint")
    whole, again = kept.trainer(tmp_path / "whole"), kept.trainer(tmp_path / "again")
    whole.train()
    for step in again.steps():
        if step.number == kept.STEPS // 2:
            again.ctx.optimizer.state.clear()
    weight = "0.weight"
    assert not torch.allclose(again.model.state_dict()[weight], whole.model.state_dict()[weight], rtol=1e-2)
