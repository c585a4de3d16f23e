"""GradientSynchronizer in a loop of one's own, on two processes, against one process's gradients."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from drivetrain import GradientSynchronizer

DATA = torch.arange(20.0).reshape(5, 4) / 20  # 3 rows for rank 0, 2 for rank 1
SMALL = 1e-4  # MiB: every layer but the smallest has a bucket of its own


class Net(nn.Module):
    """Three layers; `skip` leaves the second one out of the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        x = self.one(x).tanh()
        return self.three(x if skip else self.two(x).tanh()).square()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.float().reshape(-1) for p in model.parameters()])


def alone(weights: list[float] | None = None, skip: tuple[bool, bool] = (False, False)) -> Tensor:
    """In double precision, rank by rank: the sum of both ranks' losses over the sum of the weights, 5 rows unless told."""
    model = Net().double()
    for rank, rows in enumerate((DATA[:3], DATA[3:])):
        (model(rows.double(), skip[rank]).sum() / (5 if weights is None else sum(weights))).backward()
    return flat(model)


@contextmanager
def recorded(events: list[str]) -> Iterator[None]:
    original = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        events.append(f"reduce {len(tensor)}")
        return original(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield
    finally:
        dist.all_reduce = original


def scenarios(rank: int) -> dict[str, Any]:
    mine, found = DATA[:3] if rank == 0 else DATA[3:], {}

    model = Net()
    sync = GradientSynchronizer(model.parameters(), bucket_mb=SMALL)
    for name, rows in (
        ("weighted", [mine]),
        ("accumulated", [mine[:1], mine[1:]]),
    ):  # twice over: nothing is left from the first
        events: list[str] = []
        handle = model.one.weight.register_hook(lambda _, events=events: events.append("first layer"))
        model.zero_grad()
        with recorded(events):
            with sync.no_sync():
                for row in rows[:-1]:
                    model(row).sum().backward()
            model(rows[-1]).sum().backward()
            sync.reduce(weight=len(mine))
        handle.remove()
        found[name], found[f"{name} events"] = flat(model), events

    model = Net()
    sync = GradientSynchronizer(model.parameters(), bucket_mb=SMALL)
    events = []
    with recorded(events):
        model(mine, skip=rank == 1).sum().backward()
        sync.reduce(weight=torch.tensor(len(mine)))
    found["unused"], found["unused events"] = flat(model), events

    model = Net()
    sync = GradientSynchronizer(model.parameters(), dtype=torch.bfloat16)
    sync.rider = float(rank == 1)
    model(mine).sum().backward()
    sync.reduce()
    found["bf16"], found["rider"] = flat(model), sync.rider

    model = Net()
    model(mine).mean().backward()
    GradientSynchronizer(model.parameters()).reduce()  # made after backward: nothing was heard of it
    found["means of ranks"] = flat(model)
    return found


def work(rank: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results[rank] = scenarios(rank)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(work, (str(tmp_path_factory.mktemp("two") / "store"), results), nprocs=2)
        by_rank = dict(results)
    for name in by_rank[0]:
        if isinstance(by_rank[0][name], Tensor):
            assert torch.equal(by_rank[0][name], by_rank[1][name]), f"{name} is the same on both ranks"
    return [by_rank[0], by_rank[1]]


def distance(one: Tensor, two: Tensor) -> float:
    return float((one.double() - two.double()).norm() / two.double().norm())


@pytest.mark.parametrize("name", ["weighted", "accumulated"])
def test_gradients_are_one_processs(found: list[dict[str, Any]], name: str) -> None:
    assert distance(found[0][name], alone()) < 1e-6


def test_negative_control_the_mean_of_means_is_something_else(found: list[dict[str, Any]]) -> None:
    assert distance(found[0]["means of ranks"], alone()) > 1e-3


@pytest.mark.parametrize("name", ["weighted", "accumulated"])
def test_buckets_travel_while_backward_runs_and_once_for_each_window(found: list[dict[str, Any]], name: str) -> None:
    """From the last layer to the first one, whose matrix is the last to come. Then the sum of the weights, one number."""
    others = ["first layer"] if name == "accumulated" else []
    for rank in (0, 1):
        events = found[rank][f"{name} events"]
        assert events == [*others, "reduce 17", "reduce 64", "reduce 8", "first layer", "reduce 32", "reduce 1"]


def test_what_one_rank_does_not_use_counts_as_zero_in_the_same_order(found: list[dict[str, Any]]) -> None:
    assert distance(found[0]["unused"], alone(skip=(False, True))) < 1e-6
    sizes = [[event for event in found[rank]["unused events"] if event.startswith("reduce")] for rank in (0, 1)]
    assert sizes[0] == sizes[1]


def test_bf16_loses_no_more_than_its_rounding(found: list[dict[str, Any]]) -> None:
    """Each rank's gradient and their sum are rounded to 8 bits, by 2^-9 of each at most; the parts do not cancel much here."""
    exact = alone(weights=[1.0, 1.0])
    assert 1e-5 < distance(found[0]["bf16"], exact) < 3 * 2**-9


def test_a_rider_is_added_up(found: list[dict[str, Any]]) -> None:
    assert [row["rider"] for row in found] == [1.0, 1.0]


def test_without_a_process_group_there_is_one_process() -> None:
    model = Net()
    sync = GradientSynchronizer(model.parameters())
    model(DATA).sum().backward()
    sync.reduce(weight=5)
    assert distance(flat(model), alone()) < 1e-6


def started(log: list[int]) -> Any:
    def start(flat: Tensor) -> Any:
        log.append(len(flat))
        return lambda: flat * 2

    return start


def test_another_transport() -> None:
    """Two processes that both have what this one has: the mean of equal gradients is each of them."""
    model, log = Net(), []
    sync = GradientSynchronizer(model.parameters(), start=started(log), processes=2)
    model(DATA).sum().backward()
    assert log == [sum(p.numel() for p in model.parameters())], "it travels when backward has ended"
    sync.reduce(weight=5)
    assert log[1:] == [1]
    assert distance(flat(model), alone()) < 1e-6


def test_two_backward_passes_without_no_sync_are_an_error() -> None:
    model = Net()
    sync = GradientSynchronizer(model.parameters(), start=started([]), processes=2)
    model(DATA).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"accumulated twice before reduce\(\): put every backward .* in `with no_sync\(\):`"
    ):
        model(DATA).sum().backward()
    del sync


def test_a_synchronizer_that_is_gone_listens_no_longer() -> None:
    model, log = Net(), []
    sync = GradientSynchronizer(model.parameters(), start=started(log), processes=2)
    del sync
    gc.collect()
    model(DATA).sum().backward()
    model(DATA).sum().backward()
    assert log == []
