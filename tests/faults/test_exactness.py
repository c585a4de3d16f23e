"""However often a run is stopped, and wherever, it ends with the weights and has seen the samples of the uninterrupted one.

The whole grid is `nox -s trials`; the quick suite takes a part in which every two values of different rows meet.
"""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import nn

from drivetrain import (
    Callback,
    CallbackContext,
    CheckpointCallback,
    DrivetrainError,
    Trainer,
    TrainingConfig,
    component,
    hook,
    option,
    state,
)

SAMPLES, EPOCHS = 26, 3  # 7 microbatches of 4, the last one of 2: 7 steps in an epoch, or 3 when three are accumulated
PLACES = ("mid-epoch", "last batch", "epoch end", "evaluation")


class Case(NamedTuple):
    """One cell of the grid."""

    shuffle: bool
    dropout: bool
    augmentation: bool
    workers: int
    accumulation: int
    place: str
    resumes: int

    @property
    def id(self) -> str:
        words = [word for word in ("shuffle", "dropout", "augmentation") if getattr(self, word)]
        return "-".join([*words, f"w{self.workers}", f"a{self.accumulation}", self.place.replace(" ", "_"), f"x{self.resumes}"])

    @property
    def steps_per_epoch(self) -> int:
        return 7 if self.accumulation == 1 else 3

    def stops(self) -> list[int]:
        """The steps after which the run is interrupted; two in one epoch where the place allows it."""
        n = self.steps_per_epoch
        places = {
            "mid-epoch": [1, 2, n + 2],
            "last batch": [n - 1, 2 * n - 1, 2 * n + 1],
            "epoch end": [n, 2 * n, 2 * n + 1],
            "evaluation": [2, 4, 8],  # every second step is followed by one
        }
        return places[self.place][: self.resumes]


GRID = [Case(*values) for values in itertools.product(*[(True, False)] * 3, (0, 2), (1, 3), PLACES, (1, 2, 3))]


def pairwise(cases: Iterable[Case]) -> list[Case]:
    """A few of the cases in which every pair of values of two rows occurs: greedily, the one with most new pairs first."""
    cases = list(cases)
    pairs = {case: {(i, j, case[i], case[j]) for i, j in itertools.combinations(range(len(case)), 2)} for case in cases}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs[case] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return chosen


QUICK = pairwise(GRID)


class Rows:
    """Every sample another one; its index is in it."""

    def __init__(self, augmentation: bool) -> None:
        self.augmentation = augmentation

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.rand(3) if self.augmentation else torch.zeros(3)
        return torch.cat([torch.tensor([float(index)]), noise + index / SAMPLES]), torch.tensor([index % 5 / 5])


class Net(nn.Module):
    def __init__(self, dropout: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5 if dropout else 0.0), nn.Linear(8, 1))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layers(rows[:, 1:])


@component
class Interrupt(Callback):
    """Stops the run after a step, or in the middle of the evaluation that follows it."""

    at: int | None = option(default=None)
    in_evaluation: bool = option(default=False)

    @hook(tryfirst=True)
    def on_step_end(self, ctx: CallbackContext) -> None:
        if ctx.step == self.at and not self.in_evaluation:
            ctx.trainer.stop("interrupted")

    def on_evaluate_batch(self, ctx: CallbackContext) -> None:
        if ctx.step == self.at and self.in_evaluation:
            ctx.trainer.stop("interrupted in an evaluation")


@component
class Average(Callback):
    """Changes the training by what it has counted: a component with state."""

    count: int = state(default=0)

    def on_gradients(self, ctx: CallbackContext) -> None:
        self.count += 1
        for parameter in ctx.model.parameters():
            parameter.grad.mul_(1 + 1 / (1 + self.count))


@component
class Order(Callback):
    """Remembers which samples were in which step, what was logged after it and what its evaluation gave."""

    def on_run_start(self, ctx: CallbackContext) -> None:
        self.seen: dict[Any, Any] = {}

    def on_step_end(self, ctx: CallbackContext) -> None:
        self.seen[ctx.step] = [int(i) for x, _ in ctx.window for i in x[:, 0]]

    def on_log(self, ctx: CallbackContext) -> None:
        self.seen["logged", ctx.step] = dict(ctx.metrics)

    @hook(trylast=True)
    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        self.seen["evaluated", ctx.step] = dict(ctx.eval_metrics)


