"""Damage to any file of the newest checkpoint, which was written in the background, is found; the run goes on from the one before."""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import drivetrain_checkpoint.store
from drivetrain import Callback, CallbackContext, CheckpointCallback, Trainer, TrainingConfig, component, option
from drivetrain_checkpoint import find_checkpoints

PAGE, STEPS = 4096, 10


@component
class Fall(Callback):
    """Fails in the middle of a step, long after a save has begun."""

    at: int = option()

    changes_training = False

    def on_loss(self, ctx: CallbackContext) -> None:
        if ctx.step == self.at:
            raise RuntimeError("fell")


def sitting(folder: Path, at: int = -1) -> dict[str, torch.Tensor]:
    """One process's part of a run that saves in the background every second step; the weights at its end."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Dropout(0.2), nn.Linear(64, 1))
    data = TensorDataset(torch.randn(30, 8), torch.randn(30, 1))
    config = TrainingConfig(
        max_duration=f"{STEPS}st",
        per_device_batch_size=4,
        output_dir=folder,
        run_name="a",
        device="cpu",
        standard_callbacks=False,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    callbacks = [CheckpointCallback(every="2st", keep_last=2, asynchronous=True), Fall(at=at)]
    trainer = Trainer(model, config, data, loss=nn.MSELoss(), optimizer=optimizer, scheduler="constant", callbacks=callbacks)
    trainer.train()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def damages(data: bytes, chance: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """What a file may look like afterwards; None when it is gone."""
    for size in (0, len(data) // 2, len(data) - 1):
        yield f"cut to {size} bytes", data[:size]
    start = len(data) // 2 // PAGE * PAGE
    yield "a page of zeros", data[:start] + bytes(len(data[start : start + PAGE])) + data[start + PAGE :]
    for _ in range(3):
        flipped = bytearray(data)
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        yield "a flipped bit", bytes(flipped)
    yield "missing", None


@pytest.fixture(scope="module")
def begun(tmp_path_factory: Any) -> Path:
    """A run that fell after the save of step 6."""
    folder: Path = tmp_path_factory.mktemp("damage")
    with pytest.raises(RuntimeError, match="fell"):
        sitting(folder, at=7)
    assert [c.step for c in find_checkpoints(folder / "a")] == [6, 4]
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> dict[str, torch.Tensor]:
    return sitting(tmp_path_factory.mktemp("whole"))


NEWEST = Path("a/checkpoints/step-00000006")


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "state.json", "state.safetensors"])
def test_no_damage_is_silent(begun: Path, whole: dict[str, torch.Tensor], tmp_path: Path, name: str) -> None:
    assert name in {path.name for path in (begun / NEWEST).iterdir()}
    data, count = (begun / NEWEST / name).read_bytes(), 0
    for what, damaged in damages(data, random.Random(name)):
        if damaged == data:
            continue
        folder = shutil.copytree(begun, tmp_path / "run")
        (folder / NEWEST / name).unlink() if damaged is None else (folder / NEWEST / name).write_bytes(damaged)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert same(sitting(folder), whole), what
        assert [str(w.message) for w in said if f"{NEWEST} was rejected: {name}" in str(w.message)], what
        shutil.rmtree(folder)
        count += 1
    assert count >= 8 - (len(data) < PAGE)


def test_the_files_above_are_all_there_are(begun: Path) -> None:
    assert len(list((begun / NEWEST).iterdir())) == 4


def test_undamaged_it_goes_on_from_the_newest(begun: Path, whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = shutil.copytree(begun, tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(sitting(folder), whole)


def test_negative_control_without_hashes_it_is_silent(
    begun: Path, whole: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drivetrain_checkpoint.store, "check_files", lambda *_, **__: [])
    folder = shutil.copytree(begun, tmp_path / "run")
    place = folder / NEWEST / "model.safetensors"
    data = bytearray(place.read_bytes())
    data[-3] ^= 1
    place.write_bytes(data)
    assert not same(sitting(folder), whole)
