"""Trainers inside other programs: several at once, in threads, and nothing changed in the process that nobody asked for."""

from __future__ import annotations

import copy
import gc
import logging
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from drivetrain import Callback, CallbackContext, Precision, Trainer, TrainingConfig, component, option, rng


@component
class Noise(Callback):
    """Takes part in the training with random numbers of Python's and torch's global generators."""

    size: float = option(default=1e-3, help="of the noise on the gradients")

    def on_gradients(self, ctx: CallbackContext) -> None:
        for parameter in ctx.model.parameters():
            assert parameter.grad is not None
            parameter.grad += self.size * random.random() * torch.randn_like(parameter)


class Augmented(torch.utils.data.Dataset[Any]):
    """Samples with noise that the engine seeds by position."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = torch.full((6,), index / 40) + 0.1 * torch.randn(6)
        return row, row.sum(0, keepdim=True)


def make(seed: int, *callbacks: Callback, optimizer: Callable[..., Any] = torch.optim.SGD) -> Trainer:
    generator = torch.Generator().manual_seed(seed)
    # made without a draw from the global generators, which may be another run's at the moment
    model = nn.Sequential(skip_init(nn.Linear, 6, 16), nn.Dropout(0.5), nn.Tanh(), skip_init(nn.Linear, 16, 1))
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    config = TrainingConfig(
        max_duration="12st", per_device_batch_size=4, seed=seed, standard_callbacks=False, eval_interval="4st", device="cpu"
    )
    optimizer = optimizer(model.parameters(), lr=0.01)
    return Trainer(
        model,
        config,
        Augmented(),
        Augmented(),
        loss=nn.MSELoss(),
        optimizer=optimizer,
        callbacks=callbacks,
        precision=Precision(),
    )


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])


MAKERS: list[Callable[[], Trainer]] = [
    lambda: make(1, Noise()),
    lambda: make(2, Noise(size=0.1), optimizer=torch.optim.AdamW),
    lambda: make(3, optimizer=torch.optim.RMSprop),
]


def alone(maker: Callable[[], Trainer]) -> Tensor:
    trainer = maker()
    trainer.train()
    return weights(trainer)


def in_threads(makers: list[Callable[[], Trainer]]) -> list[Tensor]:
    """Runs at the same time; at each step every thread waits for the others, so that none is done before another begins."""
    barrier, found = threading.Barrier(len(makers), timeout=60), [torch.empty(0)] * len(makers)

    def train(index: int) -> None:
        trainer = makers[index]()
        for _ in trainer.steps():
            barrier.wait()
        found[index] = weights(trainer)

    threads = [threading.Thread(target=train, args=(index,)) for index in range(len(makers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_trainers_in_threads_equal_their_solo_runs() -> None:
    solo = [alone(maker) for maker in MAKERS]
    for _ in range(3):
        together = in_threads(MAKERS)
        assert all(torch.equal(one, other) for one, other in zip(solo, together, strict=True))


def test_without_turns_they_would_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the same threads with one shared stream of random numbers."""
    solo = [alone(maker) for maker in MAKERS]
    monkeypatch.setattr("drivetrain.trainer.in_turns", lambda turn, steps: steps)
    together = in_threads(MAKERS)
    assert not all(torch.equal(one, other) for one, other in zip(solo, together, strict=True))