def sitting(folder: Path, case: Case, at: int | None, *more: Callback) -> tuple[Trainer, dict[Any, Any]]:
    """One process's part of a run: the same call each time, but for when it is interrupted."""
    torch.manual_seed(3)
    model = Net(case.dropout)
    order = Order()
    config = TrainingConfig(
        max_duration=f"{EPOCHS}ep",
        per_device_batch_size=4,
        gradient_accumulation_steps=case.accumulation,
        eval_interval="2st",
        log_interval="3st",
        dataloader={"shuffle": case.shuffle, "num_workers": case.workers},
        output_dir=folder,
        run_name="a",
        device="cpu",
        standard_callbacks=False,
    )
    trainer = Trainer(
        model,
        config,
        Rows(case.augmentation),
        Rows(case.augmentation),
        loss=nn.MSELoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.02),
        scheduler=lambda position: 1 / (1 + position),
        callbacks=[Interrupt(at=at, in_evaluation=case.place == "evaluation"), Average(), order, CheckpointCallback(), *more],
    )
    trainer.train()
    return trainer, order.seen


def final(trainer: Trainer) -> dict[str, Any]:
    """Everything that must be equal in the end."""
    saved = trainer.state_dict()
    del saved["manifest"], saved["progress"]["seconds"]
    saved["components"].pop("callback:CheckpointCallback", None)
    return saved


def equal(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@cache
def reference(folder: Path, case: Case) -> tuple[dict[str, Any], dict[Any, Any]]:
    """The uninterrupted run with the same settings; workers and where others are interrupted do not matter to it."""
    trainer, seen = sitting(folder / "reference" / case.id, case, None)
    return final(trainer), seen


def interrupted(folder: Path, case: Case, *more: Callback) -> tuple[dict[str, Any], dict[Any, Any]]:
    seen: dict[Any, Any] = {}
    for at in [*case.stops(), None]:
        trainer, part = sitting(folder, case, at, *more)
        assert trainer.output.completed == (at is None)
        assert at is None or trainer.ctx.step == at
        seen |= part
    return final(trainer), seen


@pytest.fixture(scope="module")
def kept(tmp_path_factory: Any) -> Path:
    return tmp_path_factory.mktemp("exactness")


def check(kept: Path, folder: Path, case: Case) -> None:
    expected, order = reference(kept, case._replace(workers=0, place="mid-epoch", resumes=0))
    found, seen = interrupted(folder, case)
    assert seen == order
    assert equal(found, expected)


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.id)
def test_a_part_of_the_grid(kept: Path, tmp_path: Path, case: Case) -> None:
    check(kept, tmp_path, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in GRID if case not in QUICK], ids=lambda case: case.id)
def test_the_rest_of_the_grid(kept: Path, tmp_path: Path, case: Case) -> None:
    check(kept, tmp_path, case)


@pytest.mark.parametrize("workers", [(0, 2, 0), (2, 0, 2)], ids=str)
def test_other_numbers_of_workers_in_each_sitting(kept: Path, tmp_path: Path, workers: tuple[int, ...]) -> None:
    case = Case(True, True, True, 0, 1, "mid-epoch", 2)
    expected, order = reference(kept, case._replace(resumes=0))
    seen: dict[Any, Any] = {}
    for number, at in zip(workers, [*case.stops(), None], strict=True):
        trainer, part = sitting(tmp_path, case._replace(workers=number), at)
        seen |= part
    assert trainer.ctx.resumed and seen == order
    assert equal(final(trainer), expected)


def test_what_is_compared_holds_logs_and_evaluations(kept: Path) -> None:
    _, seen = reference(kept, Case(True, True, True, 0, 1, "mid-epoch", 0))
    assert {key for key in seen if isinstance(key, int)} == set(range(1, 22))
    assert {step for what, step in (key for key in seen if not isinstance(key, int)) if what == "logged"} == set(
        range(3, 22, 3)
    )
    assert ("evaluated", 21) in seen and ("evaluated", 2) in seen


