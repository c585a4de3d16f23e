"""Ranks that meet over a store, played by threads of one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from drivetrain.meetings import Meetings


def ranks(count: int, patience: float = 60.0, hopeless: Callable[[], bool] = lambda: False) -> list[Meetings]:
    store = dist.HashStore()
    return [Meetings(store, rank, count, hopeless, patience) for rank in range(count)]


def run(found: list[Meetings], steps: int, wants: Callable[[int, int], bool], lag: Callable[[int], float]) -> list[list[int]]:
    """The steps after which each rank met, each going at its own pace and leaving at its end."""
    met: list[list[int]] = [[] for _ in found]

    def work(rank: int) -> None:
        for step in range(1, steps + 1):
            time.sleep(lag(rank))
            if found[rank].after_step(wants(rank, step)):
                met[rank].append(step)
        found[rank].leave()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not any(thread.is_alive() for thread in threads), "nobody waits for ever"
    return met


@pytest.mark.parametrize("caller", [0, 2])
@pytest.mark.parametrize("slow", [0, 1, 2])
def test_all_meet_after_the_same_step_however_far_one_is_ahead(caller: int, slow: int) -> None:
    met = run(ranks(3), 400, lambda rank, step: rank == caller and step == 20, lambda rank: 0.003 if rank == slow else 0.001)
    assert met[0] == met[1] == met[2]
    assert len(met[0]) == 1 and met[0][0] >= 20


def test_those_that_want_it_alike_meet_after_that_very_step() -> None:
    assert run(ranks(2), 60, lambda rank, step: step % 20 == 0, lambda rank: 0.002 * rank) == [[20, 40, 60]] * 2


def test_nobody_meets_when_nobody_wants_to() -> None:
    assert run(ranks(2), 50, lambda rank, step: False, lambda rank: 0.001) == [[], []]


def test_a_rank_that_has_left_keeps_nobody_waiting() -> None:
    """It was ahead, and the run is over for all at the same step; rank 0, who counts the answers, may be the one."""
    for gone in (0, 1):
        found = ranks(2)
        found[gone].leave()
        assert run([found[1 - gone]], 3, lambda rank, step: True, lambda rank: 0.0) == [[]]


def test_a_rank_that_cannot_answer_is_left_to_the_next_collective() -> None:
    first, second = ranks(2, hopeless=lambda: True)
    second._closed = True  # as if its process were gone: its thread answers nothing
    second._thread.join(10)
    began = time.monotonic()
    assert not first.after_step(True)
    assert not first.after_step(True), "and is not waited for again"
    assert time.monotonic() - began < 30
    first.leave()
