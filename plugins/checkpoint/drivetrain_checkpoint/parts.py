"""The tensors of a checkpoint, whole ones and those of which several files have parts: what they are and where.

`index.json` says where each part lies in the whole:

    {"files": [name, …],
     "tensors": {"model/blocks.0.weight": {"dtype": "float32", "shape": [8, 4],
                                           "chunks": [[file, [offset, …], [length, …], name in the file], …]}}}

Nothing here needs torch's checkpoint planners, which take long to import: `resharding` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import define, field, frozen
from safetensors import safe_open
from torch import Tensor

from drivetrain_checkpoint.text import INDEX_FILE, load_json

# What every supported release of safetensors reads. Other types are stored as their bytes, with the type in the JSON.
NATIVE = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
AS_BYTES = {
    "complex32": torch.complex32,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2fnuz": torch.float8_e5m2fnuz,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
}
NAME_AS_BYTES = {dtype: name for name, dtype in AS_BYTES.items()}
_FROM_HEADER = {name: dtype for dtype, name in NATIVE.items()}
_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in NATIVE} | AS_BYTES
Offsets = tuple[int, ...]


@frozen(eq=False)
class Parts:
    """The pieces of one tensor that this process has, or wants to be filled, by their offsets in the whole."""

    shape: torch.Size
    dtype: torch.dtype
    pieces: Mapping[Offsets, Tensor]


@frozen
class Place:
    """Where one part is stored, and how long it is in each dimension."""

    file: str
    name: str
    shape: torch.Size


@frozen
class Described:
    """A tensor of a checkpoint, with the places of its parts by their offsets."""

    dtype: torch.dtype
    shape: torch.Size
    places: Mapping[Offsets, Place]


@define
class Contents:
    """The tensors of a checkpoint, whole ones and those in parts, by "FILE/NAME": what they are and where, not their values."""

    directory: Path
    files: list[str]
    tensors: dict[str, Described] = field(factory=dict)

    @classmethod
    def of(cls, directory: Path, files: Iterable[str]) -> Contents:
        """Read the headers and the index.

        Raises:
            ValueError, TypeError, LookupError, SafetensorError: when they are not what they should be.
        """
        found = cls(directory, list(files))
        parts = found._read_index() if INDEX_FILE in found.files else set()
        for name in found.files:
            if name.endswith(".safetensors") and name not in parts:
                found._read_header(name)
        return found

    def find(self, file: str, name: str) -> tuple[str, torch.Size, torch.dtype]:
        """A tensor's name here, its shape and type."""
        key = f"{file}/{name}"
        return key, self.tensors[key].shape, self.tensors[key].dtype

    def typed(self, file: str, name: str, dtype: torch.dtype, shape: torch.Size) -> tuple[str, torch.Size, torch.dtype]:
        """The same for one that is stored as its bytes."""
        key, stored, kind = self.find(file, name)
        if kind == torch.uint8 and tuple(stored) == (math.prod(shape) * dtype.itemsize,):
            self.tensors[key] = Described(dtype, shape, {(0,) * len(shape): Place(file, name, shape)})
        if self.find(file, name) != (key, shape, dtype):
            raise ValueError(f"{key} is not {tuple(shape)} of {dtype}")
        return key, shape, dtype

    def _read_header(self, file: str) -> None:
        with safe_open(self.directory / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                shape = torch.Size(part.get_shape())
                place = {(0,) * len(shape): Place(file, name, shape)}
                self.tensors[f"{file}/{name}"] = Described(_FROM_HEADER[part.get_dtype()], shape, place)

    def _read_index(self) -> set[str]:
        table = load_json((self.directory / INDEX_FILE).read_bytes())
        files = table["files"]
        if not set(files) <= set(self.files):
            raise ValueError(f"{INDEX_FILE} names files that are not part of the checkpoint")
        for name, entry in table["tensors"].items():
            shape = _size(entry["shape"])
            chunks = [
                (tuple(_size(offsets)), Place(files[file], inside, _size(lengths)))
                for file, offsets, lengths, inside in entry["chunks"]
            ]
            _check_tiling(name, shape, [(offsets, tuple(place.shape)) for offsets, place in chunks])
            self.tensors[f"{INDEX_FILE}/{name}"] = Described(_BY_NAME[entry["dtype"]], shape, dict(chunks))
        return set(files)


def _size(numbers: Any) -> torch.Size:
    if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise ValueError(f"{numbers!r:.80} is not a list of sizes")
    return torch.Size(numbers)


def _check_tiling(name: str, shape: torch.Size, chunks: Sequence[tuple[Offsets, Offsets]]) -> None:
    """Make sure that the parts of a tensor make up the whole: each within it, together as large, no two in the same place."""
    volume = 0
    for offsets, lengths in chunks:
        if not len(offsets) == len(lengths) == len(shape):
            raise ValueError(f"a part of {name} has another number of dimensions")
        if any(start + length > whole for start, length, whole in zip(offsets, lengths, shape, strict=True)):
            raise ValueError(f"a part of {name} reaches beyond it")
        volume += math.prod(lengths)
    if volume != math.prod(shape):
        raise ValueError(f"the parts of {name} have {volume} elements, the whole {math.prod(shape)}")
    open_: list[tuple[Offsets, Offsets]] = []
    for one in sorted(chunks) if shape else ():
        open_ = [other for other in open_ if other[0][0] + other[1][0] > one[0][0]]
        if any(_overlap(one, other) for other in open_):
            raise ValueError(f"two parts of {name} lie in the same place")
        open_.append(one)


def _overlap(one: tuple[Offsets, Offsets], other: tuple[Offsets, Offsets]) -> bool:
    pairs = zip(*one, *other, strict=True)
    return all(a < b + more and b < a + length for a, length, b, more in pairs)


def read_whole(opened: Any, place: Place, dtype: torch.dtype) -> Tensor:
    """A stored part, mapped from its file, so that it takes no memory of its own.

    Raises:
        ValueError, TypeError: when it is not what the index says.
    """
    part: Tensor = opened.get_tensor(place.name)
    if dtype in NAME_AS_BYTES:
        part = part.view(dtype).reshape(place.shape)
    if part.dtype != dtype or part.shape != place.shape:
        raise ValueError(f"{place.name} in {place.file} is {part.dtype} {tuple(part.shape)}, not {dtype} {tuple(place.shape)}")
    return part


def read_wholes(contents: Contents, wanted: Mapping[str, Sequence[Parts]], check: Callable[[str], None] | None = None) -> None:
    """Fill tensors that are wanted whole and are stored whole.

    Args:
        check: called with the name of each file before anything is read from it.
    """
    by_file: dict[str, list[tuple[Place, Tensor]]] = {}
    for name, (parts,) in wanted.items():
        (place,), (piece,) = contents.tensors[name].places.values(), parts.pieces.values()
        by_file.setdefault(place.file, []).append((place, piece))
    for file, items in by_file.items():
        if check is not None:
            check(file)
        with safe_open(contents.directory / file, framework="pt") as opened:
            for place, piece in items:
                piece.copy_(read_whole(opened, place, piece.dtype))
