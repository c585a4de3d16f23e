"""Schedule-free optimizers with the plugins beside them: the schedule they get, and the checkpoint of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from drivetrain import CheckpointCallback, Trainer, TrainingConfig
from drivetrain_checkpoint import find_checkpoints, read_checkpoint


@pytest.mark.parametrize(
    ("settings", "name", "warmup"),
    [
        ({"optimizer": "schedulefree_adamw"}, "constant", "5%"),
        ({"optimizer": "schedulefree_sgd", "scheduler": {"warmup": "3st"}}, "constant", "3st"),
        ({"optimizer": "schedulefree_adamw", "scheduler": "linear"}, "linear", "0.0"),
        ({"optimizer": "adamw"}, "cosine", "0.0"),
    ],
    ids=str,
)
def test_the_schedule_where_none_is_named(settings: dict[str, Any], name: str, warmup: str) -> None:
    table = TrainingConfig(**settings).to_dict(full=True)["scheduler"]
    assert (table["use"], str(table["warmup"])) == (name, warmup)


@pytest.mark.parametrize("every", ["12st", "5st"])  # whether a periodic checkpoint falls on the last step
def test_the_last_checkpoint_holds_the_average(tmp_path: Path, every: str) -> None:
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
    model = nn.Linear(4, 1)
    config = TrainingConfig(
        max_duration="12st",
        run_name="a",
        output_dir=tmp_path,
        optimizer="schedulefree_adamw",
        standard_callbacks=False,
        callbacks=[CheckpointCallback(every=every)],
    )
    output = Trainer(model, config, TensorDataset(x, x.sum(1, keepdim=True)), loss=nn.MSELoss()).train()
    assert output.checkpoint is not None
    saved = read_checkpoint(output.checkpoint)["model"]
    assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())
    assert find_checkpoints(tmp_path / "a")[0].step == 12
