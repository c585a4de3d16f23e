"""A state tree as the files of a checkpoint, and back: tensors as safetensors, everything else as JSON.

`model.safetensors` holds the tensors below the key "model" under their own names, so that other tools can load it;
`state.safetensors` holds all others. `state.json` is the tree itself. What JSON lacks is written as a table with one key that
begins with "$":

    {"$tensor": [file, name]}                 a tensor; [file, name, dtype, shape] where safetensors lacks the type;
                                              file is "index.json" when several files have a part of it (`parts`)
    {"$tuple": […]}   {"$dict": [[k, v], …]}  a dict whose keys are not all texts, or one of them begins with "$"
    {"$bytes": base64}   {"$int": hex}   {"$float": the 8 bytes in hex}

Nothing here names a class, a function or a module: reading a checkpoint runs no code of its choosing.
"""

from __future__ import annotations

import base64
import ctypes
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from attrs import define, field, frozen
from safetensors import SafetensorError
from torch import Tensor, nn

from drivetrain_checkpoint.errors import CheckpointError
from drivetrain_checkpoint.parts import AS_BYTES, NAME_AS_BYTES, NATIVE, Contents, Parts, read_wholes
from drivetrain_checkpoint.text import INDEX_FILE, MAX_TREE_BYTES, MODEL_FILE, STATE_FILE, TREE_FILE, dump_json, load_json

Path_ = tuple[str | int, ...]  # of a value in a tree: the keys on the way to it
Tree = Any  # dicts (keys: texts or ints), lists, tuples, numbers, texts, bytes, bools, None and tensors

MAX_DEPTH = 100  # of a tree; deeper ones are mistakes, or attacks on the JSON parser
_CHUNK = 1 << 24
_MAX_PLAIN_INT = 1 << 63
_MAX_NAME = 200

# What reading a hostile file can raise; a RecursionError is a RuntimeError.
_NO_TREE = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, struct.error, SafetensorError)


@frozen
class Packed:
    """A tree made ready to be written: `tree` is the content of `state.json`, the tensors are still those of the tree."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    aliases: Mapping[str, Mapping[str, str]]
    texts: Mapping[str, bytes]

    def files(self) -> Iterator[tuple[str, Iterable[bytes | memoryview]]]:
        """Each file's name and content, in pieces that are valid until the next one is asked for."""
        for name, tensors in self.tensors.items():
            yield name, safetensors_stream(tensors, {**self.aliases.get(name, {}), "format": "pt"})
        for name, text in self.texts.items():
            yield name, (text,)


class Layout(Protocol):
    """How a run's tensors are divided among its processes."""

    def divided(self, path: Path_, tensor: Tensor) -> tuple[Parts, object] | None:
        """This process's parts of a tensor of its state, and what other paths share that is the same tensor; None for a whole."""

    def room(self, path: Path_, shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Parts] | None:
        """An empty tensor as this process has it, and its parts, which are to be filled; None for a whole one."""


def pack(tree: Tree) -> Packed:
    """Turn a state tree into files, without copying a tensor.

    Raises:
        CheckpointError: naming the place of a value that a checkpoint cannot hold.
    """
    return pack_own(tree, None)[0]


def pack_own(tree: Tree, layout: Layout | None) -> tuple[Packed, dict[str, Parts]]:
    """Turn one process's state into files; what is divided is returned by name, for all processes to plan together."""
    packer = _Packer(layout)
    text = dump_json(packer.node(tree, ()))
    if len(text) > MAX_TREE_BYTES:
        raise CheckpointError(
            f"the state without its tensors takes {len(text)} bytes, more than the {MAX_TREE_BYTES} allowed; "
            "put long lists into tensors"
        )
    return Packed(packer.tensors, packer.aliases, {TREE_FILE: text}), packer.parts


def unpack(directory: Path, files: Iterable[str]) -> Tree:
    """Read the tree of a checkpoint from `files`, which have been verified. Its tensors are on the CPU and own their memory.

    Raises:
        CheckpointError: when the files do not describe a tree.
        OSError: when a file cannot be read.
    """
    return outline(directory, files).read()


