"""From any data set to windows of microbatches, in an order that depends on (seed, epoch, index) alone.

A window is what one rank gets of one step: its microbatches, and how many samples the step has in all. Whatever the data is, a
source can open an epoch at any step, and what it yields from there does not depend on worker processes or on where an earlier
sitting stopped. The samples of a step do not depend on how many ranks share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from attrs import frozen
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset, default_collate

from drivetrain.config import DataLoaderConfig
from drivetrain.errors import DataError
from drivetrain.loading import (
    Collate,
    Loader,
    Plan,
    SeededDataset,
    Stream,
    apart,
    as_it_is,
    draws_once,
    seeded,
    tie_to_parent,
)
from drivetrain.loss import samples_in
from drivetrain.rng import isolated, mix


class Window(NamedTuple):
    """One rank's microbatches of one step.

    Attributes:
        batches: the microbatches; every rank has equally many.
        counts: samples in each that count: its size, or 0 for one that only stands in because other ranks have more.
        total: samples in the step, all ranks together.
    """

    batches: list[Any]
    counts: list[int]
    total: int


@frozen
class Split:
    """How a step is divided: samples in a microbatch, microbatches in a step, and which rank of how many this is."""

    batch_size: int = 8
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1

    def share(self, samples: int) -> tuple[int, int]:
        """Where this rank's part of a round of `samples` begins and ends; a round that is not full is spread evenly."""
        if samples == self.batch_size * self.world_size:
            return self.rank * self.batch_size, (self.rank + 1) * self.batch_size
        least, more = divmod(samples, self.world_size)
        begin = self.rank * least + min(self.rank, more)
        return begin, begin + least + (self.rank < more)


@frozen
class SampleOrder:
    """Which samples of a map-style data set feed each step: a few numbers, so that it can be written down and asked later."""

    size: int  # samples in the data set
    used: int  # those an epoch uses
    samples_per_step: int  # of all ranks together
    seed: int
    shuffle: bool

    def epoch(self, number: int) -> torch.Tensor:
        """The sample indices of an epoch in order, int64 [used]."""
        if not self.shuffle:
            return torch.arange(self.used)
        return torch.randperm(self.size, generator=torch.Generator().manual_seed(mix(self.seed, number)))[: self.used]

    def step(self, epoch: int, index: int) -> torch.Tensor:
        """The sample indices of step `index` (from 0) of an epoch, all ranks together."""
        return self.epoch(epoch)[index * self.samples_per_step : (index + 1) * self.samples_per_step]


class Source:
    """Where windows come from. The attributes that are None can only be told of map-style data.

    Attributes:
        data: what was given.
        split: how a step is divided.
        steps_per_epoch: None when the data has no length.
        samples_per_step: of all ranks together.
        sample_order: which samples feed each step.
    """

    data: Any
    split: Split
    steps_per_epoch: int | None = None
    samples_per_step: int | None = None
    sample_order: SampleOrder | None = None

    def open(self, epoch: int, start: int = 0) -> Iterator[Window]:
        """The windows of an epoch from step `start` on. Work that earlier steps would have done is done before this returns."""
        raise NotImplementedError

    def is_read_once(self) -> bool:
        """Whether what has been read is gone, and opening anew goes on behind it. May draw random numbers."""
        return False

    def close(self) -> None:
        """End worker processes; opening starts new ones."""


