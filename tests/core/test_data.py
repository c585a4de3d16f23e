"""Sample order and augmentation depend on (seed, epoch, index) alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset, get_worker_info

from drivetrain import DataError, RunError, Trainer, TrainingConfig
from drivetrain.config import DataLoaderConfig
from drivetrain.data import Split, make_source

try:
    from numpy import random as numpy_random
except ModuleNotFoundError:  # `nox -s isolated` has what the core declares, and no more
    numpy_random = None  # type: ignore[assignment]


class Augmented:
    """Rows with noise from three generators; what each row gets must not depend on who fetches it, or when."""

    def __init__(self, n: int = 23) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.rand(3) + random.random() + (float(numpy_random.rand()) if numpy_random else 0.0)
        return torch.full((4,), float(index)) / self.n, noise.sum().reshape(1)


def epoch_of(data: Any, epoch: int = 0, start: int = 0, **given: Any) -> list[Any]:
    loader = DataLoaderConfig(**given.pop("loader", {}))
    names = ("batch_size", "accumulation", "rank", "world_size")
    split = Split(**{"batch_size": 4} | {name: given.pop(name) for name in names if name in given})
    source = make_source(data, split, **{"seed": 5, "loader": loader} | given)
    windows = [window.batches for window in source.open(epoch, start)]
    source.close()
    return windows


def flat(windows: list[Any]) -> torch.Tensor:
    return torch.cat([torch.cat([part.reshape(-1).double() for part in batch]) for window in windows for batch in window])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    alone = epoch_of(Augmented(), 2)
    helped = epoch_of(Augmented(), 2, loader={"num_workers": workers})
    assert torch.equal(flat(alone), flat(helped))


def test_opening_in_the_middle_gives_the_rest() -> None:
    for data in (Augmented(), TensorDataset(torch.arange(23.0))):
        whole = epoch_of(data, 1, accumulation=2)
        for start in range(len(whole) + 1):
            assert len(epoch_of(data, 1, start, accumulation=2)) == len(whole) - start
            if start < len(whole):
                assert torch.equal(flat(epoch_of(data, 1, start, accumulation=2)), flat(whole[start:]))


def test_tensors_on_a_device_are_indexed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA refuses indices on the host; the meta device, which stands in for it, does not."""
    original = torch.Tensor.index_select

    def strict(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
        assert tensor.device == index.device
        return original(tensor, dim, index)

    monkeypatch.setattr(torch.Tensor, "index_select", strict)
    data = TensorDataset(torch.ones(8, 3, device="meta"), torch.arange(8.0))
    batches = [batch for window in make_source(data, Split(4)).open(0) for batch in window.batches]
    assert [(x.device.type, x.shape, y.device.type) for x, y in batches] == [("meta", (4, 3), "cpu")] * 2
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == list(range(8))


def test_every_sample_once_and_another_order_in_each_epoch() -> None:
    data = TensorDataset(torch.arange(23))
    orders = [torch.cat([batch[0] for (batch,) in epoch_of(data, epoch)]) for epoch in range(3)]
    for order in orders:
        assert order.sort().values.tolist() == list(range(23))
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[1], orders[2])
    in_order = torch.cat([batch[0] for (batch,) in epoch_of(data, loader={"shuffle": False})])
    assert in_order.tolist() == list(range(23))


def test_another_seed_another_order_and_augmentation() -> None:
    assert not torch.equal(flat(epoch_of(Augmented(), seed=5)), flat(epoch_of(Augmented(), seed=6)))
    noise = {
        epoch: sorted(epoch_of(Augmented(), epoch, loader={"shuffle": False})[0][0][1].flatten().tolist()) for epoch in (0, 1)
    }
    assert noise[0] != noise[1]


