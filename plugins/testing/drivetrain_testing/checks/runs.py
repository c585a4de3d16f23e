"""Whole runs: that they end well, end the same after a kill, on two ranks, and leave nothing behind."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from drivetrain import Callback, CallbackContext, DrivetrainError, Trainer, component, hook
from drivetrain.hookspecs import HOOKS
from drivetrain_testing.harness import Restore, difference, final_state, state_after, tiny_data, weights
from drivetrain_testing.kit import COMPONENTS, check
from drivetrain_testing.processes import GlooStrategy, ProcessError, kill_and_resume, spawn_ranks
from drivetrain_testing.subject import Subject
from drivetrain_testing.watching import fields_kept_by

_STATEFUL = tuple(kind for kind in COMPONENTS if kind != "dataset")
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4}


@check(*COMPONENTS)
def trains(subject: Subject) -> None:
    """A tiny run with logs and evaluations comes to its end."""
    try:
        output = _busy(subject).train()
    except Exception as error:
        notes = " ".join(getattr(error, "__notes__", ()))
        subject.fail(
            f"a tiny run fails: {type(error).__name__}: {error} {notes}",
            "make a run of a small model on a CPU work; give "
            "the kit a model and data that suit the plugin (model=, data=) if its own do not",
        )
    subject.require(
        output.steps == 8,
        f"the run ended after {output.steps} of 8 steps: {output.stop_reason}",
        "a plugin that ends runs must not end one in which it has no reason to: loosen the options given to the kit",
    )


@check(*(kind for kind in COMPONENTS if kind != "tracker"))
def errors_name_the_plugin(subject: Subject) -> None:
    """What goes wrong inside one of its hooks ends the run, as what it is, and with the plugin's name."""
    for name in (name for name in HOOKS if callable(getattr(subject.cls, name, None))):
        thing, context = subject.fresh(), _FailingContext()
        _plant(thing, name, context)
        raised = _raised_by(subject, thing=thing)
        if not context.read:  # it was not called, or needs nothing that could fail
            continue
        if raised is None:
            subject.fail(
                f"an error inside {name} is hidden: the run goes on",
                "catch only the exceptions that you expect, by their types, and not around calls of ctx",
            )
        chain = list(_chain(raised))
        subject.require(
            any(isinstance(error, _Planted) for error in chain),
            f"an error inside {name} comes out as {type(raised).__name__}: {raised}",
            "raise … from error, so that what happened is not lost",
        )
        said = "".join(f"{error} {getattr(error, '__notes__', '')}" for error in chain)
        subject.require(
            f"raised in {name} of {subject.kind}:" in said,
            f"an error inside {name} does not say whose it is",
            "leave plugin_name and origin to the run, which sets them and notes them on every error",
        )


@check(*COMPONENTS)
def failures_pass_through(subject: Subject) -> None:
    """A run that something else ends fails with that error alone: hooks of the end expect nothing of the run."""
    raised = _raised_by(subject, _Fails())
    if raised is None:
        subject.fail("a run that fails ends as if it had not", "let exceptions pass")
    if not isinstance(raised, _Planted):
        raise raised  # for the kit to report: this run fails in another way
    others = [note for note in getattr(raised, "__notes__", ()) if note.startswith("after that, ")]
    subject.require(
        not others,
        f"when something else ends the run it fails too: {' '.join(others).removeprefix('after that, ')}",
        "on_exception and on_run_end come after any step, also before the first log and evaluation: look before reading",
    )


@check("optimizer")
def lowers_the_loss(subject: Subject) -> None:
    """60 steps on a regression end with a lower loss than they began with."""
    trainer = subject.trainer(steps=60, scheduler=lambda position: 1.0)
    data = tiny_data() if subject.data is None else subject.data()
    before = trainer.evaluate(data)["eval/loss"]
    trainer.train()
    after = trainer.evaluate(data)["eval/loss"]
    subject.require(
        after < before,
        f"60 steps took the loss from {before:.4g} to {after:.4g}",
        "check the sign of the update; give the kit options (the learning rate above all) with which it learns",
    )


@check(*_STATEFUL)
def state_is_plain(subject: Subject) -> None:
    """State that a checkpoint can keep without pickle: dicts, lists, numbers, texts, None and tensors."""
    trainer = subject.trainer()
    trainer.train()
    state = {key: value for key, value in final_state(trainer).items() if key in ("components", "precision", "optimizer")}
    if where := _not_plain(state):
        subject.fail(
            f"its state holds {where}", "keep only dicts, lists, tuples, numbers, texts, None and tensors in state_dict"
        )


