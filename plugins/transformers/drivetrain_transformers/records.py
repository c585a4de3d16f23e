"""Records from text, JSON Lines and Parquet files, and which of them are held out."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from drivetrain import DataError
from drivetrain_transformers.sources import locate

JSON_LINES = (".jsonl", ".ndjson")


@frozen
class Record:
    """One document or conversation, and where it came from."""

    value: Any
    where: str


def find_files(path: str, pattern: str) -> list[Path]:
    """The files that `path` means, sorted: a file, all of a folder that match `pattern` at any depth, or a glob.

    Raises:
        DataError: when there is none.
    """
    root = locate(path)
    if root.is_file():
        return [root]
    wanted = f"**/{pattern}"
    if not root.exists():
        wild = next((i for i, part in enumerate(root.parts) if any(c in part for c in "*?[")), None)
        if wild is None:
            raise DataError(f"nothing is at {path!r}; give a file, a folder, a glob, or package:NAME/FILE.")
        root, wanted = Path(*root.parts[:wild]), "/".join(root.parts[wild:])
    if found := sorted(file for file in root.glob(wanted) if file.is_file()):
        return found
    raise DataError(f"no file matches {wanted!r} in {path!r}; set pattern (for a folder) or another path.")


def read_records(path: str, pattern: str, field: str, whole_files: bool) -> list[Record]:
    """Every record of every file, in order.

    Args:
        field: which field of a JSON line or column of a Parquet file to take.
        whole_files: take any other file as one record, its text; otherwise refuse it.

    Raises:
        DataError: naming the file and line of what cannot be read.
    """
    records: list[Record] = []
    for file in find_files(path, pattern):
        try:
            if file.suffix in JSON_LINES:
                records += _json_lines(file, field)
            elif file.suffix == ".parquet":
                records += _parquet(file, field)
            elif whole_files:
                records.append(Record(file.read_text(encoding="utf-8", errors="replace"), str(file)))
            else:
                raise DataError(f"{file}: is neither JSON Lines ({', '.join(JSON_LINES)}) nor Parquet.")
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error
    return records


def _json_lines(file: Path, field: str) -> Iterator[Record]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{file}:{number}: is not JSON: {error}.") from error
            if not isinstance(row, dict) or field not in row:
                keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise DataError(f"{file}:{number}: has no field {field!r} (it has {keys}); set 'field'.")
            yield Record(row[field], f"{file}:{number}")


def _parquet(file: Path, field: str) -> Iterator[Record]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(f"{file}: reading Parquet needs pyarrow (pip install drivetrain-transformers[parquet]).") from error
    table = parquet.ParquetFile(file)
    if field not in table.schema_arrow.names:
        raise DataError(f"{file}: has no column {field!r} (it has {', '.join(table.schema_arrow.names)}); set 'field'.")
    row = 0
    for batch in table.iter_batches(columns=[field]):
        for value in batch.column(0).to_pylist():
            yield Record(value, f"{file}: row {row}")
            row += 1


def split(records: Sequence[Record], share: float, held_out: bool) -> list[Record]:
    """The records held out, or the others, chosen by the SHA-256 hash of what they say.

    The choice is the same everywhere, does not change when other records come or go, and puts equal records on one side. Of
    several records at least one is held out, and never all.
    """
    if share == 0 or len(records) < 2:
        return [] if held_out else list(records)
    places = [_place(record.value) for record in records]
    low, high = min(places), max(places)
    return [
        r for r, place in zip(records, places, strict=True) if ((place < share and place < high) or place == low) == held_out
    ]


def _place(value: Any) -> float:
    """A number in [0, 1) that follows from the record's content."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
