"""States of which each process has parts: planned and resharded by torch's checkpoint planners, stored as safetensors.

Each process writes the parts that the plan gives it: `model-00003.safetensors` for weights, `state-00003.safetensors` for the
rest, by process 3. `index.json` takes the place of torch's pickled `.metadata`. Reading takes what overlaps with the parts that a
process wants, from whole tensors as well as from parts, one file at a time; no process ever has more than its own.

`SafetensorsReader` and `SafetensorsWriter` are what torch calls a storage layer: torch.distributed.checkpoint's own `load` and `save`
work with them too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from attrs import define, field, frozen
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from drivetrain_checkpoint.errors import CheckpointError
from drivetrain_checkpoint.format import Packed
from drivetrain_checkpoint.parts import Contents, Described, Parts, Place, read_whole
from drivetrain_checkpoint.store import Store
from drivetrain_checkpoint.text import INDEX_FILE, MAX_TREE_BYTES, TREE_FILE, dump_json


@frozen(eq=False)
class Planned:
    """`Parts` as torch's planners ask for them."""

    parts: Parts

    def size(self) -> torch.Size:
        """The whole's."""
        return self.parts.shape

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), piece.shape) for offsets, piece in self.parts.pieces.items()]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.parts.dtype)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.parts.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]


# -- saving ----------------------------------------------------------------------------------------------------------------


class PartsSavePlanner(DefaultSavePlanner):
    """Torch's own, for a flat state of `Parts`: what several processes have alike is written by one of them."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The piece that a plan means."""
        found = self.state_dict[index.fqn]
        return found.parts.pieces[tuple(index.offset or ())] if isinstance(found, Planned) else super().lookup_object(index)


@frozen
class Share:
    """What one process writes, and the index of what all write."""

    tensors: Mapping[str, Mapping[str, Tensor]]  # by file and name
    index: bytes


@define
class Planning:
    """The plan of all processes' parts, made once and used again as long as nobody's have changed."""

    _own: SavePlan | None = None
    _plans: list[SavePlan] = field(factory=list)
    _index: bytes = b""

    def share(self, parts: Mapping[str, Parts], rank: int, gather: Callable[[Any], list[Any]]) -> Share:
        """Agree with the others on who writes what.

        Args:
            gather: gives every process what each has; all of them must come here.

        Raises:
            CheckpointError: when the parts of all do not make up the wholes.
        """
        planner = PartsSavePlanner()
        planner.set_up_planner({name: Planned(own) for name, own in parts.items()}, is_coordinator=rank == 0)
        local = planner.create_local_plan()
        if any(gather(local != self._own)):
            self._own, plans = local, gather(local)
            try:
                self._plans, metadata = planner.create_global_plan(plans)
            except (ValueError, AssertionError) as error:
                raise CheckpointError(f"the processes' parts of the state do not fit together: {error}") from error
            self._index = index_of(self._plans, metadata)
        planner.finish_plan(self._plans[rank])
        return Share(tensors_of(self._plans[rank], planner, rank), self._index)


def tensors_of(plan: SavePlan, planner: Any, rank: int) -> dict[str, dict[str, Tensor]]:
    """What a process writes, by file and by name there, in the plan's order."""
    found: dict[str, dict[str, Tensor]] = {}
    for item, name in _named(plan.items):
        found.setdefault(_file_of(item, rank), {})[name] = planner.resolve_data(item)
    return found


def _named(items: Sequence[WriteItem]) -> Iterator[tuple[WriteItem, str]]:
    """Each item of one process with its name in its file: the tensor's, with the offsets when there are several parts."""
    counts = Counter(item.index.fqn for item in items)
    for item in items:
        name = item.index.fqn.partition("/")[2]
        alone = counts[item.index.fqn] == 1
        yield item, name if alone else f"{name}@{','.join(map(str, item.index.offset or ()))}"


def _file_of(item: WriteItem, rank: int) -> str:
    return f"{item.index.fqn.partition('/')[0]}-{rank:05d}.safetensors"


def index_of(plans: Sequence[SavePlan], metadata: Metadata) -> bytes:
    """The content of `index.json`."""
    files: dict[str, int] = {}
    tensors: dict[str, Any] = {}
    for rank, plan in enumerate(plans):
        for item, name in _named(plan.items):
            assert item.tensor_data is not None
            whole = metadata.state_dict_metadata[item.index.fqn]
            assert isinstance(whole, TensorStorageMetadata)
            chunk = item.tensor_data.chunk
            place = files.setdefault(_file_of(item, rank), len(files))
            entry = tensors.setdefault(
                item.index.fqn,
                {"dtype": str(whole.properties.dtype).removeprefix("torch."), "shape": list(whole.size), "chunks": []},
            )
            entry["chunks"].append([place, list(chunk.offsets), list(chunk.sizes), name])
    text = dump_json({"files": list(files), "tensors": tensors})
    if len(text) > MAX_TREE_BYTES:
        raise CheckpointError(f"{INDEX_FILE} would take {len(text)} bytes, more than the {MAX_TREE_BYTES} allowed")
    return text


