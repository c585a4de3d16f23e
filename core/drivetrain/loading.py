"""Loaders whose random numbers depend on (seed, epoch, position) alone: not on worker processes, nor on what a model draws meanwhile."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count
from multiprocessing import parent_process
from multiprocessing.connection import wait
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
    get_worker_info,
)
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from drivetrain.errors import RunError
from drivetrain.rng import drawn_since, host_state, isolated, mix, seed_host

Collate = Callable[[list[Any]], Any]
_STORED = (list, tuple, TensorDataset)  # in these nothing random can happen
_DATAPIPES = tuple(vars(torch.utils.data)[name] for name in ("IterDataPipe", "MapDataPipe") if hasattr(torch.utils.data, name))
_END: Any = object()
_MANY = 16  # samples, from which on it takes less time to look whether any of them has drawn a number than to seed each


class Loader(DataLoader[Any]):
    """A loader of ours, whose worker processes end when it is closed, or before the process ends.

    They leave signals to the training process (`tie_to_parent`). Left to the garbage collector as part of a cycle, or to the end
    of the process, they would not end: torch no longer tells them once the interpreter is exiting, and multiprocessing waits for them.
    """

    _started: Any = None  # the newest iterator

    def __iter__(self) -> Any:
        if self._started is None and self.num_workers:
            atexit.register(self.close)  # after torch's own, which is registered with its import: so it runs before
        self._started = super().__iter__()
        return self._started

    def _get_iterator(self) -> Any:
        if not self.num_workers:
            return super()._get_iterator()
        self.check_worker_number_rationality()
        return _Workers(self)

    def close(self) -> None:
        """End the workers now; another iteration starts new ones."""
        atexit.unregister(self.close)  # it would keep the loader and its data alive as long as the process
        started, self._started, self._iterator = self._started, None, None
        if started is not None and self.num_workers:
            started._shutdown_workers()
            for worker in started._workers:
                worker.kill()  # one that hangs in a sample has ignored the termination, and the process would wait for it
                worker.join()


class _Workers(_MultiProcessingDataLoaderIter):
    """Names the worker that has died, or whose batch is overdue. torch may notice a death elsewhere, and names the process then."""

    def _get_data(self) -> Any:
        try:
            return super()._get_data()  # type: ignore[no-untyped-call]
        except (RuntimeError, OSError, EOFError) as error:
            late = "timed out" in str(error)
            ended = wait([worker.sentinel for worker in self._workers], timeout=0 if late else 1)
            dead = [number for number, worker in enumerate(self._workers) if worker.sentinel in ended]
            if not dead and not late:
                raise
            number = dead[0] if dead else self._task_info[self._rcvd_idx][0]
            worker = self._workers[number]
            said = f"has sent nothing for {self._timeout:g} s: it hangs in a sample, or needs a longer dataloader.timeout"
            if dead:
                worker.join()
                said = f"has died with exit code {worker.exitcode}; -9 is often for want of memory"
            raise RunError(f"worker {number} of the data loader (process {worker.pid}) {said}.") from error


def draws_once(loader: Any) -> bool:
    """Whether a loader draws no random number after its first batch: stored samples, and torch's own samplers."""
    return (
        type(loader) is DataLoader
        and type(loader.dataset) in _STORED
        and loader.collate_fn is default_collate
        and type(loader.batch_sampler) is BatchSampler
        and type(loader.sampler) in (SequentialSampler, RandomSampler, DistributedSampler)
    )


def seeded(loader: Any, seed: int) -> Any:
    """A loader of the same batches whose random numbers depend on (seed, epoch, position) alone, with workers and without.

    One of somebody's own class, or of datapipes, which torch divides among workers itself, is given back as it is.
    """
    if type(loader) is not DataLoader or isinstance(loader.dataset, _DATAPIPES):
        return loader
    data, batched = loader.dataset, loader.batch_sampler is not None
    given: dict[str, Any]
    if isinstance(data, IterableDataset):
        given = {"dataset": _SeededStream(data, seed), "batch_size": loader.batch_size, "drop_last": loader.drop_last}
        given |= {"collate_fn": loader.collate_fn}  # the workers of the next epoch are new ones that know its number
    else:
        keys = _Keys(loader.batch_sampler if batched else loader.sampler, seed, batched)
        given = {"dataset": SeededDataset(data, seed, loader.collate_fn), "collate_fn": as_it_is}
        given |= {"batch_sampler": keys} if batched else {"batch_size": None, "sampler": keys}
        given |= {"persistent_workers": loader.persistent_workers}
    same = ("num_workers", "prefetch_factor", "pin_memory", "timeout", "multiprocessing_context", "in_order")
    given |= {name: getattr(loader, name) for name in same}
    return Loader(worker_init_fn=partial(_begin_worker, loader.worker_init_fn), generator=torch.Generator(), **given)


def apart(batches: Iterator[Any], seed_of: Callable[[int], int | None] = lambda _: None) -> Iterator[Any]:
    """The batches, each made without touching the global generators: those are the model's, and go on as if nothing was drawn."""
    for number in count():
        with isolated(seed_of(number)):
            batch = next(batches, _END)
        if batch is _END:
            return
        yield batch


