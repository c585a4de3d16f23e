"""8-bit optimizer states through the files of a checkpoint, with weights in fp32 and in bf16_true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from drivetrain import Trainer, TrainingConfig

pytest.importorskip("drivetrain_bitsandbytes", exc_type=ImportError)


def trainer(folder: Path, optimizer: str, precision: str, resume: str) -> Trainer:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 1))
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(4))
    config = TrainingConfig(
        max_duration="24st",
        per_device_batch_size=16,
        optimizer={"use": optimizer, "lr": 1e-3},
        precision=precision,
        callbacks=[{"use": "checkpoint", "every": "5st"}],
        standard_callbacks=False,
        output_dir=folder,
        run_name="one",
        resume=resume,
    )
    return Trainer(model, config, TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), loss=nn.functional.mse_loss)


@pytest.mark.parametrize("precision", ["fp32", "bf16_true"])
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "lion_8bit"])
def test_a_run_resumed_from_disk_ends_bit_equal(tmp_path: Path, optimizer: str, precision: str) -> None:
    straight = trainer(tmp_path / "straight", optimizer, precision, "never")
    straight.train()
    for step in trainer(tmp_path / "broken", optimizer, precision, "never").steps():
        if step.number == 13:
            break
    resumed = trainer(tmp_path / "broken", optimizer, precision, "auto")
    steps = [step.number for step in resumed.steps()]
    assert steps[0] > 5, "it goes on from a checkpoint"
    assert_equal(
        *({key: made.state_dict()[key] for key in ("model", "optimizer", "precision")} for made in (resumed, straight))
    )
    states = resumed.ctx.optimizer.state.values()
    assert torch.uint8 in {state["state1"].dtype for state in states}


def assert_equal(mine: Any, theirs: Any) -> None:
    if isinstance(theirs, dict):
        assert list(mine) == list(theirs)
        for key in theirs:
            assert_equal(mine[key], theirs[key])
    elif isinstance(theirs, torch.Tensor):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    elif isinstance(theirs, (list, tuple)):
        assert len(mine) == len(theirs)
        for pair in zip(mine, theirs, strict=True):
            assert_equal(*pair)
    else:
        assert mine == theirs
