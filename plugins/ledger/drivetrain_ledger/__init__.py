"""Which samples fed which step: a few numbers for each sitting, from which the order is computed again when somebody asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import Callback, component
from drivetrain_ledger.book import BOOK, Entry, Place, read_book

if TYPE_CHECKING:
    from drivetrain import CallbackContext

__all__ = ["BOOK", "Entry", "LedgerCallback", "Place", "read_book"]


@component
class LedgerCallback(Callback):
    """Record which samples feed which step, for `drivetrain ledger RUN_DIR --step N`.

    The order of map-style data follows from (seed, epoch), so RUN_DIR/ledger.jsonl needs one line for each sitting, and one after
    each step that was skipped because gradients overflowed; a step costs one comparison.
    """

    _skipped: int = attrs.field(default=0, init=False, repr=False)

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Write where this sitting begins."""
        self._write(ctx)

    def on_step_start(self, ctx: CallbackContext) -> None:
        """Write where the run is once more when windows were used up without a step."""
        if ctx.skipped_steps != self._skipped:
            self._write(ctx)

    def _write(self, ctx: CallbackContext) -> None:
        self._skipped = ctx.skipped_steps
        if not ctx.is_main:
            return
        order = ctx.sample_order
        row: dict[str, Any] = {"step": ctx.step, "epoch": ctx.epoch, "window": ctx.step_in_epoch}
        row |= {"steps_per_epoch": ctx.steps_per_epoch, "order": None if order is None else attrs.asdict(order)}
        _append(ctx.run_dir / BOOK, json.dumps(row))


def _append(path: Path, line: str) -> None:
    """Add a line. A line cut short by an earlier crash is ended first."""
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(f"{line}\n".encode())
