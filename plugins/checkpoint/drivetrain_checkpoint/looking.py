"""What is in a checkpoint, as lines of text. Reads headers only, never a tensor's values, and needs no torch."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from drivetrain_checkpoint.errors import CheckpointError
from drivetrain_checkpoint.find import Checkpoint
from drivetrain_checkpoint.manifest import MANIFEST_FILE, read_manifest
from drivetrain_checkpoint.text import INDEX_FILE, MAX_TREE_BYTES, TREE_FILE, load_json

_MAX_HEADER = 100_000_000  # the format's own limit
_MAX_DEPTH = 200
_LONGEST = 60  # characters of one value
_WORDS = {"BF": "bfloat", "F": "float", "I": "int", "U": "uint"}  # of the format's names of types, such as BF16
_MARKED: Mapping[str, Callable[[str], object]] = {
    "$bytes": lambda text: f"bytes {text}",
    "$int": lambda text: int(text, 16),
    "$float": lambda text: struct.unpack(">d", bytes.fromhex(text))[0],
}
Headers = Mapping[str, Mapping[str, Any]]


def plain(text: object) -> str:
    """Text without control characters: names in a checkpoint must not move a terminal's cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def size_text(size: int) -> str:
    """A number of bytes for people, in powers of 1000."""
    value, units = float(size), iter(("kB", "MB", "GB", "TB"))
    unit = "B"
    while value >= 1000 and unit != "TB":
        value, unit = value / 1000, next(units)
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


def checkpoint_lines(path: Path) -> Iterator[str]:
    """A checkpoint's files and the tree of its state.

    Raises:
        CheckpointError: when it cannot be read. Hashes are not checked.
    """
    manifest = read_manifest(path)
    total = sum(entry.size for entry in manifest.files.values())
    yield f"{plain(path)}: step {manifest.step}, {size_text(total)} in {len(manifest.files)} files"
    yield from (f"  {name:<24}{size_text(entry.size):>10}" for name, entry in manifest.files.items())
    yield ""
    try:
        headers = {name: _header(path / name) for name in manifest.files if name.endswith(".safetensors")}
        headers[INDEX_FILE] = _read_json(path / INDEX_FILE)["tensors"] if INDEX_FILE in manifest.files else {}
        yield from _tree_lines(_read_json(path / TREE_FILE), headers)
    except (OSError, ValueError, TypeError, LookupError, RecursionError, struct.error) as error:
        raise CheckpointError(
            f"{path}: cannot be shown ({type(error).__name__}: {error}); see: drivetrain checkpoint verify"
        ) from error


def run_lines(run_dir: Path, found: list[Checkpoint]) -> Iterator[str]:
    """The checkpoints of a run, the newest first."""
    yield f"{plain(run_dir)}: {len(found)} checkpoint{'s' if len(found) != 1 else ''}"
    for one in found:
        if one.problem:
            yield f"  {plain(one.path.name)}  cannot be used: {plain(one.problem)}"
        else:
            total = sum(entry.size for entry in read_manifest(one.path).files.values())
            yield f"  {plain(one.path.name)}  step {one.step}, {size_text(total)}"


def _read_json(path: Path) -> Any:
    if path.stat().st_size > MAX_TREE_BYTES:
        raise ValueError(f"{path.name} is larger than any checkpoint's")
    return load_json(path.read_bytes())


def _header(path: Path) -> Headers:
    """The names, types and shapes of a safetensors file: eight bytes of length, then JSON."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER, path.stat().st_size):
            raise ValueError(f"the header of {path.name} is longer than the file")
        header = load_json(file.read(length))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _tree_lines(node: Any, headers: Mapping[str, Headers], depth: int = 0) -> Iterator[str]:
    """One line for each entry of a dict or list, indented by its depth."""
    if depth > _MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    for key, item in _entries(node):
        name, text = "  " * depth + plain(key), _leaf(item, headers)
        if text is not None:
            yield f"{name:<40} {text}"
        else:
            yield name
            yield from _tree_lines(item, headers, depth + 1)


def _entries(node: Any) -> Iterator[tuple[object, Any]]:
    """The entries of what `format` writes for a dict, a list or a tuple."""
    if isinstance(node, dict) and len(node) == 1 and next(iter(node)) in ("$dict", "$tuple"):
        mark, content = next(iter(node.items()))
        yield from content if mark == "$dict" else enumerate(content)
    elif isinstance(node, dict):
        yield from node.items()
    else:
        yield from enumerate(node)


def _leaf(item: Any, headers: Mapping[str, Headers]) -> str | None:
    """A value that needs no lines of its own: a tensor's type, shape and size; a number or text; a list of such."""
    if isinstance(item, dict) and "$tensor" in item:
        return _tensor(item["$tensor"], headers)
    if isinstance(item, dict) and len(item) == 1 and (read := _MARKED.get(next(iter(item)))):
        return _short(read(next(iter(item.values()))))
    entries = item["$tuple"] if isinstance(item, dict) and "$tuple" in item else item
    if isinstance(entries, list):
        return None if any(isinstance(part, (dict, list)) for part in entries) else _short(entries)
    if isinstance(item, dict):
        return None if item else "{}"
    return _short(item)


def _tensor(reference: list[Any], headers: Mapping[str, Headers]) -> str:
    file, name, *special = reference
    entry = headers[file][name]
    if file == INDEX_FILE:
        count, size = len(entry["chunks"]), _divided_size(entry)
        return plain(f"{entry['dtype']} {tuple(entry['shape'])}, {size_text(size)} in {count} part{'s' if count != 1 else ''}")
    start, end = entry["data_offsets"]
    kind = special[0] if special else re.sub(r"^(BF|F|I|U)(?=\d)", lambda match: _WORDS[match[1]], entry["dtype"]).lower()
    kind = f"{kind}fn" if kind == "float8_e4m3" else kind  # which the format does not say
    shape = special[1] if special else entry["shape"]
    return plain(f"{kind} {tuple(shape)}, {size_text(end - start)}")


def _divided_size(entry: Mapping[str, Any]) -> int:
    """The bytes of all parts of a tensor; types such as float8_e4m3fn or complex64 begin with their bits."""
    bits = re.findall(r"\d+", entry["dtype"]) or ["8"]
    return int(bits[0]) * math.prod(map(int, entry["shape"])) // 8


def _short(value: Any) -> str:
    text = plain(repr(value) if isinstance(value, str) else value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def manifest_exists(path: Path) -> bool:
    """Whether a directory is meant to be one checkpoint."""
    return (path / MANIFEST_FILE).exists()
