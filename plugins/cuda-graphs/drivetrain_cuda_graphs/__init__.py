"""Forward and backward of a step as one CUDA graph: recorded once for each shape of batch, checked, and launched as a whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
from torch import Tensor

from drivetrain import Callback, component, option
from drivetrain_cuda_graphs.recording import Recorder, Recording, Refused, form_of, recorder_for

if TYPE_CHECKING:
    from drivetrain import CallbackContext

__all__ = ["CudaGraphs"]

Gradients = Callable[[Any], Tensor | None]  # forward and backward of a window, as the loop has them
_MOST_FORMS = 1000  # that are counted: batches of ever new shapes are not to fill the memory
_WITHIN = ("on_batch", "on_forward", "on_loss", "on_backward")


@component
class CudaGraphs(Callback):
    """Record the kernels of forward and backward once, and launch them together from then on.

    A small model spends its time launching: some thousand kernels a step, each a few microseconds of the host. A graph launches all
    at once; clipping and the optimizer, some ten kernels where they are fused, follow as ever. For large batches, whose kernels take
    longer than their launches, there is nothing to gain.

    A graph repeats the recorded kernels on the recorded memory, and no Python. So the batch is copied into memory of its own, and each
    shape of batch has a graph: after `warmup` ordinary steps of that shape, for `most` shapes, the others are computed as ever. What is
    recorded is computed in the ordinary way as well, twice, on two batches: where loss or gradients differ, something depends on what a
    graph does not repeat (numbers drawn on the host, a choice by the batch's values), and the run goes on without graphs. So it does,
    with a warning that names the reason, without a CUDA device, with several processes, when a component listens within forward and
    backward, and when recording fails, as where something waits for the device.

    Source: PyTorch's notes on CUDA semantics, "Whole-network capture"; here the warm-up consists of real steps.
    """

    changes_training: ClassVar[bool] = False

    warmup: int = option(default=3, at_least=1, help="ordinary steps of a shape before it is recorded")
    most: int = option(default=4, at_least=1, help="how many shapes of batches are recorded; each holds memory of its own")

    _recorder: Recorder | None = attrs.field(default=None, init=False, repr=False)  # None: all steps are ordinary ones
    _steps: dict[Any, int] = attrs.field(factory=dict, init=False, repr=False)  # so far, of each form of window
    _recordings: dict[Any, Recording] = attrs.field(factory=dict, init=False, repr=False)
    _ctx: Any = attrs.field(default=None, init=False, repr=False)
    _gradients: Any = attrs.field(default=None, init=False, repr=False)

    def make_gradients_wrapper(self, ctx: CallbackContext) -> Callable[[Gradients], Gradients]:
        """Take the place of forward and backward, to begin with by doing the same."""

        def wrap(gradients: Gradients) -> Gradients:
            self._ctx, self._gradients = ctx, gradients
            return self._compute

        return wrap

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Look whether there can be graphs at all."""
        reason = _why_not(ctx)
        self._recorder = None if reason else recorder_for(ctx.device)
        if self._recorder is None:
            self._give_up(reason or f"the device is {ctx.device.type}, not CUDA")

    def on_run_end(self, ctx: CallbackContext) -> None:
        """Give the memory back."""
        self._recorder = None
        self._recordings.clear()
        self._steps.clear()

    def _give_up(self, reason: str) -> None:
        self._recorder = None
        self._recordings.clear()
        warnings.warn(f"cuda_graphs: steps are launched kernel by kernel, since {reason}.", stacklevel=2)

    def _compute(self, window: Any) -> Tensor | None:
        gradients: Gradients = self._gradients
        recorder = self._recorder
        if recorder is None:
            return gradients(window)
        form = form_of(window)
        recording = self._recordings.get(form)
        if recording is not None and recording.holds():
            return self._compared(recording.check, window) if recording.unchecked else recording.launch(window)
        if self._is_worth_recording(form):
            self._recordings[form] = recording = Recording(self._ctx, gradients, recorder)
            return self._compared(recording.record, window)
        return recorder.warm_up(lambda: gradients(window))

    def _is_worth_recording(self, form: Any) -> bool:
        seen = self._steps.get(form, 0)
        if seen or len(self._steps) < _MOST_FORMS:
            self._steps[form] = seen + 1
        return seen >= self.warmup and (form in self._recordings or len(self._recordings) < self.most)

    def _compared(self, compute: Gradients, window: Any) -> Tensor | None:
        """A step that is computed in both ways; the last one so, if they differ."""
        try:
            return compute(window)
        except Refused as refused:
            self._give_up(str(refused))
            return refused.factor


def _why_not(ctx: CallbackContext) -> str | None:
    """What rules graphs out in this run, or None."""
    if ctx.strategy.world_size > 1:
        return f"{ctx.strategy.world_size} processes reduce gradients within backward"
    for event in _WITHIN:
        for _, thing in ctx.run.pm.listeners(event):
            return f"{thing.plugin_name} listens to {event}, and a graph calls nobody"
    return None