def test_the_same_augmentation_for_any_batch_size() -> None:
    by_size = []
    for size in (1, 4, 23):
        windows = epoch_of(Augmented(), batch_size=size)
        pairs = [
            pair for ((inputs, noise),) in windows for pair in zip(inputs[:, 0].tolist(), noise[:, 0].tolist(), strict=True)
        ]
        by_size.append(sorted(pairs))
    assert by_size[0] == by_size[1] == by_size[2]


class Rare(Augmented):
    """Rows few of which draw."""

    def __init__(self, drawing: set[int]) -> None:
        super().__init__(200)
        self.drawing, self.fetched = drawing, 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.fetched += 1
        return torch.full((1,), float(index)), super().__getitem__(index)[1] if index in self.drawing else torch.zeros(1)


def rows(windows: list[Any]) -> dict[int, float]:
    return {int(index): float(drawn) for ((batch, noise),) in windows for index, drawn in zip(batch, noise, strict=True)}


def test_a_sample_that_draws_late_has_numbers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    order = list(rows(epoch_of(Rare(set()), batch_size=32)))
    drawing = {order[50], order[51], order[150]}  # none in the first batch
    each_seeded = rows(epoch_of(Rare(drawing), batch_size=4))
    assert {index for index, drawn in each_seeded.items() if drawn} == drawing
    data = Rare(drawing)
    assert rows(epoch_of(data, batch_size=32)) == each_seeded
    assert data.fetched == 200 + 32, "one batch was fetched again"
    assert rows(epoch_of(Rare(drawing), batch_size=32, loader={"num_workers": 2})) == each_seeded
    monkeypatch.setattr("drivetrain.loading.drawn_since", lambda _: False)
    assert rows(epoch_of(Rare(drawing), batch_size=32)) != each_seeded


def test_data_that_never_draws_is_not_seeded_for_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    monkeypatch.setattr("drivetrain.loading.seed_host", seeds.append)
    data = Rare(set())
    epoch_of(data, batch_size=50)
    assert (data.fetched, len(seeds)) == (
        200,
        1 + 50 + 3 * 2,
    )  # the first batch tells; then one for the samples, one to collate


def test_fetching_leaves_the_models_random_numbers_alone() -> None:
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    epoch_of(Augmented())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize(
    ("n", "size", "accumulation", "drop_last", "sizes"),
    [
        (10, 4, 1, False, [[4], [4], [2]]),
        (10, 4, 1, True, [[4], [4]]),
        (10, 2, 2, False, [[2, 2], [2, 2], [2]]),
        (10, 4, 2, True, [[4, 4]]),
        (9, 4, 2, False, [[4, 4], [1]]),
        (3, 4, 1, False, [[3]]),
    ],
)
def test_windows(n: int, size: int, accumulation: int, drop_last: bool, sizes: list[list[int]]) -> None:
    for data in (TensorDataset(torch.arange(n)), [torch.tensor(i) for i in range(n)]):
        source = make_source(data, Split(size, accumulation), loader=DataLoaderConfig(drop_last=drop_last))
        found = list(source.open(0))
        assert [[len(b[0] if isinstance(b, tuple) else b) for b in window.batches] for window in found] == sizes
        assert [window.counts for window in found] == sizes
        assert [window.total for window in found] == [sum(counts) for counts in sizes]
        assert source.steps_per_epoch == len(sizes)


def test_a_loader_that_shuffles_has_an_order_fixed_by_the_epoch_and_can_be_opened_anywhere() -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.arange(20)), batch_size=3, shuffle=True)

    torch.manual_seed(1)
    whole = epoch_of(loader(), 4)
    torch.manual_seed(2)
    assert torch.equal(flat(epoch_of(loader(), 4)), flat(whole))
    assert torch.equal(flat(epoch_of(loader(), 4, 3)), flat(whole[3:]))
    assert not torch.equal(flat(epoch_of(loader(), 5)), flat(whole))


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return (torch.tensor(float(i)) for i in range(11))


