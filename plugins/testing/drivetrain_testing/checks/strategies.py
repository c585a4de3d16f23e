"""What only strategies promise: windows that are not full, and states that fit every other strategy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drivetrain import Loss, Trainer
from drivetrain_testing.checks.runs import NoDropout
from drivetrain_testing.harness import Restore, state_after, tiny_data, weights
from drivetrain_testing.kit import check
from drivetrain_testing.processes import ProcessError, spawn_ranks
from drivetrain_testing.subject import Subject

_ROWS = 89  # of which windows of 32 leave 25 over: one rank has a microbatch less than the other, and one is not full
_NEAR = 1e-6  # of float64, after sums in another order
_HALF = 4


@check("strategy", processes=True)
def partial_windows_are_exact(subject: Subject) -> None:
    """Samples that count differently, in a step within which the data ends: the mean is over all of them, whichever rank has them."""
    first, second = _on_two_ranks(subject, _partial)
    alone = _partial(subject)
    _near(
        subject,
        [first, second],
        alone,
        "with samples of different weight, in a last window that is not full, a run of two ranks",
        "sum must be over all ranks, and reduce_gradients a mean over all of them, also over one that has nothing",
    )


@check("strategy", processes=True)
def states_fit_other_strategies(subject: Subject) -> None:
    """A run goes on without the strategy from a state that was saved with it, and the other way."""
    state, _ = _on_two_ranks(subject, _first_half)
    alone = _whole(subject)
    remedy = "give model_state and optimizer_state as one process without wrapping has them, and let load_… take just that"
    try:
        after = _second_half(subject, state)
    except Exception as error:
        subject.fail(f"one process does not take a state of two ranks: {type(error).__name__}: {error}", remedy)
    _near(subject, [after], alone, "a run that is moved from two processes to one", remedy)
    moved = _on_two_ranks(subject, _second_half, _first_half(subject))
    _near(subject, moved, alone, "a run that is moved from one process to two", remedy)


def _on_two_ranks(subject: Subject, function: Any, *arguments: Any) -> list[Any]:
    try:
        return spawn_ranks(function, subject, *arguments)
    except ProcessError as error:
        subject.fail(
            f"on two ranks it fails: {str(error)[-1500:]}", "use the process group that exists (ProcessGroupStrategy does)"
        )


def _near(subject: Subject, found: list[Tensor], alone: Tensor, what: str, remedy: str) -> None:
    away = max(float((one - alone).abs().max() / alone.abs().max()) for one in found)
    subject.require(away <= _NEAR, f"{what} ends {away:.1g} away from one process (rounding allows {_NEAR:g})", remedy)


def _trainer(subject: Subject, *callbacks: Any, **given: Any) -> Trainer:
    """With the strategy on ranks, without it in one process; the same samples in each step."""
    joined = torch.distributed.is_initialized()
    given = {"per_device_batch_size": 8 if joined else 16, "dtype": torch.float64} | given
    return (subject.trainer if joined else subject.plain_trainer)(NoDropout(), *callbacks, **given)


def _weighted(outputs: Tensor, targets: Tensor) -> Loss:
    """Targets above 0 count three times."""
    weight = 1.0 + 2.0 * (targets > 0)
    return Loss((weight * (outputs - targets).square()).sum(), weight.sum())


def _partial(subject: Subject) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        data = tiny_data(torch.float64, rows=_ROWS)
        unclipped = {"max_grad_norm": 1e9}  # clipping would hide a wrong factor
        trainer = _trainer(subject, gradient_accumulation_steps=2, train_dataset=data, steps=6, loss=_weighted, **unclipped)
        trainer.train()
    return weights(trainer)


def _whole(subject: Subject) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        trainer = _trainer(subject)
        trainer.train()
    return weights(trainer)


def _first_half(subject: Subject) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        return state_after(_trainer(subject), _HALF)


def _second_half(subject: Subject, state: dict[str, Any]) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        trainer = _trainer(subject, Restore(saved=state))
        trainer.train()
    return weights(trainer)
