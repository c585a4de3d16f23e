"""The parts that the loop calls directly: schedules, precisions, strategies, trackers, modes, models, data."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from drivetrain import Strategy
from drivetrain_testing.harness import difference, tiny_model
from drivetrain_testing.kit import check
from drivetrain_testing.processes import ProcessError, spawn_ranks
from drivetrain_testing.subject import Subject

_LENGTHS = (1, 2, 7, 1000)


@check("scheduler")
def schedules_are_pure(subject: Subject) -> None:
    """The factor depends on the position alone, so that a resumed run goes on along the same curve."""
    schedule = _schedule(subject, 100)
    positions = [0, 1, 37, 50, 99]
    first = [schedule(position) for position in positions]
    again = [schedule(position) for position in reversed(positions)][::-1]
    subject.require(
        first == again,
        f"asked twice it says {first} and {again} for the positions {positions}",
        "compute the factor from the position alone; keep no counter",
    )
    wrong = [value for value in first if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0]
    subject.require(not wrong, f"it gives {wrong[:1]}", "return a finite number of at least 0, not a tensor")


@check("scheduler")
def schedules_fit_every_length(subject: Subject) -> None:
    """Runs of one step, of few and of many have a factor at every position, the end included."""
    for length in _LENGTHS:
        try:
            schedule = _schedule(subject, length)
            values = [schedule(position) for position in {0, 1, length // 2, length - 1, length}]
        except Exception as error:
            subject.fail(
                f"a run of {length} steps raises {type(error).__name__}: {error}",
                "mind divisions by the length of a warm-up or decay that can be 0",
            )
        bad = [value for value in values if not (math.isfinite(value) and value >= 0)]
        subject.require(not bad, f"a run of {length} steps gives the factor {bad[:1]}", "keep the factor within [0, its peak]")


@check("precision")
def precision_contexts_open_again(subject: Subject) -> None:
    """`forward()` is asked for once and entered for each microbatch."""
    context = subject.trainer().ctx.precision.forward()
    if context is None:
        return
    for _ in range(2):
        try:
            with context:
                pass
        except Exception as error:
            subject.fail(
                f"the context of forward() cannot be entered again: {type(error).__name__}: {error}",
                "return an object such as torch.autocast(...), not a @contextmanager generator",
            )


@check("precision")
def precision_keeps_what_is_trained(subject: Subject) -> None:
    """`cast` changes types: names, shapes and requires_grad stay."""
    model = tiny_model()
    next(iter(model.parameters())).requires_grad_(False)
    before = {name: (p.shape, p.requires_grad) for name, p in model.named_parameters()}
    cast = subject.trainer().ctx.precision.cast(model)
    after = {name: (p.shape, p.requires_grad) for name, p in cast.named_parameters()}
    subject.require(before == after, "cast changes names, shapes or requires_grad of the parameters", "use model.to(dtype)")


@check("precision")
def overflows_are_skipped(subject: Subject) -> None:
    """Where losses are scaled: gradients come back unscaled, and a step with infinite ones is left out."""
    trainer = subject.trainer()
    precision, optimizer = trainer.ctx.precision, trainer.ctx.optimizer
    if not precision.scales:
        return
    model = trainer.ctx.model
    first = next(iter(model.parameters()))
    loss = (first.float() * 2.0).sum()
    precision.scale(loss).backward()
    precision.unscale(optimizer)
    assert first.grad is not None
    right = torch.allclose(first.grad.float(), torch.full_like(first, 2.0).float(), rtol=1e-2)
    subject.require(
        right,
        "after scale, backward and unscale the gradients are not those of the loss",
        "unscale must divide every gradient by what scale multiplied the loss with",
    )
    before = deepcopy(model.state_dict())
    precision.step(optimizer)
    precision.scale(loss.detach().requires_grad_())
    first.grad = torch.full_like(first, math.inf)
    before = deepcopy(model.state_dict())
    precision.unscale(optimizer)
    applied = precision.step(optimizer)
    subject.require(
        applied is False and not difference(before, model.state_dict()),
        "a step with infinite gradients is not skipped",
        "step must return False and leave the weights when unscale found an infinite gradient",
    )


@check("strategy", processes=True)
def collectives_agree(subject: Subject) -> None:
    """On two ranks: sum adds, gather orders by rank, and both ends of the run can be repeated."""
    try:
        facts = spawn_ranks(_collectives, subject)
    except ProcessError as error:
        subject.fail(
            f"on two ranks it fails: {str(error)[-1500:]}", "use the process group that exists (ProcessGroupStrategy does)"
        )
    expected = [{"rank": rank, "world_size": 2, "sum": [3.0, 30.0], "gather": [0, 1]} for rank in (0, 1)]
    subject.require(
        facts == expected,
        f"two ranks see {facts}, not {expected}",
        "derive it from ProcessGroupStrategy, or define rank, world_size, sum and gather over all ranks",
    )


@check("strategy", processes=True)
def weights_keep_their_names(subject: Subject) -> None:
    """A checkpoint of this strategy fits every other: the names are the unwrapped model's."""
    try:
        (found, wanted, error), _ = spawn_ranks(_names, subject)
    except ProcessError as failure:
        subject.fail(
            f"on two ranks it fails: {str(failure)[-1500:]}", "use the process group that exists (ProcessGroupStrategy does)"
        )
    subject.require(
        found == wanted,
        f"model_state has names such as {found[:2]}, the model {wanted[:2]}",
        "return the inner model's state_dict, without what wrapping adds",
    )
    subject.require(not error, f"load_model_state refuses what model_state gave: {error}", "load into the inner model")