def test_streams() -> None:
    for data in (Stream(), (float(i) for i in range(11))):
        windows = epoch_of(data, accumulation=2)
        assert [[len(batch) for batch in window] for window in windows] == [[4, 4], [3]]
    assert torch.cat([b for w in epoch_of(Stream(), 0, 1, accumulation=2) for b in w]).tolist() == [8, 9, 10]
    with pytest.warns(UserWarning, match="num_workers = 2, but a stream is read by one worker process"):
        with_workers = epoch_of(Stream(), loader={"num_workers": 2})
    assert torch.cat([b for w in with_workers for b in w]).tolist() == list(range(11)), (
        "two workers must not yield the stream twice"
    )


class Fetched:
    """A data set that fetches whole batches."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        raise AssertionError("fetch should be used")

    def fetch(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor(indices) * 10}


def test_fetch_is_preferred() -> None:
    windows = epoch_of(Fetched(), loader={"shuffle": False})
    assert windows[2][0]["x"].tolist() == [80, 90]


class Together(Augmented):
    """Fetches the samples of a batch at once, as data sets of Hugging Face do."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


class Whole(Augmented):
    """Makes whole batches."""

    def fetch(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [self[index] for index in indices]
        return torch.stack([inputs for inputs, _ in rows]), torch.stack([targets for _, targets in rows])


class Flow(IterableDataset[Any]):
    """Shuffles as well, from the global generator."""

    def __iter__(self) -> Iterator[Any]:
        data = Augmented()
        return (data[index] for index in torch.randperm(len(data)).tolist())


def collate(rows: list[Any]) -> Any:
    """Draws for the whole batch, as collators that mask tokens do."""
    inputs, targets = torch.utils.data.default_collate(rows)
    return inputs + torch.rand(()), targets


def loader_of(data: Any, workers: int, **given: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=4, num_workers=workers, **given)


SOURCES: dict[str, Callable[[int], Any]] = {
    "map": lambda _: Augmented(),
    "batch": lambda _: Together(),
    "fetch": lambda _: Whole(),
    "stream": lambda _: Flow(),
    "list": lambda _: [(torch.full((4,), index / 23), torch.ones(1)) for index in range(23)],
    "loader": lambda workers: loader_of(Augmented(), workers, shuffle=True, collate_fn=collate, persistent_workers=workers > 0),
    "loader of a stream": lambda workers: loader_of(Flow(), min(workers, 1)),
}


def trained(source: str, workers: int) -> torch.Tensor:
    """The weights after two epochs with dropout."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    given = {"max_duration": "2ep", "per_device_batch_size": 4, "standard_callbacks": False}
    config = TrainingConfig(**given, dataloader={"num_workers": workers})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data, joined = SOURCES[source](workers), collate if source in ("map", "list") else None
    Trainer(model, config, data, loss=nn.MSELoss(), optimizer=optimizer, data_collator=joined).train()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("source", SOURCES)
def test_same_seed_same_weights_with_and_without_workers(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit-equal, with augmentation, a random collator and dropout; without the seeds of each place they would not be."""
    monkeypatch.setenv("DRIVETRAIN_PLUGINS", "off")
    torch.manual_seed(0)
    assert torch.equal(trained(source, 0), trained(source, 2))

    for module in ("data", "loading"):
        monkeypatch.setattr(f"drivetrain.{module}.isolated", lambda *_: nullcontext())
    monkeypatch.setattr("drivetrain.loading.seed_host", lambda _: None)
    assert not torch.equal(trained(source, 0), trained(source, 2))


@pytest.mark.parametrize("source", SOURCES)
def test_any_source_leaves_the_models_random_numbers_alone(source: str) -> None:
    torch.manual_seed(3)
    data = SOURCES[source](0)
    before = torch.get_rng_state(), random.getstate(), numpy_random and numpy_random.get_state()[1].tolist()
    epoch_of(data)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), numpy_random and numpy_random.get_state()[1].tolist()) == before[1:]


