"""Exponential moving average of the weights: followed while training, used for evaluation and as the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import attrs
import torch
from torch import Tensor

from drivetrain import Callback, ModelError, PluginError, component, hook, option

if TYPE_CHECKING:
    from drivetrain import CallbackContext

__all__ = ["EmaCallback"]

_PLAIN_SGD: dict[str, Any] = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False, "is_first_step": False}


@component
class EmaCallback(Callback):
    """Keep an exponential moving average of the weights: average ← d·average + (1−d)·weights, after every optimizer update.

    It begins with the weights at which the run starts. With `warmup` step n (from 0) uses d = min(decay, (1+n)/(10+n)), so that the
    beginning is soon forgotten (`num_updates` in TensorFlow's ExponentialMovingAverage). With `update_every` = k, only every k-th step
    updates, with d to the power of k: the average looks back over as many steps, at a k-th of the cost. Averaging iterates: Polyak and
    Juditsky 1992, SIAM J. Control Optim. 30(4); exponentially: Tarvainen and Valpola 2017, arXiv:1703.01780, equation 2.

    Evaluation sees the averages, and the weights come back bit by bit; while it lasts, the weights are kept in the memory that
    gradients have otherwise. Floating-point buffers (statistics of batch norm) are averaged like the weights, others stay as they
    are. A step that is left out because gradients overflowed is no update. The averages are part of every checkpoint, beside the
    weights; sharded weights (FSDP) are averaged shard by shard.
    """

    without_gradients: ClassVar[bool] = True

    decay: float = option(default=0.999, at_least=0, below=1, help="d, the share of the old average that an update keeps")
    warmup: bool = option(default=True, help="begin with a smaller decay")
    update_every: int = option(default=1, at_least=1, help="steps from one update of the average to the next")
    dtype: Literal["fp32", "own"] = option(
        default="fp32", help="fp32 widens averages of narrower weights, in which small changes would be lost; own does not"
    )
    evaluate: bool = option(default=True, help="put the averages in the place of the weights for evaluation")
    use_at_end: bool = option(
        default=False, help="leave the averages in the model when the run ends or is restored, to be exported"
    )

    _averages: _Values | None = attrs.field(default=None, init=False, repr=False)
    _weights: _Values | None = attrs.field(default=None, init=False, repr=False)  # kept while the averages are in the model
    _saved: Mapping[str, Any] | None = attrs.field(default=None, init=False, repr=False)  # restored, not yet taken over
    _stays: bool = attrs.field(default=False, init=False, repr=False)  # the averages were in before the evaluation
    _ctx: Any = attrs.field(default=None, init=False, repr=False)

    # -- state -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The averages by name, and the weights if the averages are in their place; of a sharded model, this rank's parts."""
        if self._saved is not None:
            return dict(self._saved)
        return {
            "updates": self.updates,
            "averages": None if self._averages is None else self._averages.by_name(),
            "weights": None if self._weights is None else self._weights.by_name(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Keep the state until the model can be asked for its tensors."""
        self._saved, self._averages, self._weights = saved, None, None

    @property
    def updates(self) -> int:
        """How often the averages have followed the model."""
        if self._averages is not None:
            return self._averages.updates
        return 0 if self._saved is None else self._saved["updates"]

    # -- events ----------------------------------------------------------------------------------------------------------

    @hook(trylast=True)
    def on_restore(self, ctx: CallbackContext) -> None:
        """Whoever restores a run to export it gets the averages as well; training puts the weights back."""
        if self.use_at_end and self._saved is not None:
            self._begin(ctx)
            self._put_in()

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Begin the average, or go on with it; an earlier sitting may have left it in the model."""
        self._put_back()
        if self._averages is not None and self.updates == 0:
            self._averages = None  # of an evaluation before the run
        self._begin(ctx)
        self._put_back()

    def on_optimizer_step(self, ctx: CallbackContext) -> None:
        """Let the average follow."""
        every = self.update_every
        if (ctx.step + 1) % every:
            return
        if self._averages is None:  # the run went back to an earlier state
            self._begin(ctx)
        averages = self._averages
        assert averages is not None
        steps = averages.updates * every
        decay = min(self.decay, (1 + steps) / (10 + steps)) if self.warmup else self.decay
        averages.move_towards_model(1 - decay**every)
        averages.updates += 1

    def on_evaluate_start(self, ctx: CallbackContext) -> None:
        """Put the averages in. Not `tryfirst`: a checkpoint that is being copied must hear of it before."""
        self._stays = self._weights is not None
        if self.evaluate:
            self._begin(ctx)
            self._put_in()

    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        """Put the weights back, unless the run has ended with the averages."""
        if not self._stays:
            self._put_back()

    def on_exception(self, ctx: CallbackContext) -> None:
        """Put the weights back if an evaluation broke off."""
        self._put_back()

    def on_run_end(self, ctx: CallbackContext) -> None:
        """Leave the averages in the model if that is wanted. The checkpoint of the end holds both, whenever it is made."""
        if self.use_at_end and ctx.exception is None:
            self._put_in()

    @contextmanager
    def averaged(self, ctx: CallbackContext) -> Iterator[None]:
        """A context in which the model's weights are the averages: to export them in the middle of a run or after `restore`."""
        self._begin(ctx)
        was_in = self._weights is not None
        self._put_in()
        try:
            yield
        finally:
            if not was_in:
                self._put_back()

    # -- in and out ------------------------------------------------------------------------------------------------------

    def _begin(self, ctx: CallbackContext) -> None:
        self._ctx = ctx
        if self._averages is not None:
            return
        self._averages = _Values.of(ctx, widened=self.dtype == "fp32")
        saved, self._saved = self._saved, None
        if saved is None or saved["averages"] is None:
            return
        self._averages.load(ctx, saved["averages"])
        self._averages.updates = saved["updates"]
        if saved["weights"] is not None:
            self._weights = _Values.of(ctx, widened=False)
            self._weights.load(ctx, saved["weights"])

    def _put_in(self) -> None:
        if self._weights is None and self._averages is not None:
            self._weights = _Values.of(self._ctx, widened=False)
            self._averages.write_to_model()

    def _put_back(self) -> None:
        if self._weights is not None:
            self._weights.write_to_model()
            self._weights = None


class _Values:
    """A copy of the model's trainable parameters and floating-point buffers; on each rank of a sharded model, of its shards."""

    def __init__(self, sources: dict[str, Tensor], copies: list[Tensor]) -> None:
        self.names, self.sources, self.copies = list(sources), list(sources.values()), copies
        self.updates = 0
        self._local = [_local(copy) for copy in copies]
        self._sharded = any(hasattr(copy, "to_local") for copy in copies)
        self._fits_fused = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (*self._local, *self.sources))
        self._no_grad = torch.no_grad()  # made once: it is entered in every step
        self._widened = any(copy.dtype != source.dtype for copy, source in zip(copies, self.sources, strict=True))

    @classmethod
    def of(cls, ctx: CallbackContext, widened: bool) -> _Values:
        """Copy the model as it is now.

        Raises:
            ModelError: when it has no trainable parameter.
        """
        parameters = {name: p for name, p in ctx.trainer.model.named_parameters() if p.requires_grad}
        if not parameters:
            raise ModelError("ema: the model has no trainable parameter, so there is nothing to average.")
        buffers = {name: b for name, b in ctx.trainer.model.named_buffers() if b.is_floating_point()}
        sources = parameters | buffers
        dtypes = [torch.promote_types(s.dtype, torch.float32) if widened else s.dtype for s in sources.values()]
        return cls(sources, [s.detach().to(d, copy=True) for s, d in zip(sources.values(), dtypes, strict=True)])

    def move_towards_model(self, share: float) -> None:
        """copy ← copy + share·(model − copy), all tensors at once."""
        now = [_local(source) for source in self.sources] if self._sharded else self.sources
        with self._no_grad:
            if self._widened:
                now = [source.to(copy.dtype) for source, copy in zip(now, self._local, strict=True)]
            if self._fits_fused:
                # one call for all tensors of a CPU: the step of SGD with the averages as weights, rate −share and weight decay −1,
                # average + share·(weights − average), which rounds as lerp does
                torch._fused_sgd_(self._local, now, [], lr=-share, weight_decay=-1.0, **_PLAIN_SGD)
            else:
                torch._foreach_lerp_(self._local, now, share)

    @torch.no_grad()
    def write_to_model(self) -> None:
        """Give the model these values; narrower weights get them rounded."""
        torch._foreach_copy_([_local(source) for source in self.sources], self._local)

    def by_name(self) -> dict[str, Tensor]:
        """The tensors by their names in the model; nothing is copied or gathered."""
        return dict(zip(self.names, self.copies, strict=True))

    def load(self, ctx: CallbackContext, saved: Mapping[str, Tensor]) -> None:
        """Take back what `by_name` gave, of this or another strategy.

        Raises:
            PluginError: when it is of another model.
        """
        if set(saved) != set(self.names):
            odd = sorted(set(saved) ^ set(self.names))
            raise PluginError(f"ema: the saved averages are not of this model's weights; they differ in {', '.join(odd[:3])}")
        state = {"state": {i: {"value": saved[name]} for i, name in enumerate(self.names)}}
        ctx.strategy.load_optimizer_state(ctx.model, cast(Any, self), state)

    # what a strategy asks of an optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The tensors whose layout the copies have."""
        return [{"params": self.copies}]

    def state_dict(self) -> dict[str, Any]:
        """The copies by number."""
        return {"state": {i: {"value": copy} for i, copy in enumerate(self.copies)}}

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Copy the values of `saved`, laid out as the copies are."""
        for i, copy in enumerate(self.copies):
            copy.copy_(saved["state"][i]["value"])


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