@check("tracker")
def trackers_close_in_any_order(subject: Subject) -> None:
    """`close` is called after a `start` that failed as well, a step may come twice, a text may have any characters."""
    tracker, context = subject.fresh(), subject.plain_trainer().ctx
    step = "close without start"
    try:
        tracker.close()
        step = "log, text and close after start"
        tracker.start(context)
        tracker.log({"train/loss": 1.0, "odd name é": math.nan}, 1)
        tracker.log({"eval/loss": math.inf}, 1)
        tracker.text("config", "line\n<b>é</b>\n", 1)
        tracker.close()
        step = "a second close"
        tracker.close()
    except Exception as error:
        subject.fail(
            f"{step} raises {type(error).__name__}: {error}",
            "let close do nothing when there is nothing to close, and log take any finite or infinite number",
        )


@check("mode")
def something_is_left_to_train(subject: Subject) -> None:
    """After preparation some parameter requires a gradient, and a step moves it."""
    trainer = subject.trainer(steps=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    moved = [name for name, old in before.items() if not torch.equal(old, after[name].detach())]
    subject.require(
        moved,
        f"none of {len(before)} trainable parameters moves",
        "return the module with its adapters in place from make_adapted_model, their requires_grad set",
    )


@check("model")
def models_follow_the_seed(subject: Subject) -> None:
    """The same seed builds the same weights, another seed others."""
    rows = [_row(subject.trainer(seed=seed).model) for seed in (3, 3, 4)]
    subject.require(
        torch.equal(rows[0], rows[1]),
        "the same seed builds different weights",
        "initialise with torch's global generators, which are seeded for make_model",
    )
    subject.require(
        not torch.equal(rows[0], rows[2]), "another seed builds the same weights", "set no seed in the model itself"
    )


@check("dataset")
def samples_are_the_same_again(subject: Subject) -> None:
    """Made twice the data has the same samples; sample i does not depend on what was read before it."""
    one, two = (subject.trainer().ctx.run.source.data for _ in range(2))
    if not hasattr(one, "__getitem__"):
        pairs = list(zip(_some(one), _some(two), strict=True))
    else:
        indices = range(min(len(one), 8))
        forward = {i: _sample(one, i) for i in indices}
        backward = {i: _sample(two, i) for i in reversed(indices)}
        subject.require(len(one) == len(two), f"made twice it has {len(one)} and {len(two)} samples", "read the same files")
        pairs = [(forward[i], backward[i]) for i in indices]
    for index, (a, b) in enumerate(pairs):
        if where := difference(a, b, f"sample {index}"):
            subject.fail(
                f"made or read again it is another: {where}",
                "compute sample i from i alone, and draw random numbers from "
                "the global generators, which are seeded for each sample",
            )


def _schedule(subject: Subject, length: int) -> Any:
    return subject.trainer(steps=length).ctx.run.loop.schedule


def _collectives(subject: Subject) -> dict[str, Any]:
    strategy: Strategy = subject.trainer().ctx.strategy
    total = strategy.sum(torch.tensor([1.0, 10.0]) * (strategy.rank + 1)).tolist()
    gathered = strategy.gather(strategy.rank)
    strategy.barrier()
    strategy.teardown()
    strategy.teardown()
    return {"rank": strategy.rank, "world_size": strategy.world_size, "sum": total, "gather": gathered}


def _names(subject: Subject) -> tuple[list[str], list[str], str]:
    trainer = subject.trainer()
    strategy, model = trainer.ctx.strategy, trainer.ctx.model
    state = strategy.model_state(model)
    try:
        strategy.load_model_state(model, state)
    except Exception as error:
        return sorted(state), sorted(tiny_model().state_dict()), f"{type(error).__name__}: {error}"
    return sorted(state), sorted(tiny_model().state_dict()), ""


def _some(data: Any) -> list[Any]:
    return [sample for _, sample in zip(range(8), data, strict=False)]


def _sample(data: Any, index: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(index)
        return data[index]


def _row(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().float().reshape(-1).clone() for p in model.parameters()])