@define
class Outline:
    """A checkpoint's tree with a `Stored` in the place of each tensor: found sound, not yet read."""

    contents: Contents
    tree: Any

    def read(self, layout: Layout | None = None, check: Callable[[str], None] | None = None) -> Tree:
        """The tree with its tensors: whole ones in host memory, or as `layout` has room for them.

        Args:
            check: called with the name of each file before anything is read from it.

        Raises:
            CheckpointError: when a file is not what the others say of it.
        """
        filling = _Filling(layout)
        try:
            tree = filling.node(self.tree, ())
            if layout is None and INDEX_FILE not in self.contents.files:
                read_wholes(self.contents, filling.wanted, check)
            else:
                from drivetrain_checkpoint.resharding import read_parts  # torch's planners take long to import

                read_parts(self.contents, filling.wanted, check)
        except _NO_TREE as error:
            raise CheckpointError(f"its tensors are not as described: {type(error).__name__}: {error}") from error
        return tree


def outline(directory: Path, files: Iterable[str]) -> Outline:
    """Look at everything but the tensors' values.

    Raises:
        CheckpointError: when the files do not describe a tree.
        OSError: when a file cannot be read.
    """
    data = (directory / TREE_FILE).read_bytes()
    try:
        contents = Contents.of(directory, files)
        return Outline(contents, _Unpacker(contents).value(load_json(data), 0))
    except _NO_TREE as error:
        raise CheckpointError(f"{TREE_FILE} and its tensors are not a state: {type(error).__name__}: {error}") from error


# -- writing ---------------------------------------------------------------------------------------------------------------


