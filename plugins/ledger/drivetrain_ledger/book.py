"""The ledger's file, read: from a step's number to its place in the data."""

from __future__ import annotations

import json
from pathlib import Path

from attrs import frozen

from drivetrain import DrivetrainError, SampleOrder

BOOK = "ledger.jsonl"
_LONGEST = 1 << 26  # bytes of a file that is read at all


@frozen
class Place:
    """Where in the data a step was: `samples` are the indices of all ranks together, None for data without numbers."""

    step: int
    epoch: int
    window: int
    samples: list[int] | None


@frozen
class Entry:
    """After `step` steps the run stood before window `window` (from 0) of epoch `epoch`."""

    step: int
    epoch: int
    window: int
    steps_per_epoch: int | None
    order: SampleOrder | None

    def place(self, step: int) -> Place:
        """The place of a later step, no window having been skipped in between.

        Raises:
            DrivetrainError: when that is in another epoch of data whose epochs have no known length.
        """
        window = self.window + step - self.step - 1
        epoch = self.epoch
        if self.steps_per_epoch is not None:
            epoch, window = epoch + window // self.steps_per_epoch, window % self.steps_per_epoch
        samples = None if self.order is None else self.order.step(epoch, window).tolist()
        return Place(step, epoch, window, samples)


def read_book(run_dir: Path) -> list[Entry]:
    """The entries of a run in the order of steps; what a crash undid and was done again counts once.

    Raises:
        DrivetrainError: when the run has no ledger.
    """
    path = run_dir / BOOK
    try:
        if path.stat().st_size > _LONGEST:
            raise DrivetrainError(f"{path} is larger than {_LONGEST} bytes; it is no ledger.")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise DrivetrainError(
            f'{run_dir} has no {BOOK}. A run keeps one when its configuration has callbacks = ["ledger"].'
        ) from None
    entries: list[Entry] = []
    for line in lines:
        if (entry := _entry(line)) is not None:
            entries = [*(e for e in entries if e.step < entry.step), entry]
    if not entries:
        raise DrivetrainError(f"{path} has no whole line.")
    return entries


def find(entries: list[Entry], step: int) -> Place:
    """The place of a step.

    Raises:
        DrivetrainError: when the ledger begins after it.
    """
    before = [entry for entry in entries if entry.step < step]
    if not before:
        raise DrivetrainError(f"the ledger begins after step {entries[0].step}; step {step} is before that.")
    return before[-1].place(step)


def _entry(line: str) -> Entry | None:
    """None for a line that a crash cut short."""
    try:
        row = json.loads(line)
        order = None if row["order"] is None else SampleOrder(**row["order"])
        numbers = [int(row[key]) for key in ("step", "epoch", "window")]
        steps_per_epoch = None if row["steps_per_epoch"] is None else int(row["steps_per_epoch"])
    except (ValueError, KeyError, TypeError):
        return None
    return Entry(numbers[0], numbers[1], numbers[2], steps_per_epoch, order)
