"""Optuna: studies over configurations, with pruning at each evaluation."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from drivetrain import (
    Callback,
    Component,
    ConfigError,
    DeviceManager,
    DrivetrainError,
    Problem,
    ProcessGroupStrategy,
    TrainingConfig,
    component,
    option,
    state,
)
from drivetrain.cluster import detect

if TYPE_CHECKING:
    from drivetrain import CallbackContext, Trainer

__all__ = ["Objective", "PruningCallback", "optimize_on_ranks", "with_values"]

_RUN_NAME = "run_name"


@component
class PruningCallback(Callback):
    """Report a metric to an Optuna trial after each evaluation, and end the run when Optuna prunes it.

    With several ranks the trial is rank 0's; its decision is everyone's. What was reported is part of the checkpoint: a run that goes
    on under a new trial reports it there first, so that pruners see the whole curve, and a pruned run stays pruned.
    """

    trial: Any = option(default=None, help="the optuna.Trial; None on other ranks than 0")
    monitor: str = option(default="eval/loss", help="the metric to report: eval/NAME")

    reported: list[list[float]] = state(factory=list)  # [step, value]
    pruned: str | None = state(default=None)

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Tell the trial what the run had reported before it was interrupted."""
        if ctx.config.eval_interval is None:
            raise DrivetrainError(f"pruning watches {self.monitor}, but eval_interval is false; set it, such as to 1ep")
        if ctx.is_main and self.trial is None:
            raise DrivetrainError("PruningCallback(trial=...) needs the trial on rank 0")
        for step, value in self.reported:
            self._report(int(step), value)
        if self.pruned is not None:
            ctx.stop(self.pruned)

    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        """Report, and ask whether to go on."""
        if self.monitor not in ctx.eval_metrics:
            known = ", ".join(sorted(ctx.eval_metrics)) or "none"
            raise DrivetrainError(f"pruning: there is no metric {self.monitor!r} to report; the evaluation gives {known}")
        if self.reported and self.reported[-1][0] >= ctx.step:
            return  # the same weights once more, by a call of `trainer.evaluate` or at the end of the run
        value = ctx.eval_metrics[self.monitor]
        self.reported.append([ctx.step, value])
        if ctx.strategy.gather(self._report(ctx.step, value) and self.trial.should_prune())[0]:
            self.pruned = f"pruned by Optuna: {self.monitor} is {value:.6g}"
            ctx.stop(self.pruned)

    def _report(self, step: int, value: float) -> bool:
        """Whether there was a trial to report to. One that has the step already keeps its value, and warns of it."""
        if self.trial is None:
            return False
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*already reported")
            self.trial.report(value, step)
        return True


class Objective:
    """What `study.optimize` calls: train a configuration with a trial's values, and return the newest value of a metric.

    Each trial's run has a name of its own, kept in the trial's `user_attrs["run_name"]`. A trial that Optuna repeats after a crash
    (`RetryHeartbeatStaleTrialCallback`) has it as well, so its run goes on from the checkpoint of the first one.

    Args:
        make_trainer: `make_trainer(config) -> Trainer`, called for each trial; the pruning callback is part of that configuration.
        config: what the trials have in common; `run_name` becomes the beginning of their names.
        space: by dotted key ("optimizer.lr", "callbacks.ema.decay") an Optuna distribution, or the choices as a list.
        monitor: the metric that is reported and returned.

    Raises:
        optuna.TrialPruned: when the trial was pruned.
        DrivetrainError: when the run was interrupted from outside, or had no evaluation.
    """

    def __init__(
        self,
        make_trainer: Callable[[TrainingConfig], Trainer],
        config: TrainingConfig,
        space: Mapping[str, BaseDistribution | Sequence[Any]],
        monitor: str = "eval/loss",
    ) -> None:
        self.make_trainer, self.config, self.monitor = make_trainer, config, monitor
        self.space = {
            key: found if isinstance(found, BaseDistribution) else CategoricalDistribution(found)
            for key, found in space.items()
        }

    def __call__(self, trial: optuna.Trial) -> float:
        return self.train(trial, *self.ask(trial))

    def ask(self, trial: optuna.Trial) -> tuple[str, dict[str, Any]]:
        """The name of the trial's run and its values."""
        values = {key: _suggest(trial, key, distribution) for key, distribution in self.space.items()}
        name = trial.user_attrs.get(_RUN_NAME) or f"{self.config.run_name or 'trial'}-{trial.number}-{os.urandom(2).hex()}"
        trial.set_user_attr(_RUN_NAME, name)
        return name, values

    def train(self, trial: optuna.Trial | None, name: str, values: Mapping[str, Any]) -> float:
        """Train with these values; on other ranks than 0 `trial` is None."""
        pruning = PruningCallback(trial=trial, monitor=self.monitor)
        config = with_values(self.config, {**values, "run_name": name})
        config.callbacks = [*config.callbacks, pruning]
        output = self.make_trainer(config).train()
        if pruning.pruned is not None:
            raise optuna.TrialPruned(pruning.pruned)
        if not output.completed:
            raise DrivetrainError(f"the trial was not finished: {output.stop_reason}")
        if not pruning.reported:
            raise DrivetrainError(f"the run {name} had no evaluation that gave {self.monitor}; give it evaluation data")
        return pruning.reported[-1][1]