def test_the_quick_part_has_every_pair_of_values() -> None:
    for i, j in itertools.combinations(range(len(Case._fields)), 2):
        assert {(c[i], c[j]) for c in QUICK} == {(c[i], c[j]) for c in GRID}
    assert len(QUICK) < 30


# -- negative controls: without any one part of the state the test above would fail --------------------------------------------

AT = 9  # in the second epoch, after evaluations, with gradients that have overflowed


@component
class Forget(Callback):
    """Puts a part of the state back to what a fresh run has, after it was restored from the checkpoint."""

    part: Any

    @hook(tryfirst=True)
    def on_restore(self, ctx: CallbackContext) -> None:
        load, fresh = ctx.load_state_dict, ctx.state_dict()

        def forgetful(saved: Any) -> None:
            inner, source = saved, fresh
            for key in self.part[:-1]:
                inner, source = inner[key], source[key]
            inner[self.part[-1]] = source[self.part[-1]]
            load(saved)

        ctx.load_state_dict = forgetful  # type: ignore[method-assign]


@component
class Jitter(Callback):
    """Changes the gradients by numbers from the generators of Python and NumPy."""

    def on_gradients(self, ctx: CallbackContext) -> None:
        factor = 1 + random.random() + float(numpy.random.rand())
        for parameter in ctx.model.parameters():
            parameter.grad.mul_(factor)


@component
class Score(Callback):
    """A metric that is best at the first evaluation: only who remembers knows."""

    @hook(tryfirst=True)
    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        ctx.eval_metrics["eval/score"] = 1 / ctx.step


@component
class Tell(Callback):
    """Hands a value over for the next log, after the steps that are divisible by three."""

    def on_step_end(self, ctx: CallbackContext) -> None:
        if ctx.step % 3 == 0:
            ctx.log({f"told/{ctx.step}": 0.5})


def everything(folder: Path, at: int | None, *more: Callback, optimizer: str = "adamw") -> dict[str, Any]:
    """A sitting with every kind of state there is, and the state at its end. Scaled gradients overflow in its first steps."""
    torch.manual_seed(3)
    averages = [] if optimizer.startswith("schedulefree") else [{"use": "ema", "decay": 0.9}]
    config = TrainingConfig(
        max_duration="12st",
        per_device_batch_size=4,
        eval_interval="2st",
        log_interval="4st",
        precision="fp16",
        optimizer={"use": optimizer, "lr": 0.02},
        scheduler="constant" if optimizer.startswith("schedulefree") else "linear",
        callbacks=[{"use": "early_stopping", "monitor": "eval/score", "mode": "max", "patience": 99}, *averages],
        output_dir=folder,
        run_name="a",
        device="cpu",
        standard_callbacks=False,
    )
    saving = CheckpointCallback(best="eval/score", best_mode="max", keep_last=1)
    order = Order()
    callbacks = [Score(), Interrupt(at=at), Average(), Jitter(), Tell(), order, saving, *more]
    trainer = Trainer(Net(True), config, Rows(True), Rows(False), loss=nn.MSELoss(), callbacks=callbacks)
    trainer.train()
    state = trainer.state_dict()
    del state["manifest"], state["progress"]["seconds"]
    return state | {"seen": {key: value for key, value in order.seen.items() if key in (AT + 1, ("logged", 12))}}


def items(value: Any, path: tuple[Any, ...] = (), depth: int = 3) -> Iterator[tuple[Any, ...]]:
    """The places of the items of a state: tensors, counters, and whole tables below the third level."""
    by_rank = isinstance(value, list) and path in (("rng",), ("unlogged",))
    keys = value if isinstance(value, dict) else range(len(value)) if by_rank else ()
    if not keys or len(path) == depth or path[:1] == ("model",) or path == ("optimizer", "state"):
        yield path
        return
    for key in keys:
        yield from items(value[key], (*path, key), depth)


