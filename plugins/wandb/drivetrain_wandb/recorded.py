"""What W&B has on the disk of a run. A process that is killed takes with it what W&B had not written yet, so that nothing else knows."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

messages: Any = wandb_internal_pb2  # made when it is imported, so that no type checker knows what is in it
_HEADER, _BLOCK, _TAIL = 7, 32768, 256  # bytes before the first record and of a block; blocks from the end that are read
_WHOLE, _FIRST, _LAST = 1, 2, 4  # kinds of a piece; 3 is in the middle


def newest(folder: Path, run_id: str) -> tuple[int, set[str]]:
    """The last step of a run's history in any of its sittings' files, with the names of its values; -1 when there is none."""
    step, names = -1, set[str]()
    for path in folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb"):
        for row_step, row_names in _rows(path):
            if row_step > step:
                step, names = row_step, set()
            if row_step == step:
                names |= row_names
    return step, names


def _rows(path: Path) -> Iterator[tuple[int, set[str]]]:
    for message in _messages(path):
        record = messages.Record()
        record.ParseFromString(message)
        if record.WhichOneof("record_type") == "history":
            names = {item.key or item.nested_key[0] for item in record.history.item}
            yield record.history.step.num, {name for name in names if not name.startswith("_")}


def _messages(path: Path) -> Iterator[bytes]:
    """The whole messages in the last blocks of a file: LevelDB's log format after a header of 7 bytes."""
    with path.open("rb") as file:
        skipped = max(0, file.seek(0, 2) // _BLOCK - _TAIL) * _BLOCK
        file.seek(skipped)
        data = file.read()
    place, message, known = _HEADER if skipped == 0 else 0, b"", skipped == 0
    while place + _HEADER <= len(data):
        if _BLOCK - place % _BLOCK < _HEADER:
            place += _BLOCK - place % _BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + _HEADER])
        piece = data[place + _HEADER : place + _HEADER + size]
        place += _HEADER + size
        if kind == 0 or len(piece) < size:  # cut short
            return
        known = known or kind in (_WHOLE, _FIRST)
        message = piece if kind in (_WHOLE, _FIRST) else message + piece
        if known and kind in (_WHOLE, _LAST):
            yield message