def test_a_loader_with_a_generator_of_its_own_has_the_epochs_order_wherever_it_is_opened() -> None:
    def loader() -> DataLoader[Any]:
        return loader_of(list(range(20)), 0, shuffle=True, generator=torch.Generator().manual_seed(9))

    def order(data: Any, epoch: int) -> list[int]:
        return torch.cat([batch for (batch,) in epoch_of(data, epoch)]).tolist()

    orders, one = [order(loader(), epoch) for epoch in (0, 1)], loader()
    assert [order(one, 1), order(one, 0)] == orders[::-1]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == list(range(20))


def test_loaders_that_are_divided_among_ranks_draw_other_numbers_on_each() -> None:
    def noise(rank: int, world: int = 2) -> list[float]:
        data = [torch.zeros(1)] * 8
        sampler: Any = DistributedSampler(data, world, rank, shuffle=False)
        loader = DataLoader(data, batch_size=2, sampler=sampler, collate_fn=lambda rows: torch.rand(len(rows)))
        return [value for (batch,) in epoch_of(loader, rank=rank, world_size=world) for value in batch.tolist()]

    assert noise(0) == noise(0)
    assert len({*noise(0), *noise(1)}) == 8


class Divided(IterableDataset[int]):
    """Divided among workers as torch's documentation shows it: by a function that finds the worker's own copy."""

    def __init__(self) -> None:
        self.start, self.end = 0, 12

    def __iter__(self) -> Iterator[int]:
        assert get_worker_info().dataset is self
        return iter(range(self.start, self.end))


def divide(worker: int) -> None:
    data: Any = get_worker_info().dataset
    data.start, data.end = 6 * worker, 6 * worker + 6


def test_the_functions_of_somebodys_workers_find_their_data_set() -> None:
    loader = DataLoader(Divided(), batch_size=3, num_workers=2, worker_init_fn=divide)
    assert sorted(torch.cat([batch for (batch,) in epoch_of(loader)]).tolist()) == list(range(12))


def test_a_loader_without_batches_gives_samples_as_they_are() -> None:
    loader = DataLoader(Augmented(), batch_size=None, shuffle=True, num_workers=0)
    windows = epoch_of(loader, 3)
    assert [tuple(part.shape) for part in windows[0][0]] == [(4,), (1,)]
    assert torch.equal(flat(epoch_of(loader, 3, 5)), flat(windows[5:]))


