"""What a hook sees: one object for the whole run, its attributes filled as the loop goes on.

Cost. Everything here is free to read except `loss`, which waits for the device, once for each step; docs/events.md has a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from drivetrain.duration import Duration
from drivetrain.errors import PluginError

if TYPE_CHECKING:
    from drivetrain.components import Component
    from drivetrain.config import TrainingConfig
    from drivetrain.data import SampleOrder
    from drivetrain.loss import Loss
    from drivetrain.precision import Precision
    from drivetrain.run import Run
    from drivetrain.strategy import Strategy
    from drivetrain.trainer import Trainer


OWN_VALUES = frozenset(("train/loss", "train/lr", "train/grad_norm"))


class CallbackContext:
    """The run as a plugin sees it. Attributes marked (may be replaced) are the only ones to assign to, in the event named."""

    # -- the parts, fixed once the run is put together
    trainer: Trainer  # the run's public face
    run: Run  # how the parts were put together; for the engine's own use
    config: TrainingConfig  # with defaults filled in
    model: nn.Module  # wrapped and prepared; `trainer.model` is the module that the user gave
    optimizer: torch.optim.Optimizer  # over the parameters that are trained
    precision: Precision  # in which numbers the model computes
    strategy: Strategy  # this process's rank, and the collectives
    device: torch.device  # of this process

    # -- the length of the run
    run_unit: str = "st"  # the unit of positions and of `run_length`: "st" whenever it can be known, else "tok", "sp" or "s"
    run_length: float = float("inf")  # where the run ends, in `run_unit`
    steps_per_epoch: int | None = None  # None when the data has no length

    # -- counters, all Python numbers
    step: int = 0  # optimizer updates so far
    epoch: int = 0  # passes begun, from 0
    step_in_epoch: int = 0  # windows consumed in this pass (updates and skipped ones)
    samples: int = 0  # samples seen by all ranks together
    tokens: int = 0  # tokens seen by all ranks together; 0 when batches have none
    seconds: float = 0.0  # training time of earlier sittings; see `elapsed`
    agreed_seconds: float = 0.0  # with several ranks: rank 0's `elapsed` when they last agreed, the only clock decisions use
    skipped_steps: int = 0  # windows without a step: their gradients overflowed, or they are in `left_out`
    eval_batches: int | None = 0  # in one evaluation; None when the data has no length, 0 when there is no evaluation
    paused: float = 0.0  # seconds of logging, evaluation and periodic actions so far, in this sitting
    data_wait: float = 0.0  # seconds spent waiting for data so far, in this sitting
    resumed: bool = False  # whether this sitting goes on from a restored state

    # -- the microbatch
    batch: Any = None  # (may be replaced in on_batch)
    outputs: Any = None  # (may be replaced in on_forward)
    microbatch_loss: Tensor | Loss | None = None  # (may be replaced in on_loss) with gradient; a mean or a `Loss`
    microbatch: int = 0  # index within the step
    microbatches: int = 1  # how many this step has
    counts: bool = True  # in on_evaluate_batch: False for a batch that only stands in, where other ranks have more
    microbatch_parts: int = 1  # in how many parts each microbatch of the data is divided, since memory has run out
    window: list[Any]  # all of them, as they came from the data, from on_step_start to on_step_end
    left_out: set[tuple[int, int]]  # windows to pass over, as (epoch, index); may be added to, alike on all ranks

    # -- the step's results, scalars on the device
    loss_tensor: Tensor | None = None  # with several ranks, this one's share: the mean over ranks is the loss
    grad_norm: Tensor | None = None  # before clipping; None when nothing needed it
    updates_in_backward: bool = False  # weights change during backward, and no gradients are left when it is over
    veto: Tensor | bool | None = None  # (may be set in on_gradients and on_clipped) unless it is 0, this update changes nothing

    # -- values on the host
    metrics: dict[str, float]  # in on_log: the values since the last one
    eval_metrics: dict[str, float]  # the newest evaluation's, {} before the first
    last_logged: dict[str, float]  # the newest `metrics`
    shown: list[tuple[Literal["text", "histogram", "image"], str, Any]]  # in on_log: what `show` was given since the last one

    # -- the end
    stop_reason: str | None = None  # why the run ends; with several ranks, set when all have agreed
    stop_wanted: str | None = None  # what `stop` was called with
    interrupted: bool = False  # whether it was asked for from outside (`Trainer.stop`), of any rank once all have agreed
    at_end: bool = False  # whether `max_duration` was reached
    exception: BaseException | None = None  # what the run failed with
    resume: str = "never"  # "auto", "never" or a path
    checkpoint_path: Path | None = None  # the newest durable checkpoint

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.metrics, self.eval_metrics, self.last_logged = {}, {}, {}
        self.left_out = set()
        self._pending: dict[str, Any] = {}
        self._back_to: Mapping[str, Any] | None = None
        self.shown = []
        self._loss_value: float | None = None

    @property
    def loss(self) -> float:
        """The step's mean loss as a number. Reading it waits for the device, once for each step.

        With several ranks it is this one's share, of which the mean over ranks is the loss: that would be a collective. In the log,
        `metrics["train/loss"]` is the mean over all ranks and over the steps since the last log.
        """
        if self._loss_value is None:
            self._loss_value = float("nan") if self.loss_tensor is None else self.loss_tensor.item()
        return self._loss_value

    @property
    def lr(self) -> float:
        """The learning rate of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def mode(self) -> Component | None:
        """The training mode. Its attributes `from_scratch` (make new weights) and `adapters` (few are trained), if it has them, hold
        before there is a model."""
        return self.run.single.get("training_mode")

    @property
    def run_dir(self) -> Path:
        """The run's directory, made when it is first asked for; a run that nobody asks leaves no file."""
        return self.trainer.run_dir

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that prints and writes."""
        return self.strategy.rank == 0

    @property
    def position(self) -> float:
        """How far the run is, in `run_unit`."""
        return self.position_in(self.run_unit)

    def position_in(self, unit: str) -> float:
        """How far the run is in "st", "ep", "sp", "tok" or "s"."""
        if unit == "st":
            return self.step
        if unit == "ep":
            return self.epoch + self.step_in_epoch / (self.steps_per_epoch or float("inf"))
        seconds = self.elapsed if self.strategy.world_size == 1 else self.agreed_seconds
        return {"sp": self.samples, "tok": self.tokens, "s": seconds}[unit]

    @property
    def elapsed(self) -> float:
        """Seconds of training, all sittings together."""
        return self.trainer.elapsed

    @property
    def sample_order(self) -> SampleOrder | None:
        """Which samples feed each step of an epoch; None for streams, whose samples have no numbers."""
        return self.run.source.sample_order

    def position_of(self, length: Duration | str | float) -> float:
        """A length in `run_unit`: a `Duration`, its text, or a fraction of the run (0.1).

        Raises:
            ConfigError: when the length cannot be converted, such as steps in a run measured in tokens.
        """
        return self.run.position_of(length)

    def gradients_of(
        self,
        loss: Callable[[Any, Any], Tensor | Loss] | None = None,
        *,
        step: Callable[[nn.Module, Any], Tensor | Loss] | None = None,
    ) -> tuple[list[Tensor | None], Tensor]:
        """Gradients of a loss over this step's microbatches, beside the training: an auxiliary forward and backward.

        For optimizers that need more than the training gradient (curvature estimates, sharpness). Call it in `on_step_start` or
        `on_optimizer_step`, on every rank, and only on the steps that need it: it costs as much as the step itself.

        Args:
            loss: `loss(outputs, batch)` in place of the run's own; a mean over the microbatch or `Loss(total, weight)`.
            step: `step(model, batch)` in place of forward and loss, for losses that need the model in another way; `loss_of`
                gives it the run's own.

        Returns:
            The gradient of sum(total) / sum(weight) over microbatches and ranks for each of the optimizer's parameters, in the
            order of its groups (None where the loss does not reach), and the summed weight, a scalar on the device. The gradients
            and the random state of the training are left alone: calls in a row draw the same random numbers. The model runs as in
            training, so batch norm counts the batches once more.
        """
        return self.run.loop.gradients_of(loss, step)

    def loss_of(self, batch: Any) -> Tensor | Loss:
        """The run's own forward and loss of one microbatch that is on the device: a mean or `Loss`, with gradient.

        It takes part in no event. Its numbers are those of the surrounding autocast, of none outside a step.
        """
        return self.run.call.loss(self.run.call.forward(self.model, batch), batch)

    def log(self, values: Mapping[str, float | Tensor]) -> None:
        """Record values under names such as "train/accuracy"; tensors are read from the device at the next logging step.

        Raises:
            PluginError: for the names of the engine's own values.
        """
        if not OWN_VALUES.isdisjoint(values):
            taken = ", ".join(sorted(OWN_VALUES & set(values)))
            raise PluginError(f"ctx.log: {taken} is what the engine itself logs; choose another name.")
        self._pending.update(values)

    def rehearsal(
        self, batch_size: int | None = None, num_workers: int | None = None
    ) -> AbstractContextManager[Callable[[], Tensor]]:
        """A context with a function that trains a step and returns its loss; afterwards everything is as it was, bit by bit.

        For finders, in `on_run_start`, on all ranks alike. No component hears of it. Memory for a copy of the state.

        Args:
            batch_size: samples of a microbatch, in place of the run's; those of a step stay the same.
            num_workers: processes that fetch them, in place of the run's.

        Raises:
            DataError: when the data is an iterator, which can be read only once.
        """
        return self.run.rehearsal(batch_size, num_workers)

    def resize(self, batch_size: int | None = None, num_workers: int | None = None) -> None:
        """From now on divide each step into microbatches of another size, or fetch with as many workers; its samples stay the same. In
        `on_run_start`.

        Raises:
            ConfigError: when the samples that a step has on this process are no multiple of it, or the data has ready batches.
        """
        self.run.resize(batch_size, num_workers)

    def show(self, kind: Literal["text", "histogram", "image"], name: str, value: Any) -> None:
        """Hand trackers something that is no number: a text, a tensor of values, an image; see `Tracker` for their forms.

        Call it in `on_log`, or between two logging steps: it waits in `shown` for the next one, and a tensor keeps its memory until
        then. Only rank 0's is recorded.
        """
        if self.is_main:
            self.shown.append((kind, name, value))

    def stop(self, reason: str) -> None:
        """End the run after this step; the first reason given is the one reported.

        With several ranks one may ask: all end together, after the step that those which are ahead are in. Asked for alike on all
        ranks, that is this one.
        """
        if self.stop_wanted is None:
            self.stop_wanted = reason

    def state_dict(self, *, own: bool = False) -> dict[str, Any]:
        """Everything the run needs to go on exactly: a tree of dicts, lists, numbers, texts and tensors.

        With `own`, this process's part of it where weights are sharded, for `go_back`.
        """
        return self.trainer.state_dict(own=own)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave; call it in `on_restore`."""
        self.trainer.load_state_dict(saved)

    def go_back(self, saved: Mapping[str, Any]) -> None:
        """Go on from an earlier state of this run, with the data from there; only in `on_log`, and on all ranks alike.

        It is done when the other listeners have been called. The run's clock goes on. `saved` is what `state_dict` gave, copied.
        """
        self._back_to = saved

    def checkpoint_saved(self, path: Path) -> None:
        """Tell everybody that a checkpoint is durable at `path`; for checkpoint plugins."""
        self.checkpoint_path = path
        if self.run.events.checkpoint_saved is not None:
            self.run.events.checkpoint_saved(self)

    def __repr__(self) -> str:
        return f"CallbackContext(step={self.step}, epoch={self.epoch})"
