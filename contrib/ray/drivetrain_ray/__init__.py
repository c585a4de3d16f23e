"""Ray Train: run a configuration on the workers of a Ray cluster."""

from __future__ import annotations

import copy
import re
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import attrs
import ray.train
from ray.train import Checkpoint
from ray.train.torch import TorchTrainer, get_device

from drivetrain import Callback, Duration, TrainingConfig, component, hook, option

if TYPE_CHECKING:
    from drivetrain import CallbackContext, Trainer

__all__ = ["RayReportCallback", "ray_trainer", "train_worker"]


def ray_trainer(make_trainer: Callable[[TrainingConfig], Trainer], config: TrainingConfig, **options: Any) -> TorchTrainer:
    """A `ray.train.torch.TorchTrainer` whose workers are the ranks of one Drivetrain run; `fit()` trains.

    Every checkpoint and the newest values are reported to Ray (`RayReportCallback`). When Ray starts the workers anew after a failure
    (`RunConfig(failure_config=FailureConfig(max_failures=3))`), or an experiment of the same name again, they go on from the newest
    checkpoint that Ray has, on whatever machines they are now.

    Args:
        make_trainer: `make_trainer(config) -> Trainer`, called on each worker; the reporting callback is part of that configuration.
        config: the configuration; it needs the checkpoint callback (a standard one). A relative `output_dir` is one of this program's
            directory. Without a `run_name` runs are named as Ray's experiment.
        options: of `TorchTrainer`: `scaling_config`, `run_config`, …
    """
    shared = copy.copy(config)
    shared.output_dir = config.output_dir.absolute()
    given = {"make_trainer": make_trainer, "config": shared}
    return TorchTrainer(train_worker, train_loop_config=given, **options)


def train_worker(given: Mapping[str, Any]) -> None:
    """What each worker does: train `given["make_trainer"](given["config"])`, from Ray's newest checkpoint if it has one."""
    config: TrainingConfig = copy.copy(given["config"])
    if not any(isinstance(thing, RayReportCallback) for thing in config.callbacks):
        config.callbacks = [*config.callbacks, RayReportCallback()]
    config.run_name = config.run_name or ray.train.get_context().get_experiment_name()
    if config.device == "auto":
        config.device = str(get_device())
    saved = ray.train.get_checkpoint()
    with nullcontext(None) if saved is None else saved.as_directory() as folder:
        if saved is not None:
            # This machine may never have seen the run, or know an older state of it: what follows is a run of its own, which
            # begins at Ray's checkpoint.
            config.run_name, config.resume = f"{config.run_name}-from-{_name(saved)}", str(folder)
        for _ in given["make_trainer"](config).steps():  # unlike train(), it lets an interruption through, by which Ray cancels
            pass


def _name(saved: Checkpoint) -> str:
    return str(saved.path).rstrip("/").rpartition("/")[2]


@component
class RayReportCallback(Callback):
    """Report to Ray Train from every worker: each checkpoint when it is durable, and the newest values now and then.

    A report waits until Ray has fetched the one before, which it does every two seconds (`RAY_TRAIN_HEALTH_CHECK_INTERVAL_S`); so values
    are not reported each time they are logged. Ray's `Result` has those that came with a checkpoint.
    """

    every: Duration = option(default=Duration(30, "s"), help="how often to report the newest logged and evaluated values")

    # by step; a checkpoint is heard of when it has been written, and belongs to the values of the step at which it was begun
    _known: deque[dict[str, float]] = attrs.field(factory=lambda: deque([{}], maxlen=1000), init=False, repr=False)

    @hook(trylast=True)
    def on_log(self, ctx: CallbackContext) -> None:
        """Remember what is logged."""
        self._note(ctx, ctx.metrics)

    @hook(trylast=True)
    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        """Remember what the evaluation gave."""
        self._note(ctx, ctx.eval_metrics)

    @hook(trylast=True)
    def on_every(self, ctx: CallbackContext) -> None:
        """Report the newest values."""
        ray.train.report(self._known[-1])

    def on_checkpoint_saved(self, ctx: CallbackContext) -> None:
        """Hand over a checkpoint. Not after a failure: Ray waits for all workers, and some may be gone."""
        if ctx.exception is None:
            path = str(ctx.checkpoint_path)
            number = re.search(r"step-(\d+)", path.rpartition("/")[2])
            step = int(number[1]) if number else ctx.step
            values = next((known for known in reversed(self._known) if known.get("step", 0) <= step), {})
            ray.train.report({**values, "step": step}, checkpoint=Checkpoint.from_directory(path) if ctx.is_main else None)

    def _note(self, ctx: CallbackContext, values: Mapping[str, float]) -> None:
        self._known.append({**self._known[-1], **values, "step": ctx.step, "epoch": ctx.position_in("ep")})