@pytest.mark.parametrize(
    ("data", "given", "message"),
    [
        ([], {}, "has 0 samples"),
        ([1, 2], {"loader": {"drop_last": True}}, "less than one microbatch of 4"),
        (DataLoader([], batch_size=2), {}, "has no batch"),
        (3, {}, "is a int, which is no data set"),
        (type("NoLength", (), {"__getitem__": lambda s, i: i})(), {}, "no __len__"),
    ],
    ids=["empty", "too small", "empty loader", "number", "no length"],
)
def test_unusable_data_is_refused(data: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        epoch_of(data, **given)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_share_the_same_steps(world: int) -> None:
    """Every sample once, in the same steps for any number of ranks at the same global batch; equally many microbatches each."""
    n, per_step = 53, 24
    for data in (TensorDataset(torch.arange(n)), DataLoader(TensorDataset(torch.arange(n)), batch_size=24 // world // 2)):
        steps: list[list[int]] = []
        ranks = []
        for rank in range(world):
            split = Split(per_step // world // 2, 2, rank, world)
            ranks.append(list(make_source(data, split, seed=5).open(1)))
        assert len({len(windows) for windows in ranks}) == 1
        for step in zip(*ranks, strict=True):
            assert len({len(window.batches) for window in step}) == 1
            samples = [
                int(i) for window in step for (b,), count in zip(window.batches, window.counts, strict=True) for i in b[:count]
            ]
            assert {window.total for window in step} == {len(samples)}
            steps.append(sorted(samples))
        assert sorted(i for step in steps for i in step) == list(range(n))
        if isinstance(data, TensorDataset):
            alone = make_source(data, Split(per_step), seed=5).open(1)
            assert steps == [sorted(window.batches[0][0].tolist()) for window in alone]


class Fatal(Augmented):
    """A sample that ends the process which reads it, or keeps it for ever; the others come."""

    how: Callable[[], object]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == 17:
            self.how()
        return super().__getitem__(index)


def kill_oneself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_worker_is_named() -> None:
    """Where its batch is waited for, or by torch in whatever else the process is doing; the run's end closes the loader."""
    data, model = Fatal(), nn.Linear(4, 1)
    data.how = kill_oneself
    config = TrainingConfig(max_duration="1ep", per_device_batch_size=4, dataloader={"num_workers": 2}, device="cpu")
    parts = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "loss": nn.MSELoss()}
    trainer = Trainer(model, config, data, **parts)  # type: ignore[arg-type]
    named = (
        r"worker \d of the data loader \(process \d+\) has died with exit code -9|DataLoader worker \(pid \d+\) is killed by"
    )
    with pytest.raises((RunError, RuntimeError), match=named):
        trainer.train()


def test_a_worker_that_hangs_is_named_and_ended() -> None:
    """It leaves signals to the training process, which would wait for it at its own end."""
    data = Fatal()
    data.how = partial(time.sleep, 3600)
    source = make_source(data, Split(4), seed=5, loader=DataLoaderConfig(num_workers=1, timeout=3.0))
    with pytest.raises(RunError, match=r"worker 0 of the data loader \(process \d+\) has sent nothing for 3 s"):
        list(source.open(0))
    hanging = source._loader._started._workers
    source.close()
    assert not any(worker.is_alive() for worker in hanging)


def test_workers_end_with_a_killed_process_even_in_a_sample(tmp_path: Path) -> None:
    """torch's own look for it between samples only; they would keep their memory, and the run's files open."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, time, torch\n"
        "from drivetrain import Trainer, TrainingConfig\n"
        "class Data:\n"
        "    def __len__(self): return 64\n"
        "    def __getitem__(self, index):\n"
        "        print(os.getpid(), flush=True)\n"
        "        time.sleep(3600)\n"
        "model = torch.nn.Linear(4, 1)\n"
        "config = TrainingConfig(max_duration='100st', dataloader={'num_workers': 2})\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "Trainer(model, config, Data(), loss=torch.nn.MSELoss(), optimizer=optimizer).train()\n"
    )
    env = os.environ | {"DRIVETRAIN_PLUGINS": "off"}
    with subprocess.Popen([sys.executable, str(script)], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert {int(process.stdout.readline()) for _ in range(2)} - {process.pid}
        process.kill()
        assert process.stdout.read() == ""  # which ends when the workers, who have its other end, are gone


@pytest.mark.parametrize("first", ["torch", "multiprocessing.util"])  # whose functions are called first at the exit
@pytest.mark.parametrize("kind", ["map", "stream"])
def test_a_loop_that_is_never_finished_lets_the_process_end(tmp_path: Path, first: str, kind: str) -> None:
    """Workers leave signals to the training process, which must end them itself before it waits for its children."""
    script = tmp_path / "unfinished.py"
    script.write_text(
        f"import {first}\n"
        "import torch\n"
        "from drivetrain import Trainer, TrainingConfig\n"
        "class Data:\n"
        + (
            "    def __len__(self): return 64\n    def __getitem__(self, index): return torch.ones(4), torch.ones(1)\n"
            if kind == "map"
            else "    def __iter__(self):\n        while True: yield torch.ones(4), torch.ones(1)\n"
        )
        + "model = torch.nn.Linear(4, 1)\n"
        "config = TrainingConfig(max_duration='100st', dataloader={'num_workers': 2})\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "steps = Trainer(model, config, Data(), loss=torch.nn.MSELoss(), optimizer=optimizer).steps()\n"
        "print(next(steps).number)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "DRIVETRAIN_PLUGINS"} | {"DRIVETRAIN_PLUGINS": "off"}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
