"""Statistics of gradients, weights and updates, layer by layer, at logging steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from drivetrain import Callback, component, hook, option

if TYPE_CHECKING:
    from drivetrain import CallbackContext

__all__ = ["GradientStatsCallback"]

_NEVER = float("inf")


@component
class GradientStatsCallback(Callback):
    """Add to the log, for each layer (the module that holds the parameters, such as `blocks.0.attention`):

    - `gradient_norm/LAYER`, `gradient_max/LAYER`: 2-norm and largest magnitude of its gradients as the optimizer sees them, after
      averaging over ranks and clipping
    - `weight_norm/LAYER`: the 2-norm of its weights before the update
    - `update_ratio/LAYER`: the 2-norm of the update over that of the weights; about 1e-3 is usual for Adam

    They are computed on the device in the steps that are logged, and read with the log; other steps cost one comparison. NaN and
    infinity stay what they are. For the update those steps keep a copy of the weights. With `histograms`, trackers also get the
    distribution of each layer's gradients (of rank 0's shards, if they are sharded).
    """

    steps: int | None = option(
        default=None,
        at_least=1,
        help="steps from one to the next; by default log_interval, or 100 if that is no number of steps",
    )
    histograms: bool = option(default=False, help="hand the distributions of gradients to the trackers as well")

    _layers: dict[str, list[nn.Parameter]] = attrs.field(factory=dict, init=False, repr=False)
    _period: int = attrs.field(default=1, init=False, repr=False)
    _next: float = attrs.field(default=0, init=False, repr=False)  # before so many steps there is none to look at
    _before: Any = attrs.field(default=None, init=False, repr=False)  # the weights and their norms, within a step
    _compares: float = attrs.field(default=_NEVER, init=False, repr=False)  # 0 within such a step

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Gather the layers."""
        interval = ctx.config.log_interval
        self._period = self.steps or (int(interval.value) if interval.unit == "st" and interval.value >= 1 else 100)
        self._layers = {}
        for name, parameter in ctx.model.named_parameters():
            if parameter.requires_grad:
                layer = name.removeprefix("module.").replace("_orig_mod.", "").rpartition(".")[0] or "model"
                self._layers.setdefault(layer, []).append(parameter)

    def on_log(self, ctx: CallbackContext) -> None:
        """Wake: the run may have gone back."""
        self._next = 0

    @hook(trylast=True, not_before="_next")
    def on_clipped(self, ctx: CallbackContext) -> None:
        """Look at the gradients and at the weights before their update."""
        ahead = -(ctx.step + 1) % self._period
        if ahead:
            self._next = ctx.step + ahead
        else:
            self._look(ctx)

    @hook(tryfirst=True, not_before="_compares")
    def on_optimizer_step(self, ctx: CallbackContext) -> None:
        """Compare with the weights after it."""
        self._compare(ctx)

    def _look(self, ctx: CallbackContext) -> None:
        self._before, self._compares = {}, 0
        for layer, parameters in self._layers.items():
            weights = [p.detach().clone() for p in parameters]
            self._before[layer] = (weights, _norm(weights))
            grads = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in parameters if p.grad is not None]
            if grads:
                ctx.log({f"gradient_norm/{layer}": _norm(grads), f"gradient_max/{layer}": _largest(grads)})
            if grads and self.histograms:
                ctx.show("histogram", f"gradients/{layer}", torch.cat([_local(grad).flatten() for grad in grads]))

    def _compare(self, ctx: CallbackContext) -> None:
        before, self._before, self._compares = self._before, None, _NEVER
        for layer, (weights, norm) in before.items():
            change = _norm(torch._foreach_sub([p.detach() for p in self._layers[layer]], weights))
            ctx.log({f"weight_norm/{layer}": norm, f"update_ratio/{layer}": change / norm.clamp(min=1e-30)})


def _norm(tensors: Any) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(_joined(torch._foreach_norm(tensors, 2.0)))
    return norm


def _largest(tensors: Any) -> Tensor:
    return _joined(torch._foreach_norm(tensors, float("inf"))).max()


def _joined(values: Any) -> Tensor:
    """Numbers of several tensors in one; of sharded ones, those of the whole."""
    return torch.stack([(v.full_tensor() if hasattr(v, "full_tensor") else v).float() for v in values])


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