@define
class _Packer:
    """Walks a tree once; collects its tensors by file and name."""

    _layout: Layout | None
    tensors: dict[str, dict[str, Tensor]] = field(factory=lambda: {MODEL_FILE: {}, STATE_FILE: {}})
    aliases: dict[str, dict[str, str]] = field(factory=lambda: {MODEL_FILE: {}, STATE_FILE: {}})
    parts: dict[str, Parts] = field(factory=dict)
    _stored: dict[tuple[Any, ...], list[Any]] = field(factory=dict)
    _taken: dict[str, set[str]] = field(factory=lambda: {MODEL_FILE: set(), STATE_FILE: set()})

    def node(self, value: Tree, path: tuple[str | int, ...]) -> Any:
        """The JSON value that stands for `value`."""
        if len(path) > MAX_DEPTH:
            raise CheckpointError(
                f"{_where(path[:8])}…: the state is nested more than {MAX_DEPTH} levels deep, or holds itself"
            )
        if value is None or type(value) in (bool, str):
            return value
        if type(value) is int:
            return value if abs(value) < _MAX_PLAIN_INT else {"$int": hex(value)}
        if type(value) is float:
            return value if abs(value) < float("inf") else {"$float": struct.pack(">d", value).hex()}
        if isinstance(value, Tensor):
            return {"$tensor": self._reference(value, path)}
        if isinstance(value, dict):
            return self._dict(value, path)
        if isinstance(value, (list, tuple)):
            items = [self.node(item, (*path, index)) for index, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        if type(value) is bytes:
            return {"$bytes": base64.b64encode(value).decode("ascii")}
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise CheckpointError(
            f"{_where(path)}: a checkpoint cannot hold {value!r:.80} of type {kind}; "
            "a state is made of dicts, lists, tuples, int, float, str, bytes, bool, None and tensors"
        )

    def _dict(self, value: dict[Any, Tree], path: tuple[str | int, ...]) -> Any:
        for key in value:
            if type(key) not in (str, int):
                raise CheckpointError(
                    f"{_where(path)}: the key {key!r:.80} is neither a text nor an int; a checkpoint cannot hold it"
                )
        items = {key: self.node(item, (*path, key)) for key, item in value.items()}
        if all(type(key) is str and not key.startswith("$") for key in items):
            return items
        return {"$dict": [[self.node(key, path), item] for key, item in items.items()]}

    def _reference(self, tensor: Tensor, path: tuple[str | int, ...]) -> list[Any]:
        """Where a tensor is stored. Tensors of a file that are the same memory are stored once and are one when read."""
        file = MODEL_FILE if path[:1] == ("model",) else STATE_FILE
        if self._layout is not None and (found := self._layout.divided(path, tensor)) is not None:
            return self._divided(*found, file, path)
        _check_storable(tensor, path)
        name = self._free_name(file, path[1:] if file == MODEL_FILE else path)
        memory = (file, *_memory(tensor))
        if memory in self._stored:
            self.aliases[file][name] = self._stored[memory][1]  # as safetensors' `save_model` notes a tied weight
            return self._stored[memory]
        extra = [NAME_AS_BYTES[tensor.dtype], list(tensor.shape)] if tensor.dtype in NAME_AS_BYTES else []
        reference = [file, name, *extra]
        self.tensors[file][name] = tensor
        if tensor.numel():
            self._stored[memory] = reference
        return reference

    def _divided(self, parts: Parts, same: object, file: str, path: Path_) -> list[Any]:
        """The same for one of which this process has parts. The names are the same on all processes."""
        if not math.prod(parts.shape):  # nobody has a part of it: all say that it is empty
            parts = Parts(parts.shape, parts.dtype, {(0,) * len(parts.shape): torch.empty(parts.shape, dtype=parts.dtype)})
        for piece in parts.pieces.values():
            _check_storable(piece, path)
        name = self._free_name(file, path[1:] if file == MODEL_FILE else path)
        memory = (INDEX_FILE, file, id(same))
        if same is not None and memory in self._stored:
            return self._stored[memory]
        name = f"{file.removesuffix('.safetensors')}/{name}"
        self.parts[name] = parts
        self._stored[memory] = [INDEX_FILE, name]
        return self._stored[memory]

    def _free_name(self, file: str, path: tuple[str | int, ...]) -> str:
        """The dotted path, or a number where that is taken, too long, or no text that safetensors could hold."""
        name, taken = ".".join(map(str, path)), self._taken[file]
        number = len(taken)
        while name in taken or name == "__metadata__" or not (name.isprintable() and 0 < len(name) <= _MAX_NAME):
            name = f"tensor-{number}"
            number += 1
        taken.add(name)
        return name


def _where(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path)) or "the state"


