"""The callbacks that keep state go on exactly as well: averaged weights, anomalies, early stopping, in a part of the grid."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.faults.test_exactness import QUICK, Case, Interrupt, equal, final, sitting
from torch import nn

from drivetrain import Callback, CheckpointCallback, EarlyStoppingCallback, Trainer, TrainingConfig
from drivetrain_anomaly import AnomalyCallback
from drivetrain_ema import EmaCallback
from drivetrain_goodput import GoodputCallback


def watchers() -> list[Callback]:
    """As many as there are with state, and one that times the rest."""
    return [
        EmaCallback(decay=0.9),
        AnomalyCallback(nonfinite="rollback", spike="skip", norm_factor=2.0, warmup=2, snapshot_every=2),
        EarlyStoppingCallback(patience=100),
        GoodputCallback(show=False),
    ]


@pytest.mark.parametrize("case", QUICK[:8], ids=lambda case: case.id)
def test_interrupted_and_not(tmp_path: Path, case: Case) -> None:
    whole, _ = sitting(tmp_path / "whole", case._replace(place="mid-epoch"), None, *watchers())
    expected = final(whole)
    for at in [*case.stops(), None]:
        trainer, _ = sitting(tmp_path, case, at, *watchers())
        assert at is None or trainer.ctx.step == at
    found = final(trainer)
    assert {"callback:EmaCallback", "callback:AnomalyCallback", "callback:EarlyStoppingCallback"} <= set(found["components"])
    assert equal(found, expected)


@pytest.mark.parametrize("name", ["EmaCallback", "AnomalyCallback"])
def test_negative_control_a_watcher_that_forgets(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = QUICK[0]._replace(place="mid-epoch")
    whole, _ = sitting(tmp_path / "whole", case, None, *watchers())
    expected: dict[str, Any] = final(whole)
    sitting(tmp_path, case, case.stops()[0], *watchers())
    forgetful = {"EmaCallback": EmaCallback, "AnomalyCallback": AnomalyCallback}[name]
    monkeypatch.setattr(forgetful, "load_state_dict", lambda self, saved: None)
    trainer, _ = sitting(tmp_path, case, None, *watchers())
    assert not equal(final(trainer)["components"][f"callback:{name}"], expected["components"][f"callback:{name}"])


def bad_window(folder: Path, at: int | None, name: str = "a") -> Trainer:
    """A run over a NaN in step 9's data, logged every sixth step, with real checkpoints; interrupted after the step `at`."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    rows = [(torch.randn(3), torch.randn(1)) for _ in range(4 * 16)]
    rows[4 * 8 + 1][0].fill_(float("nan"))
    config = TrainingConfig(
        max_duration="1ep",
        per_device_batch_size=4,
        log_interval="6st",
        dataloader={"shuffle": False},
        output_dir=folder,
        run_name=name,
        device="cpu",
        standard_callbacks=False,
    )
    run = Trainer(
        model,
        config,
        rows,
        loss=nn.MSELoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.02),
        scheduler=lambda position: 1 / (1 + position),
        callbacks=[Interrupt(at=at), AnomalyCallback(nonfinite="rollback"), CheckpointCallback(every="5st")],
    )
    run.train()
    return run


@pytest.mark.parametrize("at", [9, 10, 11])  # step 9 is bad, a periodic checkpoint comes after step 10, the log after step 12
def test_a_rollback_over_an_interruption(tmp_path: Path, at: int) -> None:
    whole = final(bad_window(tmp_path, None, "whole"))
    bad_window(tmp_path, at)
    resumed = bad_window(tmp_path, None)
    assert resumed.ctx.resumed and resumed.ctx.step == 15
    assert equal(final(resumed), whole)


def test_a_rollback_over_a_kill(tmp_path: Path) -> None:
    """What a kill after step 11 leaves: the checkpoint of step 10."""
    whole = final(bad_window(tmp_path, None, "whole"))
    bad_window(tmp_path, 10)
    bad_window(tmp_path, 11)
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-00000011")
    resumed = bad_window(tmp_path, None)
    assert resumed.ctx.step == 15
    assert equal(final(resumed), whole)