class SeededDataset(Dataset[Any]):
    """Batches of a map-style data set whose random numbers depend on (seed, epoch, number) alone.

    It is asked with keys (epoch, number, index): the number is the sample's index, or its place in the epoch where the order is
    somebody else's. `collate` None takes whole batches from the data's `fetch`.
    """

    def __init__(self, data: Any, seed: int, collate: Collate | None) -> None:
        self.data, self.seed, self.collate = data, seed, collate
        self._draws: bool | None = None  # whether samples draw random numbers, as far as has been seen
        self._epoch, self._of_epoch = -1, 0  # the newest epoch, and its part of the seeds
        self.stored = type(data) in _STORED
        self.is_plain = self.stored and collate is default_collate

    def __getitems__(self, keys: Sequence[tuple[int, int, Any]]) -> Any:
        indices = [index for _, _, index in keys]
        if not self.is_plain:
            self._seed(keys[0])
        if self.collate is None:
            return self.data.fetch(indices)
        if self.stored:
            samples = [self.data[index] for index in indices]
        elif getattr(self.data, "__getitems__", None):  # fetches a whole batch: its random state belongs to the first sample
            samples = self.data.__getitems__(indices)
        else:
            samples = self._samples(keys)
        return self.collate(samples)

    def _samples(self, keys: Sequence[tuple[int, int, Any]]) -> list[Any]:
        """Samples with random numbers of their own. Seeding takes longer than many a sample, so those of data that have not drawn any
        number so far are fetched without, and once more, seeded, when they have drawn one after all."""
        if self._draws is False and len(keys) >= _MANY:
            before = host_state()
            samples = [self.data[index] for _, _, index in keys]
            if not drawn_since(before):
                self._seed(keys[-1])  # for the collator
                return samples
            self._draws = True
        if self._draws is not None:
            return [self._sample(key) for key in keys]
        samples, self._draws = [], False
        for key in keys:
            self._seed(key)
            before = host_state()
            samples.append(self.data[key[2]])
            self._draws |= drawn_since(before)
        return samples

    def __getitem__(self, key: tuple[int, int, Any]) -> Any:
        sample = self._sample(key)
        return sample if self.collate is None else self.collate(sample)

    def _sample(self, key: tuple[int, int, Any]) -> Any:
        self._seed(key)
        return self.data[key[2]]

    def _seed(self, key: tuple[int, int, Any]) -> None:
        epoch, number, _ = key
        if epoch != self._epoch:
            self._epoch, self._of_epoch = epoch, mix(self.seed, epoch)
        seed_host(mix(number, state=self._of_epoch))

    def __len__(self) -> int:
        return len(self.data)


class Plan:
    """A batch sampler whose batches are set for each epoch: lists of keys for `SeededDataset`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.batches: list[tuple[int, torch.Tensor]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        return ([(epoch, index, index) for index in batch.tolist()] for epoch, batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Keys:
    """Somebody's sampler, of batches or of samples, as keys for `SeededDataset`."""

    def __init__(self, sampler: Any, seed: int, batched: bool) -> None:
        self.sampler, self.seed, self.batched, self.epoch = sampler, seed, batched, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        drawn, place = iter(self.sampler), 0
        for number in count():
            seed_host(mix(self.seed, self.epoch, -1, number))  # in the training process, which `apart` guards
            found = next(drawn, _END)
            if found is _END:
                return
            keys = [(self.epoch, n, index) for n, index in enumerate(found if self.batched else [found], place)]
            place += len(keys)
            yield keys if self.batched else keys[0]

    def __len__(self) -> int:
        return len(self.sampler)


class _SeededStream(IterableDataset[Any]):
    """A stream whose random numbers at each sample depend on (seed, epoch, number) alone, and on which worker divides it."""

    def __init__(self, data: Iterable[Any], seed: int) -> None:
        self.data, self.seed, self.epoch = data, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        base = mix(self.seed, self.epoch, 0 if worker is None else worker.id)
        seed_host(base)
        samples = iter(self.data)
        for number in count():
            seed_host(mix(base, number))
            sample = next(samples, _END)
            if sample is _END:
                return
            yield sample


class Stream(IterableDataset[Any]):
    """Any iterable as an iterable data set."""

    def __init__(self, data: Iterable[Any]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)


def as_it_is(batch: Any) -> Any:
    """In place of a collate function where the data set has joined the samples."""
    return batch


def _begin_worker(given: Callable[[int], None] | None, worker: int) -> None:
    """What starts a worker of somebody's loader; the function that was given with it finds its own data set where torch says."""
    tie_to_parent(worker)
    info = get_worker_info()
    assert info is not None
    object.__setattr__(info, "dataset", info.dataset.data)  # type: ignore[attr-defined]
    if given is not None:
        given(worker)


def tie_to_parent(_worker: int) -> None:
    """Let a worker end when the training process says so, or has ended, and not by signals.

    That process stops the workers when it has saved what it needs, so Ctrl-C and termination are left to it.

    When it is killed they end at once. torch's workers look for it only between samples, and never miss one that is gone already.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)