class SafetensorsWriter(StorageWriter):
    """Writes what `torch.distributed.checkpoint.save` plans as a checkpoint of a run: the same files, the same transaction.

    The state is flat: tensors and sharded tensors by names that begin with "model/" or "state/".

    Args:
        store: of the run's directory, which all processes must see.
    """

    def __init__(self, store: Store, step: int) -> None:
        self.store, self.step = store, step
        self.path: Path | None = None  # the checkpoint, on the process that coordinates
        self._plans: list[SavePlan] = []

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to do: a writer is for one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the directory is made when all have planned."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is.

        Raises:
            CheckpointError: when something in the state is no tensor: torch would pickle it.
        """
        for item in plan.items:
            if item.tensor_data is None or item.index.fqn.partition("/")[0] not in ("model", "state"):
                raise CheckpointError(f'{item.index.fqn}: only tensors with names in "model/" or "state/" can be saved')
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the directory and tell everybody."""
        directory = self.store.begin(self.step)
        self._plans = [replace(plan, storage_data=(str(directory), rank)) for rank, plan in enumerate(plans)]
        return self._plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's files, durably."""
        directory, rank = plan.storage_data
        packed = Packed(tensors_of(plan, planner, rank), {}, {})
        entries = self.store.write_part(Path(directory), packed, self.step)
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, 0, entries) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index and the tree, and commit."""
        directory = Path(self._plans[0].storage_data[0])
        entries = {name: entry for of_one in results for one in of_one[:1] for name, entry in one.storage_data.items()}
        tree = {name: {"$tensor": [INDEX_FILE, name]} for name in metadata.state_dict_metadata}
        texts = {INDEX_FILE: index_of(self._plans, metadata), TREE_FILE: dump_json(tree)}
        entries |= self.store.write_part(directory, Packed({}, {}, texts), self.step)
        self.path = self.store.commit(directory, self.step, entries)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Not used: a writer is for one checkpoint."""
        return False


# -- reading ----------------------------------------------------------------------------------------------------------------


class PartsLoadPlanner(DefaultLoadPlanner):
    """Torch's own, for a flat state of `Planned`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the state as it is."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The piece that a plan means."""
        piece: Tensor = self.state_dict[index.fqn].parts.pieces[tuple(index.offset or ())]
        return piece


class SafetensorsReader(StorageReader):
    """Reads parts of tensors from the files of a checkpoint.

    Args:
        contents: what there is, by the names that the state has.
        check: called with the name of each file before anything is read from it.
    """

    def __init__(self, contents: Contents, check: Callable[[str], None] | None = None) -> None:
        self.contents, self.check = contents, check

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What there is to read."""
        return Metadata({name: _metadata(found) for name, found in self.contents.tensors.items()})

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what the plan wants, file by file. The files are mapped: what is not wanted is not read."""
        by_file: dict[str, list[tuple[ReadItem, Place]]] = {}
        for item in plan.items:
            place = self.contents.tensors[item.storage_index.fqn].places[tuple(item.storage_index.offset or ())]
            by_file.setdefault(place.file, []).append((item, place))
        for file, items in by_file.items():
            if self.check is not None:
                self.check(file)
            with safe_open(self.contents.directory / file, framework="pt") as opened:
                for item, place in items:
                    target = planner.resolve_tensor(item).detach()
                    ends = zip(item.storage_offsets, item.lengths, strict=True)
                    region = tuple(slice(start, start + length) for start, length in ends)
                    target.copy_(read_whole(opened, place, target.dtype)[region])
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to do: a reader is of one checkpoint."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the index has been read."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Not used: a reader is of one checkpoint."""
        return False


def _metadata(found: Described) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(offsets), place.shape) for offsets, place in found.places.items()]
    return TensorStorageMetadata(TensorProperties(dtype=found.dtype), found.shape, chunks)


def read_parts(contents: Contents, wanted: Mapping[str, Sequence[Parts]], check: Callable[[str], None] | None = None) -> None:
    """Fill all pieces of the wanted tensors, planned by torch.

    Raises:
        ValueError: also when something would be left unfilled.
    """
    reader = SafetensorsReader(contents, check)
    metadata = reader.read_metadata()
    for turn in range(max(map(len, wanted.values()), default=0)):  # a tensor may be wanted in several places
        planner = PartsLoadPlanner()
        state = {name: parts[turn] for name, parts in wanted.items() if turn < len(parts)}
        planner.set_up_planner({name: Planned(parts) for name, parts in state.items()}, metadata)
        plan = planner.finish_plan(planner.create_global_plan([planner.create_local_plan()])[0])
        filled = sum(math.prod(item.lengths) for item in plan.items)
        if filled != sum(piece.numel() for parts in state.values() for piece in parts.pieces.values()):
            raise ValueError("some of what is wanted is in no file")
        reader.read_data(plan, planner).wait()
