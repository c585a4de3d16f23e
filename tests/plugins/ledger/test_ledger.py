"""The computed samples of each step are those that the model saw."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from drivetrain import Callback, CallbackContext, DrivetrainError, Trainer, TrainingConfig, component
from drivetrain_ledger import BOOK, LedgerCallback, read_book
from drivetrain_ledger.book import find
from drivetrain_ledger.command import Ledger


@component
class Witness(Callback):
    """Remembers what it sees: the second column of a sample is its index."""

    def on_run_start(self, ctx: CallbackContext) -> None:
        self.seen: dict[int, list[int]] = {}
        self.saved: Any = None

    def on_step_end(self, ctx: CallbackContext) -> None:
        self.seen[ctx.step] = [int(i) for x, _ in ctx.window for i in x[:, 1]]


@component
class Restore(Callback):
    saved: Any

    def on_restore(self, ctx: CallbackContext) -> None:
        ctx.load_state_dict(self.saved)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        for index in range(20):
            yield torch.tensor([0.0, index]), torch.zeros(1)


def trainer(tmp_path: Path, *callbacks: Callback, data: Any = None, **given: Any) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    rows = torch.stack([torch.zeros(22), torch.arange(22.0)], 1)
    table = {"max_duration": "3ep", "per_device_batch_size": 4, "gradient_accumulation_steps": 2, "seed": 7, "device": "cpu"}
    config = TrainingConfig(output_dir=tmp_path, run_name="a", standard_callbacks=False, **table | given)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    data = data or TensorDataset(rows, torch.zeros(22, 1))
    return Trainer(model, config, data, loss=nn.MSELoss(), optimizer=optimizer, callbacks=callbacks)


def told(tmp_path: Path, steps: int) -> dict[int, list[int] | None]:
    entries = read_book(tmp_path / "a")
    return {step: find(entries, step).samples for step in range(1, steps + 1)}


@pytest.mark.parametrize("loader", [{}, {"shuffle": False}, {"drop_last": True}, {"num_workers": 1}])
def test_every_step_of_a_run(tmp_path: Path, loader: dict[str, Any]) -> None:
    witness = Witness()
    trainer(tmp_path, LedgerCallback(), witness, dataloader=loader).train()
    assert len(witness.seen) == 9
    assert told(tmp_path, 9) == witness.seen


def test_an_interrupted_run_has_one_line_more(tmp_path: Path) -> None:
    witness, rest = Witness(), Witness()
    first = trainer(tmp_path, LedgerCallback(), witness)
    for step in first.steps():
        if step.number == 4:
            break
    trainer(tmp_path, Restore(saved=first.state_dict()), LedgerCallback(), rest).train()
    assert len((tmp_path / "a" / BOOK).read_text().splitlines()) == 2
    assert told(tmp_path, 9) == witness.seen | rest.seen


def test_what_a_crash_undid_counts_once_and_a_torn_line_not_at_all(tmp_path: Path) -> None:
    witness = Witness()
    trainer(tmp_path, LedgerCallback(), witness).train()
    book = tmp_path / "a" / BOOK
    whole = book.read_text()
    wrong = json.loads(whole) | {"step": 5, "window": 2}
    book.write_text(whole + json.dumps(wrong) + "\n" + whole[:20])  # went on from 5 wrongly, then from 0 again, but was killed
    trainer(tmp_path, LedgerCallback(), Witness()).train()
    assert told(tmp_path, 9) == witness.seen


def test_skipped_windows_are_accounted_for(tmp_path: Path) -> None:
    @component
    class Skip(Callback):
        """As if gradients had overflowed in the third window."""

        def on_step_start(self, ctx: CallbackContext) -> None:
            self.real = ctx.precision.step
            if ctx.step == 2 and not ctx.skipped_steps:
                ctx.run.loop.update = lambda factor: False  # type: ignore[method-assign]
            elif "update" in vars(ctx.run.loop):
                del ctx.run.loop.update

    witness = Witness()
    output = trainer(tmp_path, Skip(), LedgerCallback(), witness).train()
    assert output.steps == 8
    assert told(tmp_path, 8) == witness.seen


def test_it_would_notice_another_seed(tmp_path: Path) -> None:
    """Negative control."""
    witness = Witness()
    trainer(tmp_path, LedgerCallback(), witness).train()
    book = tmp_path / "a" / BOOK
    book.write_text(book.read_text().replace('"seed": 7', '"seed": 8'))
    assert told(tmp_path, 9) != witness.seen


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    Ledger().add_arguments(parser)
    return Ledger().run(parser.parse_args(words))


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    witness = Witness()
    trainer(tmp_path, LedgerCallback(), witness).train()
    assert command(str(tmp_path / "a"), "--step", "4-5", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["step"], row["epoch"], row["window"]) for row in lines] == [(4, 1, 0), (5, 1, 1)]
    assert [row["samples"] for row in lines] == [witness.seen[4], witness.seen[5]]
    command(str(tmp_path / "a"), "--step", "1")
    assert capsys.readouterr().out == f"step 1 (epoch 0, window 0): {' '.join(map(str, witness.seen[1]))}\n"


def test_of_a_stream_the_position_is_told(tmp_path: Path, capsys: Any) -> None:
    trainer(tmp_path, LedgerCallback(), data=Stream(), max_duration="2st").train()
    command(str(tmp_path / "a"), "--step", "2")
    assert capsys.readouterr().out.startswith("step 2 (epoch 0, window 1): the data is a stream")


def test_a_run_without_a_ledger_says_how_to_keep_one(tmp_path: Path) -> None:
    with pytest.raises(DrivetrainError, match=r'callbacks = \["ledger"\]'):
        command(str(tmp_path), "--step", "1")