class MapSource(Source):
    """A map-style data set: the order is a permutation fixed by (seed, epoch), so opening in the middle costs nothing."""

    def __init__(
        self, data: Any, split: Split, seed: int, loader: DataLoaderConfig, collate: Collate | None, pin: bool
    ) -> None:
        self.data, self.size, self.split, self.seed = data, len(data), split, seed
        self._round = split.batch_size * split.world_size  # samples in one microbatch of every rank
        rounds = self.size // self._round if loader.drop_last else -(-self.size // self._round)
        if rounds == 0:
            raise DataError(_too_small(self.size, self._round))
        self.steps_per_epoch = -(-rounds // split.accumulation)
        self.samples_per_step = self._round * split.accumulation
        used = min(self.size, rounds * self._round)
        self.sample_order = SampleOrder(self.size, used, self.samples_per_step, seed, loader.shuffle)
        self._fetch = None if collate or loader.num_workers else direct_fetch(data)
        self._plan = Plan(self.size)
        self._loader = None if self._fetch is not None else self._make_loader(data, loader, collate, pin)

    def open(self, epoch: int, start: int = 0) -> Iterator[Window]:
        assert self.samples_per_step is not None and self.sample_order is not None
        order = self.sample_order.epoch(epoch)[start * self.samples_per_step :]
        plan = [self._mine(indices) for indices in order.split(self._round) if len(indices)]
        batches = self._batches(epoch, [indices for indices, _ in plan])
        return self._windows(batches, [count for _, count in plan], len(order))

    def _mine(self, indices: torch.Tensor) -> tuple[torch.Tensor, int]:
        """This rank's part of a round and how many of it count; a rank for which none is left stands in with the first."""
        begin, end = self.split.share(len(indices))
        return (indices[begin:end], end - begin) if end > begin else (indices[:1], 0)

    def _windows(self, batches: Iterator[Any], counts: list[int], left: int) -> Iterator[Window]:
        assert self.samples_per_step is not None
        size, each = self.split.accumulation, self.samples_per_step
        for first in range(0, len(counts), size):
            mine = counts[first : first + size]
            yield Window(list(islice(batches, len(mine))), mine, min(each, left))
            left -= each

    def _batches(self, epoch: int, plan: list[torch.Tensor]) -> Iterator[Any]:
        if self._loader is None:
            assert self._fetch is not None
            return map(self._fetch, plan)
        self._plan.batches = [(epoch, batch) for batch in plan]
        batches = iter(self._loader)
        return batches if self._draws_elsewhere else apart(batches)

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()

    def _make_loader(self, data: Any, loader: DataLoaderConfig, collate: Collate | None, pin: bool) -> Loader:
        batches = SeededDataset(data, self.seed, collate or _collate_of(data))
        self._draws_elsewhere = batches.is_plain or loader.num_workers > 0  # than from this process's generators
        return Loader(
            batches,
            batch_sampler=self._plan,
            collate_fn=as_it_is,
            num_workers=loader.num_workers,
            persistent_workers=loader.num_workers > 0,
            prefetch_factor=loader.prefetch_factor if loader.num_workers else None,
            timeout=loader.timeout if loader.num_workers else 0,
            pin_memory=pin,
            worker_init_fn=tie_to_parent,
            generator=torch.Generator(),  # else each epoch's iterator would draw from the global generator
        )


def _too_small(size: int, needed: int) -> str:
    if size == 0:
        return "the data set has 0 samples, so nothing can be trained on."
    return (
        f"the data set has {size} samples, less than one microbatch of {needed} (all processes together), and "
        "dataloader.drop_last leaves it out. Lower per_device_batch_size or keep the last one."
    )


class StreamSource(Source):
    """An iterable data set or a ready DataLoader: opening in the middle replays what came before.

    Of several ranks each reads the whole stream and takes its batches in turn, so that no batch is used twice or left out and all
    ranks know what the others have. A loader whose DistributedSampler has divided the data already is read as it is.
    """

    def __init__(self, batches: Iterable[Any], split: Split, seed: int) -> None:
        self.data, self.split = batches, split
        self._divided = isinstance(getattr(batches, "sampler", None), DistributedSampler)
        self.seed = mix(seed, split.rank) if self._divided else seed  # other samples, so other random numbers
        self._draws_once = draws_once(batches)
        self._loader = batches if self._draws_once else seeded(batches, self.seed)
        self._round = 1 if self._divided else split.world_size
        length = _length(batches)
        if length == 0:
            raise DataError("the data has no batch, so nothing can be trained on.")
        self.steps_per_epoch = None if length is None else -(-length // (self._round * split.accumulation))

    def open(self, epoch: int, start: int = 0) -> Iterator[Window]:
        for thing in (self.data, self._loader):
            for part in ("sampler", "batch_sampler", "dataset"):
                set_epoch = getattr(getattr(thing, part, None), "set_epoch", None)
                if callable(set_epoch):
                    set_epoch(epoch)
        generator = getattr(getattr(self.data, "sampler", None), "generator", None)
        if isinstance(generator, torch.Generator):  # of the sampler's own: it would give each process another order
            generator.manual_seed(mix(self.seed, epoch))
        # Loaders draw from the global generators when an iterator starts, and at each batch: give them seeds of the position, so
        # that the order is the epoch's and the model's random numbers are not disturbed.
        with isolated(mix(self.seed, epoch)):
            found = iter(self._loader)
            first = list(islice(found, 1)) if self._draws_once else []
        batches = chain(first, found if self._draws_once else apart(found, lambda number: mix(self.seed, epoch, number)))
        for _ in islice(batches, start * self.split.accumulation * self._round):
            pass
        return self._windows(batches)

    def _windows(self, batches: Iterator[Any]) -> Iterator[Window]:
        size = self.split.accumulation * self._round
        while step := list(islice(batches, size)):
            rounds = [step[first : first + self._round] for first in range(0, len(step), self._round)]
            mine = [self._mine(batches_of_round) for batches_of_round in rounds]
            total = sum(samples_in(batch) for batch in step) * (self.split.world_size if self._divided else 1)
            yield Window([batch for batch, _ in mine], [count for _, count in mine], total)

    def is_read_once(self) -> bool:
        data = getattr(self.data, "dataset", None)
        if not isinstance(data, IterableDataset) or getattr(
            self.data, "num_workers", None
        ):  # each worker reads a copy of its own
            return False
        return iter(data) is iter(data)

    def close(self) -> None:
        if isinstance(self._loader, Loader):  # another is its owner's
            self._loader.close()

    def _mine(self, batches: list[Any]) -> tuple[Any, int]:
        index = 0 if self._divided else self.split.rank
        return (batches[index], samples_in(batches[index])) if index < len(batches) else (batches[0], 0)


def make_source(
    data: Any,
    split: Split,
    *,
    seed: int = 0,
    loader: DataLoaderConfig | None = None,
    collate: Collate | None = None,
    pin: bool = False,
) -> Source:
    """The source for any kind of training data.

    Args:
        data: a map-style data set (`__len__` and `__getitem__`), an iterable one, or an iterable of ready batches such as a DataLoader.
        split: how a step is divided; ready batches keep their own size.
        seed: fixes the order and the augmentation.

    Raises:
        DataError: when the data is empty, too small, or of no usable kind.
    """
    loader = loader or DataLoaderConfig()
    if isinstance(data, DataLoader):
        return StreamSource(data, split, seed)
    if isinstance(data, Mapping):  # such as a DatasetDict of Hugging Face
        parts = ", ".join(map(repr, list(data)[:5]))
        raise DataError(
            f"the data is a {type(data).__name__} with the parts {parts}; give one of them, such as data[{next(iter(data), '…')!r}]."
        )
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        if not isinstance(data, Iterable):
            raise DataError(
                f"the data is a {type(data).__name__}, which is no data set: it needs __len__ and __getitem__, or __iter__, "
                "or give a torch DataLoader."
            )
        return StreamSource(_stream_loader(data, split.batch_size, loader, collate, pin), split, seed)
    if not isinstance(data, Sized):
        raise DataError(
            f"the data set {type(data).__name__} has __getitem__ but no __len__; add it, or make it an IterableDataset."
        )
    return MapSource(data, split, seed, loader, collate, pin)


def _stream_loader(data: Any, batch_size: int, loader: DataLoaderConfig, collate: Collate | None, pin: bool) -> DataLoader[Any]:
    workers = min(loader.num_workers, 1)  # more would each yield the whole stream
    return DataLoader(
        data if isinstance(data, IterableDataset) else Stream(data),
        batch_size=batch_size,
        drop_last=loader.drop_last,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=loader.prefetch_factor if workers else None,
        timeout=loader.timeout if workers else 0,
        pin_memory=pin,
    )


def direct_fetch(data: Any) -> Callable[[torch.Tensor], Any] | None:
    """A function from indices to a whole batch for tensors in memory, in which nothing random can happen."""
    if type(data) is not TensorDataset:
        return None
    tensors = data.tensors
    # copies rows, where `tensor[indices]` copies numbers: a fifth of the time for 256 images of 32 × 32
    return lambda indices: tuple(tensor.index_select(0, indices) for tensor in tensors)


def _collate_of(data: Any) -> Collate | None:
    """What joins samples; None for data that offers whole batches by a method `fetch(indices)`."""
    return None if callable(getattr(data, "fetch", None)) else default_collate


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None