def test_the_recipe_of_the_page_gives_solo_numbers_every_time() -> None:
    """docs/tutorials/embed.md, "Several at once": what it defines, many times."""
    page = (Path(__file__).parents[2] / "docs" / "tutorials" / "embed.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^# several\.py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "several"}
    recipe = recipe.replace('optimizer="sgd"', "optimizer=torch.optim.SGD(model.parameters(), lr=0.01)")  # with the core alone
    exec(compile(recipe, "several.py", "exec"), names)
    seeds = [1, 2, 3]
    solo = [names["build"](seed).train().loss for seed in seeds]
    assert len(set(solo)) == 3
    for _ in range(10):
        assert names["together"](seeds) == solo


def test_trainers_in_one_thread_may_take_turns() -> None:
    solo = [alone(maker) for maker in MAKERS]
    torch.manual_seed(77)
    expected = torch.rand(3)
    torch.manual_seed(77)
    trainers = [maker() for maker in MAKERS]
    for _ in zip(*(trainer.steps() for trainer in trainers), strict=True):
        pass
    assert all(torch.equal(one, weights(trainer)) for one, trainer in zip(solo, trainers, strict=True))
    assert torch.equal(torch.rand(3), expected), "the caller's random state is as it was"


@pytest.mark.parametrize("taken", ["between steps", "after the end", "before going on"])
def test_a_state_has_the_random_numbers_of_its_own_run(taken: str) -> None:
    """Whoever has the generators when it is taken: another trainer, or the caller."""
    solo = alone(MAKERS[0])
    one, other = MAKERS[0](), MAKERS[1]()
    steps, others = one.steps(), other.steps()
    for _ in range(5):
        next(steps), next(others)
    if taken == "after the end":
        steps.close()
    saved = copy.deepcopy(one.state_dict())
    others.close()
    if taken == "before going on":
        steps.close()
        between = MAKERS[0]()
        between.load_state_dict(saved)
        torch.rand(3)
        saved = copy.deepcopy(between.state_dict())
    second = MAKERS[0]()
    second.load_state_dict(saved)
    second.train()
    assert torch.equal(weights(second), solo)


def test_runs_may_change_places_while_left_ones_are_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A left run that a cycle keeps ends in the middle of whatever makes an object, such as a change of turns."""
    solo = [alone(maker) for maker in MAKERS[:2]]
    get, thresholds = rng._get, gc.get_threshold()

    def leave() -> None:
        steps = make(3).steps()
        next(steps)
        cycle: list[Any] = [steps]
        cycle.append(cycle)

    def collecting(generator: Any) -> Any:
        if gc.isenabled():  # as the collector may by itself
            gc.collect()
        return get(generator)

    gc.collect()
    gc.set_threshold(0)
    try:
        monkeypatch.setattr(rng, "_get", collecting)
        trainers = [maker() for maker in MAKERS[:2]]
        for number, _ in enumerate(zip(*(trainer.steps() for trainer in trainers), strict=True)):
            if number == 3:
                leave()
    finally:
        gc.set_threshold(*thresholds)
    assert all(torch.equal(one, weights(trainer)) for one, trainer in zip(solo, trainers, strict=True))


def test_a_run_inside_another_ones_callback_disturbs_neither() -> None:
    @component
    class Inner(Callback):
        def on_step_start(self, ctx: CallbackContext) -> None:
            if ctx.step == 5:
                self.found = alone(MAKERS[1])

    inner = Inner()
    outer = make(1, inner, Noise())
    outer.train()
    assert torch.equal(weights(outer), alone(MAKERS[0]))
    assert torch.equal(inner.found, alone(MAKERS[1]))


def test_a_run_that_fails_or_is_left_hands_the_generators_back() -> None:
    @component
    class Fail(Callback):
        def on_step_end(self, ctx: CallbackContext) -> None:
            raise ZeroDivisionError

    solo = alone(MAKERS[0])
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        make(1, Fail()).train()
    for _ in make(1).steps():
        break
    assert torch.equal(torch.get_rng_state(), state)
    assert (rng._holders, rng._nested) == ({}, [])
    assert {run for _, run in rng._states} <= {None}
    assert torch.equal(alone(MAKERS[0]), solo)


@contextmanager
def process_unchanged() -> Iterator[None]:
    def facts() -> list[Any]:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        loggers = [logging.root.level, list(logging.root.handlers), list(logging.getLogger("drivetrain").handlers)]
        return [handlers, loggers, torch.get_default_dtype(), torch.is_grad_enabled(), threading.active_count(), sys.excepthook]

    before = facts()
    yield
    assert facts() == before


def test_no_signal_handler_no_logging_no_thread_no_output(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with process_unchanged():
        alone(MAKERS[0])
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_the_same_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Also at import and at exit, where this process may have done it before."""
    code = (
        "import logging, signal\nbefore = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)\n"
        "import torch\nfrom torch import nn\nfrom drivetrain import Trainer, TrainingConfig\n"
        "model = nn.Linear(2, 1)\nconfig = TrainingConfig(max_duration='3st', standard_callbacks=False)\n"
        "data = [(torch.ones(2), torch.ones(1))] * 8\n"
        "Trainer(model, config, data, loss=nn.MSELoss(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1)).train()\n"
        "assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before\n"
        "assert not logging.root.handlers and not logging.getLogger('drivetrain').handlers\n"
    )
    torch_itself = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, text=True, cwd=tmp_path).stderr
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", torch_itself)
    assert list(tmp_path.iterdir()) == []