@check(*_STATEFUL)
def resumes_bit_equal(subject: Subject) -> None:
    """A run that goes on from a saved state ends as the run that was never interrupted, bit for bit."""
    straight, again, first = (subject.trainer() for _ in range(3))
    straight.train()
    again.train()
    second = subject.trainer(Restore(saved=state_after(first, 4)))
    second.train()
    _compare(subject, final_state(second), final_state(straight), final_state(again))


@check(*_STATEFUL, processes=True)
def a_killed_run_resumes_bit_equal(subject: Subject) -> None:
    """The same with processes: SIGKILL in the middle of step 6, on from what was saved after step 4."""
    _require_pickle(subject)
    try:
        found = kill_and_resume(_build, subject)
    except ProcessError as error:
        subject.fail(
            f"a run in a process of its own fails: {error}", "what a process needs must be made in hooks, from options"
        )
    again = subject.trainer()  # in this process: enough to tell clocks and ids, which no two runs share, from state
    again.train()
    _compare(subject, found.resumed, found.straight, found.straight | {"components": final_state(again)["components"]})


@check(*COMPONENTS, processes=True)
def two_ranks_equal_one(subject: Subject) -> None:
    """Two processes with half of each step's samples end with the same weights, those of one process up to rounding."""
    _require_pickle(subject)
    try:
        first, second = spawn_ranks(_weights, subject, 8)
    except ProcessError as error:
        subject.fail(
            f"a run on two ranks fails: {str(error)[-1500:]}",
            "every rank must take part in every collective: ask ctx.is_main only around printing and writing",
        )
    alone = _weights(subject, 16)
    subject.require(
        torch.equal(first, second),
        "after a run on two ranks their weights differ",
        "decide nothing by one rank's own "
        "values; put them together with ctx.strategy.sum first (only in on_log, on_evaluate_end or on_every)",
    )
    tolerance = _TOLERANCE.get(_compute_type(subject), 0.1)
    away = float((first - alone).abs().max() / alone.abs().max().clamp(min=1e-12))
    subject.require(
        away <= tolerance,
        f"two ranks end {away:.1g} away from one with the same global batch (rounding allows {tolerance:g})",
        "gradients must be means over all ranks, and nothing may depend on the rank, the number of "
        "ranks or the size of a microbatch",
    )


@check("callback", "tracker")
def leaves_training_alone(subject: Subject) -> None:
    """With the plugin the run ends with the same weights and the same random state as without it."""
    ends = _End(), _End()
    watched, plain = _busy(subject, ends[0]), _busy(subject, ends[1], plain=True)
    watched.train()
    plain.train()
    subject.require(
        torch.equal(weights(watched), weights(plain)),
        "with it a run ends with other weights than without it",
        "observe only: clone tensors before changing them, and draw random numbers from a torch.Generator of your "
        'own; a plugin that is meant to change the training says unsupported={"leaves_training_alone": …}',
    )
    if where := difference(ends[0].random, ends[1].random):
        subject.fail(
            f"it uses up random numbers of the training ({where.partition(' ')[0]})",
            "draw from a torch.Generator or random.Random of your own",
        )


@check(*COMPONENTS)
def runs_share_nothing(subject: Subject) -> None:
    """What a run leaves in the class would reach the next run, and one in another thread."""
    before = {name: pickle.dumps(value) for name, value in fields_kept_by(subject.cls).items()}
    with suppress(Exception):  # what a run may raise is another check's affair
        _busy(subject).train()
    after = {name: pickle.dumps(value) for name, value in fields_kept_by(subject.cls).items()}
    changed = sorted(name for name in after if after[name] != before.get(name))
    subject.require(
        not changed,
        f"a run changes {', '.join(changed)} of the class, which all instances share",
        "make it a field: `name: list[…] = state(factory=list)`",
    )


class _Planted(Exception):
    """The error that a check plants."""


class _FailingContext:
    """A context of which nothing can be read until its hook is over."""

    def __init__(self) -> None:
        self.__dict__.update(read=False, real=None)

    def __getattr__(self, name: str) -> Any:
        if self.real is not None:
            return getattr(self.real, name)
        self.__dict__["read"] = True
        raise _Planted(f"no {name} today")

    def __setattr__(self, name: str, value: Any) -> None:
        self.__getattr__(name)
        setattr(self.real, name, value)


def _plant(thing: Any, name: str, context: _FailingContext) -> None:
    """Let a component's hook see a context that fails."""
    original = getattr(thing, name)

    def planted(ctx: CallbackContext) -> Any:
        context.__dict__["real"] = None
        try:
            return original(context)
        finally:
            context.__dict__["real"] = ctx

    vars(planted).update(vars(original))  # its place among the listeners
    setattr(thing, name, planted)


