"""Every point at which a plugin can take part. The loop, with each event in its place:

    make_strategy · make_model · make_precision · make_dataset · make_optimizer · make_schedule      (once, choose one)
    on_restore                                                        (a checkpoint plugin loads a state here)
    on_run_start
    for each epoch:
        on_epoch_start
        for each step (one optimizer update):
            on_step_start
            for each microbatch:
                on_batch → forward → on_forward → loss → on_loss → backward → on_backward
            on_gradients → clip → on_clipped → optimizer and schedule → on_optimizer_step
            on_step_end
            [on_log] [on_evaluate_start, on_evaluate_batch…, on_evaluate_end] [on_every]      (when due; nothing otherwise)
        on_epoch_end
    on_run_end
    on_exception, on_preempt, on_checkpoint_saved: whenever they happen

Rules. Events take exactly one argument, `ctx`, and return nothing; what may be replaced is said with each event, all else is
to be read only. Listeners run in the order of the configuration, `tryfirst` ones before and `trylast` ones after the rest.
An exception ends the run and carries the plugin's name; only `on_run_end` and `on_exception` run every listener first.
An event without listeners costs one comparison, and so does a listener that sleeps: `@hook(not_before="attribute")` names a
number of the component, and while `ctx.step` is less, the method is not called. Reading a value from the device (`ctx.loss`,
`.item()`) waits for it: do so in `on_log`, where the values are on the host already, or in `on_every`, whose period is yours.

Evolution. `API` is the version (major, minor) of these hooks and of the protocols that they hand over. Hooks may be added at any
time: minor. Events keep their one argument for ever. A hook goes (major) one minor release after it was declared `retiring`, which
warns whoever implements it. Plugins state what they need by `drivetrain-core>=X,<Y`. docs/versions.md has the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import torch

    from drivetrain.context import CallbackContext
    from drivetrain.precision import Precision
    from drivetrain.strategy import Strategy

API = (1, 0)
PROJECT = "drivetrain"
spec = pluggy.HookspecMarker(PROJECT)
choose_one = spec(firstresult=True)


def retiring(advice: str, firstresult: bool = False) -> Any:
    """In place of `spec` for a hook that will go: its implementations warn, at their own line, with what to use instead."""
    return spec(firstresult=firstresult, warn_on_impl=DeprecationWarning(advice))


class MakeSpecs:
    """Choose one: called once while the run is put together; the loop then calls the returned object directly."""

    @choose_one
    def make_model(self, ctx: CallbackContext) -> torch.nn.Module:
        """Build the model from its options (kind `model`). Read `ctx.config`; the engine moves the model to the device."""

    @choose_one
    def make_dataset(self, ctx: CallbackContext) -> Any:
        """Build the training data (kind `dataset`): map-style, iterable, or a DataLoader. Called on `data` and on `eval_data`."""

    @choose_one
    def make_eval_dataset(self, ctx: CallbackContext) -> Any:
        """Build the held-out part of the same data; asked only when `eval_data` names nothing of its own."""

    @choose_one
    def make_collator(self, ctx: CallbackContext) -> Callable[[list[Any]], Any]:
        """Return the function that joins samples to a batch."""

    @choose_one
    def make_loss(self, ctx: CallbackContext) -> Callable[[Any, Any], Any]:
        """Return `loss(outputs, targets_or_batch)`, for models that return no loss themselves."""

    @choose_one
    def make_metrics(self, ctx: CallbackContext) -> Callable[[Any, Any], Mapping[str, Any]]:
        """Return `metrics(outputs, batch)` for evaluation: a mapping of names to means or to `Loss(total, weight)`."""

    @choose_one
    def make_quantized_model(self, ctx: CallbackContext) -> torch.nn.Module:
        """First preparation phase: return `ctx.model` with its weights quantized."""

    @choose_one
    def make_adapted_model(self, ctx: CallbackContext) -> torch.nn.Module:
        """Second preparation phase: return `ctx.model` with adapters in place and the rest frozen."""

    @choose_one
    def make_strategy(self, ctx: CallbackContext) -> Strategy:
        """How the model is spread over processes (kind `strategy`)."""

    @choose_one
    def make_precision(self, ctx: CallbackContext) -> Precision:
        """In which numbers the model computes (kind `precision`). `ctx.device` is known, and `ctx.model` as it was built."""

    @choose_one
    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """The optimizer over `ctx.model`'s parameters, which are prepared, placed and wrapped by now (kind `optimizer`)."""

    @choose_one
    def make_schedule(self, ctx: CallbackContext) -> Callable[[float], float]:
        """The learning rate's factor as a pure function of the position in the run (kind `scheduler`).

        The position counts in `ctx.run_unit`; `ctx.run_length` is where the run ends; `ctx.position_of` converts durations.
        """

    @choose_one
    def make_gradients_wrapper(self, ctx: CallbackContext) -> Callable[[Any], Any]:
        """Return `wrap(gradients)`, whose result takes the place of `gradients(window)`: forward and backward of a step's microbatches.

        The window has `batches` on their way to the device, `counts` of samples, and their `total`. It sets `ctx.loss_tensor` and the
        parameters' gradients, and returns a scalar that these are still to be multiplied by, or None. Called with fewer samples in a
        microbatch when memory has run out, and not at all for what is tried out beside the training.
        """

    @spec
    def make_listener_wrapper(self, ctx: CallbackContext) -> Callable[[Any, str, Any], Any]:
        """Return `wrap(call, event, component)`, whose result takes the place of each listener `call(ctx)`: to time or trace them.

        Several components may do so, one around the other.
        """


