"""How many workers are found, that they change nothing, and that none is left over."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from drivetrain import Callback, ConfigError, Precision, Trainer, TrainingConfig, make_component
from drivetrain_finders import WorkersFinderCallback


class Slow(Dataset[tuple[Tensor, Tensor]]):
    """Samples that draw random numbers and take their time, as from a disk."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 160

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        time.sleep(self.seconds)
        return torch.rand(3) + index, torch.rand(1)


def trainer(folder: Path, seconds: float, *callbacks: Callback, data: Any = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.25), nn.Linear(8, 1))
    config = TrainingConfig(
        max_duration="6st", per_device_batch_size=4, output_dir=folder, device="cpu", standard_callbacks=False, **options
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given: dict[str, Any] = {"loss": nn.MSELoss(), "optimizer": optimizer, "precision": Precision()}
    return Trainer(model, config, Slow(seconds) if data is None else data, callbacks=callbacks, **given)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"dataloader": {"num_workers": 1}}], ids=str)
def test_data_that_is_waited_for_gets_workers_and_the_run_is_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    alone, found = trainer(tmp_path, 0.0, **options), trainer(tmp_path, 0.01, WorkersFinderCallback(most=2), **options)
    alone.train()
    children = set(multiprocessing.active_children())
    found.train()
    assert found.ctx.run.num_workers == 2, caplog.text
    assert "dataloader.num_workers = 2 (a step with 0: " in caplog.text
    assert found.output.losses == alone.output.losses
    for name, value in found.model.state_dict().items():
        assert torch.equal(value, alone.model.state_dict()[name])
    found.ctx.run.source.close()
    assert set(multiprocessing.active_children()) <= children, "those of the trials have ended"


def test_data_that_is_at_hand_gets_none(tmp_path: Path) -> None:
    run = trainer(tmp_path, 0.0, WorkersFinderCallback(most=2), dataloader={"num_workers": 2})
    run.train()
    assert run.ctx.run.num_workers == 0


def test_ready_batches_are_left_as_they_are(tmp_path: Path) -> None:
    batches = DataLoader([(torch.ones(3), torch.ones(1))] * 24, batch_size=4)
    run = trainer(tmp_path, 0.0, WorkersFinderCallback(most=2), data=batches)
    assert run.train().steps == 6


@pytest.mark.parametrize(("options", "key"), [({"most": -1}, "most"), ({"gain": 1.0}, "gain")])
def test_bad_input(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        make_component("callback", {"use": "workers_finder", **options})