def _check_storable(tensor: Tensor, path: tuple[str | int, ...]) -> None:
    """Only plain, dense tensors: a subclass is more than the memory it shows."""
    why = ""
    if type(tensor) is not Tensor and not isinstance(tensor, nn.Parameter):
        why = f"is a {type(tensor).__qualname__}"
    elif tensor.layout != torch.strided:
        why = f"has the layout {tensor.layout}"
    elif tensor.device.type == "meta":
        why = "is on the meta device and has no values"
    elif tensor.dtype not in NATIVE and tensor.dtype not in NAME_AS_BYTES:
        why = f"has the type {tensor.dtype}"
    if why:
        raise CheckpointError(
            f"{_where(path)}: a checkpoint cannot hold a tensor that {why}; turn it into plain dense tensors first"
        )


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same elements of the same memory, in the same order."""
    try:
        start = tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        start = 0
    if not start:  # a device that shows no addresses: the same object is all that can be known
        return (id(tensor),)
    elements = (tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return (tensor.device, start, *elements)


def safetensors_stream(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The content of a safetensors file, one piece at a time: the library's own writer needs a second copy of all tensors.

    Layout: the header's length (8 bytes, little-endian), the header (JSON, padded to 8 bytes), then the tensors row-major
    without gaps; widest types first, so that each is aligned. Source: "Format" in the README of the safetensors repository.
    """
    order = sorted(tensors, key=lambda name: (-(_width(tensors[name])), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor = tensors[name]
        shape = list(tensor.shape) if tensor.dtype in NATIVE else [tensor.nbytes]
        header[name] = {"dtype": NATIVE.get(tensor.dtype, "U8"), "shape": shape, "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield from _pieces(tensors[name])


def _width(tensor: Tensor) -> int:
    return tensor.element_size() if tensor.dtype in NATIVE else 1


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's elements as bytes, row-major; one tensor at a time is copied to the host."""
    host = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if host.nbytes:
        memory = memoryview((ctypes.c_char * host.nbytes).from_address(host.data_ptr())).cast("B")
        for start in range(0, host.nbytes, _CHUNK):
            yield memory[start : start + _CHUNK]


# -- reading ---------------------------------------------------------------------------------------------------------------


@frozen
class Stored:
    """A tensor of a checkpoint: its name there, and what it is."""

    name: str
    shape: torch.Size
    dtype: torch.dtype


@define
class _Unpacker:
    """Turns JSON values back into a tree. It trusts nothing: whatever is not as `_Packer` writes it raises."""

    contents: Contents

    def value(self, node: Any, depth: int) -> Tree:
        if depth > 2 * MAX_DEPTH:  # a dict or tuple of a tree is two levels of JSON
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        if isinstance(node, list):
            return [self.value(item, depth + 1) for item in node]
        if not isinstance(node, dict):
            return node
        if not any(key.startswith("$") for key in node):
            return {key: self.value(item, depth + 1) for key, item in node.items()}
        if len(node) != 1:
            raise ValueError(f"a marked value has {len(node)} keys")
        ((mark, content),) = node.items()
        return self._marked(mark, content, depth)

    def _marked(self, mark: str, content: Any, depth: int) -> Tree:
        if mark == "$tensor":
            return self._tensor(*content)
        if mark == "$tuple":
            return tuple(self.value(_expect(content, list), depth + 1))
        if mark == "$dict":
            pairs = [(self.value(key, depth + 1), self.value(item, depth + 1)) for key, item in _expect(content, list)]
            return dict(pairs)
        read: dict[str, Callable[[str], Tree]] = {
            "$bytes": lambda text: base64.b64decode(text, validate=True),
            "$int": lambda text: int(text, 16),
            "$float": lambda text: struct.unpack(">d", bytes.fromhex(text))[0],
        }
        return read[mark](_expect(content, str))

    def _tensor(self, file: str, name: str, dtype: str = "", shape: list[int] | None = None) -> Stored:
        if dtype:
            return Stored(*self.contents.typed(file, name, AS_BYTES[dtype], torch.Size(_expect(shape, list))))
        return Stored(*self.contents.find(file, name))


@define
class _Filling:
    """Makes room for the tensors of a tree."""

    _layout: Layout | None
    wanted: dict[str, list[Parts]] = field(factory=dict)
    _seen: dict[str, Tensor] = field(factory=dict)

    def node(self, value: Any, path: Path_) -> Tree:
        """The same with an empty tensor for each one that is stored; one that is in several places is one again."""
        if isinstance(value, Stored):
            return self._tensor(value, path)
        if isinstance(value, dict):
            return {key: self.node(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.node(item, (*path, index)) for index, item in enumerate(value))
        return value

    def _tensor(self, stored: Stored, path: Path_) -> Tensor:
        room = None if self._layout is None else self._layout.room(path, stored.shape, stored.dtype)
        if room is None and stored.name in self._seen:
            return self._seen[stored.name]
        if room is None:
            tensor = torch.empty(stored.shape, dtype=stored.dtype)
            room = tensor, Parts(stored.shape, stored.dtype, {(0,) * len(stored.shape): tensor})
            self._seen[stored.name] = tensor
        self.wanted.setdefault(stored.name, []).append(room[1])
        return room[0]


def _expect(value: Any, wanted: type) -> Any:
    if not isinstance(value, wanted):
        raise TypeError(f"expected {wanted.__name__}, got {type(value).__name__}")
    return value