STOPPING, SAVING = "callback:early_stopping", "callback:CheckpointCallback"
PARTS: list[tuple[Any, ...]] = [
    ("model",),
    ("model", "layers.0.weight"),
    ("model", "layers.1.running_mean"),
    ("model", "layers.1.num_batches_tracked"),
    ("optimizer", "state"),
    ("precision", "scale"),
    ("precision", "growth_tracker"),
    ("progress", "step"),  # also the position of the schedule
    ("progress", "epoch"),
    ("progress", "step_in_epoch"),
    ("progress", "samples"),
    ("progress", "skipped_steps"),
    ("rng", 0, "python"),
    ("rng", 0, "numpy"),
    ("rng", 0, "torch"),
    ("unlogged", 0, "losses"),
    ("unlogged", 0, "values"),
    ("components", "callback:Average", "count"),
    ("components", "callback:ema", "averages"),
    ("components", "callback:ema", "updates"),
    ("components", STOPPING, "best"),
    ("components", STOPPING, "best_step"),
    ("components", STOPPING, "misses"),
    ("components", SAVING, "best_value"),
    ("components", SAVING, "best_step"),
]
WITHOUT_EFFECT_HERE = {  # each has its control in test_exact_results.py, where it has one
    ("progress", "tokens"): "the data has no tokens: 0",
    ("progress", "microbatch_parts"): "1 as long as memory suffices; tests/core/test_shrinking.py has the control",
    ("progress", "evaluated_at"): "renewed by each evaluation",
    ("progress", "metrics", "logged"): "renewed by each log",
    ("progress", "metrics", "eval"): "renewed by each evaluation",
    ("unlogged", 0, "grad_norm"): "renewed by each step",
    ("unlogged", 0, "folded"): "0: fewer than 1024 losses wait for a log",
    ("unlogged", 0, "consecutive_skips"): "its 100th ends a run",
    ("optimizer", "param_groups"): "AdamW keeps nothing in them; schedule-free optimizers do, below",
    ("components", "callback:ema", "weights"): "None outside of evaluations",
    ("components", STOPPING, "looked_at"): "renewed by each evaluation",
    ("components", STOPPING, "stopped"): "None until it has stopped",
    ("components", SAVING, "metric_seen"): "renewed by each evaluation",
    ("components", SAVING, "started_from"): "None in a run that began at no other",
}


@pytest.fixture(scope="module")
def begun(kept: Path) -> Path:
    """A run that was interrupted."""
    everything(kept / "begun", AT)
    return kept / "begun"


@pytest.fixture(scope="module")
def whole(kept: Path) -> Any:
    """The end of the same run without an interruption."""
    return everything(kept / "whole", None)


def test_with_every_part_it_is_equal(begun: Path, whole: Any, tmp_path: Path) -> None:
    assert equal(everything(shutil.copytree(begun, tmp_path / "run"), None), whole)
    assert whole["progress"]["skipped_steps"] > 0


@pytest.mark.parametrize("part", PARTS, ids=lambda part: ".".join(map(str, part)))
def test_negative_control_without_a_part_it_is_not(begun: Path, whole: Any, tmp_path: Path, part: tuple[Any, ...]) -> None:
    try:
        end = everything(shutil.copytree(begun, tmp_path / "run"), None, Forget(part=part))
    except DrivetrainError as error:  # noticed, which is as good
        assert "another process was at work" in str(error)
    else:
        assert not equal(end, whole)


def test_there_is_a_control_for_every_part(whole: Any) -> None:
    assert set(items({key: value for key, value in whole.items() if key != "seen"})) == {
        part for part in PARTS if part[:1] != ("model",) or len(part) == 1
    } | set(WITHOUT_EFFECT_HERE)


@pytest.mark.parametrize("part", [None, ("optimizer", "param_groups"), ("optimizer", "state")], ids=str)
def test_averages_within_an_optimizer(tmp_path: Path, part: tuple[Any, ...] | None) -> None:
    """Schedule-free: weights are at another point while training than at the end, and the groups hold sums."""
    end = everything(tmp_path / "whole", None, optimizer="schedulefree_adamw")
    everything(tmp_path / "run", AT, optimizer="schedulefree_adamw")
    forget = [] if part is None else [Forget(part=part)]
    assert equal(everything(tmp_path / "run", None, *forget, optimizer="schedulefree_adamw"), end) is (part is None)