class EventSpecs:
    """Events of the loop. One argument, no result."""

    @spec
    def on_restore(self, ctx: CallbackContext) -> None:
        """Everything is built, nothing has run. A checkpoint plugin reads `ctx.resume` and calls `ctx.load_state_dict`."""

    @spec
    def on_run_start(self, ctx: CallbackContext) -> None:
        """Training is about to begin, or to go on from a restored state."""

    @spec
    def on_epoch_start(self, ctx: CallbackContext) -> None:
        """A pass over the data begins, or goes on after a resume (`ctx.epoch`, counted from 0)."""

    @spec
    def on_step_start(self, ctx: CallbackContext) -> None:
        """The microbatches of the next step are at hand."""

    @spec
    def on_batch(self, ctx: CallbackContext) -> None:
        """A microbatch is on the device. May replace `ctx.batch`. Comes anew for a step that starts over, since memory ran out."""

    @spec
    def on_forward(self, ctx: CallbackContext) -> None:
        """The model has run. May replace `ctx.outputs`."""

    @spec
    def on_loss(self, ctx: CallbackContext) -> None:
        """The microbatch's loss is known, before its backward. May replace `ctx.microbatch_loss` (a mean, or `Loss`)."""

    @spec
    def on_backward(self, ctx: CallbackContext) -> None:
        """The microbatch's gradients have been added up. They are not yet averaged over the step."""

    @spec
    def on_gradients(self, ctx: CallbackContext) -> None:
        """The step's gradients are complete: averaged, reduced over ranks, unscaled. May change them in place, and set `ctx.veto`."""

    @spec
    def on_clipped(self, ctx: CallbackContext) -> None:
        """The gradients are as the optimizer will see them. `ctx.grad_norm` is the norm before clipping, if it was computed.

        May set `ctx.veto`, a scalar on the device or a bool: unless it is 0 or False, weights and optimizer stay as they are, and the
        step counts.
        """

    @spec
    def on_optimizer_step(self, ctx: CallbackContext) -> None:
        """The weights have been updated and the gradients are still there. Place for averages of the weights."""

    @spec
    def on_step_end(self, ctx: CallbackContext) -> None:
        """A step is complete and counted in `ctx.step`. May call `ctx.stop` and `ctx.log`."""

    @spec
    def on_log(self, ctx: CallbackContext) -> None:
        """A logging step: `ctx.metrics` holds the values since the last one as floats on the host. May add to `ctx.metrics`.

        May call `ctx.go_back`.
        """

    @spec
    def on_evaluate_start(self, ctx: CallbackContext) -> None:
        """Evaluation begins; the model is in eval mode."""

    @spec
    def on_evaluate_batch(self, ctx: CallbackContext) -> None:
        """One evaluation batch has run: `ctx.batch` and `ctx.outputs` are its own. `ctx.counts` is False where it only stands in.

        All ranks have equally many; one that has fewer samples is given batches again, which no result counts.
        """

    @spec
    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        """Evaluation is over: `ctx.eval_metrics` holds its values ("eval/loss", …). May add to them and call `ctx.stop`."""

    @spec
    def on_every(self, ctx: CallbackContext) -> None:
        """The component's own period `every` has passed; after logging and evaluation of the same step."""

    @spec
    def on_epoch_end(self, ctx: CallbackContext) -> None:
        """A pass over the data is complete; `ctx.epoch` is the pass that ended."""

    @spec
    def on_checkpoint_saved(self, ctx: CallbackContext) -> None:
        """A checkpoint is durable at `ctx.checkpoint_path`."""

    @spec
    def on_preempt(self, ctx: CallbackContext) -> None:
        """The scheduler or the user asked the process to end; the run stops after this step."""

    @spec
    def on_exception(self, ctx: CallbackContext) -> None:
        """The run failed with `ctx.exception`, which is raised again afterwards."""

    @spec
    def on_run_end(self, ctx: CallbackContext) -> None:
        """The run is over, well or not (`ctx.stop_reason`). Every listener is called, whatever the others raise."""


SPECS = (MakeSpecs, EventSpecs)
EVENTS = tuple(name for name in vars(EventSpecs) if name.startswith("on_"))
MAKERS = tuple(name for name in vars(MakeSpecs) if name.startswith("make_"))
OF_EACH_STEP = (  # on ordinary steps too: nothing here should wait for the device, write a file or call a collective
    *("on_step_start", "on_batch", "on_forward", "on_loss", "on_backward"),
    *("on_gradients", "on_clipped", "on_optimizer_step", "on_step_end"),
)
HOOKS = (*MAKERS, *EVENTS)