def optimize_on_ranks(make_study: Callable[[], optuna.Study], objective: Objective, **options: Any) -> optuna.Study | None:
    """`study.optimize(objective, **options)` when a launcher has started this program several times: each trial is trained by all ranks.

    Args:
        make_study: called on rank 0 only, which alone has the study; it asks Optuna and tells the others the values.
        options: those of `study.optimize`, but not `n_jobs`.

    Returns:
        The study on rank 0, None on the others.
    """
    cluster = detect()
    if cluster.world_size == 1:
        study = make_study()
        study.optimize(objective, **options)
        return study
    if options.get("n_jobs", 1) != 1:
        raise DrivetrainError("n_jobs must be 1: the ranks train one trial at a time")
    ranks = ProcessGroupStrategy()
    ranks.setup(DeviceManager(objective.config.device, cluster.local_rank).device)
    if ranks.rank > 0:
        _follow(objective, ranks)
        return None

    def together(trial: optuna.Trial) -> float:
        asked = objective.ask(trial)
        ranks.gather(asked)
        return objective.train(trial, *asked)

    study = make_study()
    study.optimize(together, **options)
    ranks.gather(None)
    return study


def _follow(objective: Objective, ranks: ProcessGroupStrategy) -> None:
    """Train what rank 0 trains, until it has no more."""
    nothing: tuple[str, dict[str, Any]] | None = None
    while (asked := ranks.gather(nothing)[0]) is not None:
        try:
            objective.train(None, *asked)
        except optuna.TrialPruned:
            continue


def with_values(config: TrainingConfig, values: Mapping[str, Any]) -> TrainingConfig:
    """A copy of a configuration with other values by dotted key, as on the command line: {"optimizer.lr": 3e-4}.

    Raises:
        ConfigError: for a key that does not exist, or a value of the wrong type.
    """
    changed = copy.copy(config)
    for key, value in values.items():
        first, *rest = key.split(".")
        if first == "callbacks" and rest:
            value = _callbacks_with(changed.callbacks, rest, value)
        elif rest:
            value = _table_with(changed.to_dict().get(first), rest, value)
        setattr(changed, first, getattr(TrainingConfig.from_table({first: value}), first))
    changed.check()
    return changed


def _callbacks_with(callbacks: Sequence[Any], path: list[str], value: Any) -> list[Any]:
    name, *rest = path
    if not rest:
        raise ConfigError([Problem(f"callbacks.{name}", "name one of its options: callbacks.NAME.OPTION")])
    index = next((i for i, spec in enumerate(callbacks) if _table(spec).get("use") == name), len(callbacks))
    before = callbacks[index] if index < len(callbacks) else name
    return [*callbacks[:index], _table_with(before, rest, value), *callbacks[index + 1 :]]


def _table_with(spec: Any, path: list[str], value: Any) -> dict[str, Any]:
    key, *rest = path
    table = _table(spec)
    return {**table, key: _table_with(table.get(key), rest, value) if rest else value}


def _table(spec: Any) -> dict[str, Any]:
    """A component's name, table or object as a table."""
    if isinstance(spec, Component):
        return {"use": spec.plugin_name.partition(":")[2], **spec.options()}
    return {"use": spec} if isinstance(spec, str) else dict(spec or {})


def _suggest(trial: optuna.Trial, key: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case FloatDistribution():
            return trial.suggest_float(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
        case IntDistribution():
            return trial.suggest_int(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
        case CategoricalDistribution():
            return trial.suggest_categorical(key, distribution.choices)
    raise DrivetrainError(f"{key}: {distribution} is none of Optuna's three distributions (float, int, categorical)")