def _raised_by(subject: Subject, *callbacks: Callback, thing: Any = None) -> BaseException | None:
    """What a run fails with, if it does."""
    try:
        _busy(subject, *callbacks, thing=thing).train()
    except Exception as error:
        return error
    return None


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors of which a group of errors consists."""
    for inner in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        yield from _leaves(inner)
    if not isinstance(error, BaseExceptionGroup):
        yield error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, those of its group, and what they came from."""
    for one in _leaves(error):
        current: BaseException | None = one
        while current is not None:
            yield current
            current = current.__cause__ or current.__context__


@component
class _Fails(Callback):
    """Ends the run in its second step."""

    def on_step_end(self, ctx: CallbackContext) -> None:
        if ctx.step == 2:
            raise _Planted("planted")


@component
class _End(Callback):
    """Keeps the random state of the run's end."""

    @hook(trylast=True)
    def on_run_end(self, ctx: CallbackContext) -> None:
        self.random = ctx.state_dict()["rng"]


@component
class NoDropout(Callback):
    """Ranks draw different random numbers; without dropout they compute the same."""

    def on_run_start(self, ctx: CallbackContext) -> None:
        for module in ctx.model.modules():
            if isinstance(module, (nn.Dropout, nn.AlphaDropout)):
                module.p = 0.0


def _busy(subject: Subject, *callbacks: Callback, plain: bool = False, thing: Any = None) -> Trainer:
    """A run with several logs and evaluations; with `thing` in the plugin's place, if that is given."""
    given = {"log_interval": "2st", "eval_interval": "3st"}
    return subject.plain_trainer(*callbacks, **given) if plain else subject.trainer(*callbacks, thing=thing, **given)


def _build(subject: Subject, callbacks: tuple[Any, ...] = ()) -> Trainer:
    return subject.trainer(*callbacks)


def _weights(subject: Subject, batch: int) -> Tensor:
    """The weights after a run in which each process takes microbatches of `batch` samples."""
    with torch.random.fork_rng(devices=[]):
        trainer = subject.trainer(NoDropout(), per_device_batch_size=batch, dtype=_dtype(subject), **_strategy(subject))
        trainer.train()
    return weights(trainer)


def _strategy(subject: Subject) -> dict[str, Any]:
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    return {"strategy": GlooStrategy()} if ranks and subject.kind != "strategy" else {}


def _dtype(subject: Subject) -> torch.dtype:
    """float64, in which rounding cannot decide a sign, where the kit chooses the model and the plugin takes that."""
    if subject.model is not None or subject.kind in ("precision", "mode", "model", "dataset"):
        return torch.float32
    try:
        if subject.kind == "optimizer":
            subject.trainer(dtype=torch.float64)
    except DrivetrainError:
        return torch.float32
    return torch.float64


def _compute_type(subject: Subject) -> torch.dtype:
    trainer = (
        subject.trainer(dtype=_dtype(subject)) if subject.kind != "strategy" else subject.plain_trainer(dtype=_dtype(subject))
    )
    return trainer.ctx.precision.dtype or next(trainer.model.parameters()).dtype


def _compare(subject: Subject, resumed: Any, straight: Any, again: Any) -> None:
    """Compare final states; parts of components that differ between two uninterrupted runs are clocks and are left out."""
    for key in ("model", "optimizer", "precision"):
        if where := difference(straight[key], again[key], key):
            subject.fail(
                f"two uninterrupted runs differ: {where}",
                "draw random numbers from torch's generators, which the run seeds, and iterate over nothing without an order",
            )
        if where := difference(resumed[key], straight[key], key):
            subject.fail(
                f"after a resume the run ends otherwise: {where}",
                "keep what the next step depends on in fields made with "
                "state(), in the optimizer's state or in state_dict; nothing else survives",
            )
    for name, state in straight["components"].items():
        unstable = difference(state, again["components"].get(name))
        if not unstable and (where := difference(resumed["components"].get(name), state, name)):
            subject.fail(
                f"after a resume its own state is another: {where}",
                "load_state_dict must take back what state_dict gave, and nothing may start it afresh in on_run_start",
            )


def _not_plain(value: Any, path: str = "") -> str | None:
    if isinstance(value, Mapping):
        return next((found for key, item in value.items() if (found := _not_plain(item, f"{path}/{key}"))), None)
    if isinstance(value, (list, tuple)):
        return next((found for index, item in enumerate(value) if (found := _not_plain(item, f"{path}/{index}"))), None)
    if isinstance(value, Tensor):
        return None
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return f"{type(value).__name__} at {path.lstrip('/')}"
    return None


def _require_pickle(subject: Subject) -> None:
    try:
        pickle.dumps(subject)
    except Exception as error:
        subject.fail(
            f"it cannot go to another process: {error}",
            "define the class at the top of a module, and give the kit functions that are at the top of one",
        )
