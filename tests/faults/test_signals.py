"""A signal in the middle of a step, an evaluation or a save: the step is finished and saved, and nothing is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from drivetrain import Callback, CallbackContext, CheckpointCallback, Trainer, TrainingConfig, component, hook
from drivetrain_checkpoint import Files, find_checkpoints, read_checkpoint, verify
from drivetrain_cli.interrupt import Interruptible

PLACES = ("forward", "gradients", "evaluation", "between evaluation and save", "writing", "renaming", "rotation")


@component
class Send(Callback):
    """Sends its own process a signal, once, at a place of the fifth step or soon after it."""

    place: Any
    number: Any
    sent: Any = False

    def at(self, place: str, step: int) -> None:
        if not self.sent and place == self.place and step >= 4:
            self.sent = True
            os.kill(os.getpid(), self.number)  # to the process: in a save, another thread is at work

    def on_forward(self, ctx: CallbackContext) -> None:
        self.at("forward", ctx.step)

    def on_gradients(self, ctx: CallbackContext) -> None:
        self.at("gradients", ctx.step)

    def on_evaluate_batch(self, ctx: CallbackContext) -> None:
        self.at("evaluation", ctx.step)

    @hook(trylast=True)
    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        self.at("between evaluation and save", ctx.step)


class Watched(Files):
    """The seam to the disk, which tells where a save has come to."""

    def __init__(self, send: Send) -> None:
        self.send = send

    def write(self, path: Path, chunks: Any) -> None:
        self.send.at("writing", 4 * ("saving" in path.parent.name))
        super().write(path, chunks)

    def rename(self, source: Path, target: Path) -> None:
        self.send.at("renaming" if "saving" in source.name else "rotation", 4)
        super().rename(source, target)


def sitting(folder: Path, *more: Callback) -> Trainer:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    data = TensorDataset(torch.randn(40, 4), torch.randn(40, 1))
    saving = CheckpointCallback(every="2st", keep_last=1)
    if more:
        saving.files = Watched(more[0])
    config = TrainingConfig(
        max_duration="12st",
        per_device_batch_size=4,
        eval_interval="2st",
        output_dir=folder,
        run_name="a",
        device="cpu",
        standard_callbacks=False,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    given: dict[str, Any] = {"loss": nn.MSELoss(), "optimizer": optimizer, "scheduler": lambda position: 1 / (1 + position)}
    trainer = Trainer(model, config, data, data, callbacks=[*more, saving], **given)
    with Interruptible(trainer.stop, speaks=False):
        trainer.train()
    return trainer


@pytest.fixture(autouse=True)
def a_terminals_handler() -> Iterator[None]:
    """A job in the background of a script ignores Ctrl-C, and then so do the tests in it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> dict[str, torch.Tensor]:
    """The weights of the uninterrupted run."""
    return sitting(tmp_path_factory.mktemp("whole")).model.state_dict()


@pytest.mark.parametrize(
    ("place", "number"),
    [*((place, signal.SIGTERM) for place in PLACES), ("forward", signal.SIGINT), ("writing", signal.SIGUSR1)],
)
def test_nothing_is_lost(tmp_path: Path, whole: dict[str, torch.Tensor], place: str, number: int) -> None:
    send = Send(place=place, number=number)
    first = sitting(tmp_path, send)
    assert send.sent and not first.output.completed
    assert first.output.stop_reason == f"interrupted by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}"
    newest = find_checkpoints(tmp_path / "a")[0]
    assert newest.step == first.ctx.step < 12 and verify(newest.path) == []
    saved = read_checkpoint(newest.path)["model"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in first.model.state_dict().items())
    second = sitting(tmp_path)
    assert second.output.completed and second.ctx.resumed
    assert all(torch.equal(whole[name], tensor) for name, tensor in second.model.state_dict().items())
    assert len(find_checkpoints(tmp_path / "a")) == 1
