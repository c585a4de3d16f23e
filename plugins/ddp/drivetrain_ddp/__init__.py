"""Data parallelism with torch's DistributedDataParallel, as the Drivetrain strategy `ddp`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from drivetrain import Component, ConfigError, ModelError, Problem, ProcessGroupStrategy, component, option

if TYPE_CHECKING:
    from drivetrain import CallbackContext, Strategy

__all__ = ["Ddp", "DdpStrategy"]
_MOST = 8  # names in a message


@component
class Ddp(Component):
    """Every process holds the whole model; gradients are averaged in buckets while backward runs (Li et al. 2020,
    arXiv:2006.15704).

    `compress` trades exactness for communication. With "powersgd" (Vogels et al. 2019, arXiv:1905.13727) what a step leaves out is
    added to the next one's gradients; that rest is not saved, so a run that goes on after an interruption begins again with whole
    gradients and does not end bit-equal to one that was not interrupted.
    """

    kind: ClassVar[str] = "strategy"

    bucket_mb: float = option(default=25.0, above=0, help="gradients are reduced in buckets of this size, in MiB")
    find_unused_parameters: bool = option(default=False, help="some steps leave parameters out of the loss")
    static_graph: bool = option(default=False, help="promise that every step uses the same parameters in the same way")
    compress: Literal["bf16", "fp16", "powersgd"] | None = option(
        default=None, help="reduce gradients in half precision, or as products of thin matrices (powersgd); both round"
    )
    powersgd_rank: int = option(default=2, at_least=1, help="columns of those matrices: more cost more and lose less")
    powersgd_after: int = option(default=1000, at_least=2, help="steps of each sitting that are reduced whole before")
    timeout: float = option(default=600.0, above=0, help="seconds after which a collective that a process does not join fails")
    setup_timeout: float = option(default=900.0, above=0, help="the same for meeting and until the end of the first step")

    def make_strategy(self, ctx: CallbackContext) -> Strategy:
        """A strategy over the processes that the launcher started.

        Raises:
            ConfigError: when torch lacks what an option needs.
        """
        if self.compress == "powersgd" and find_spec("numpy") is None:
            message = "torch's PowerSGD needs NumPy, which is not installed: pip install drivetrain-ddp[powersgd]"
            raise ConfigError([Problem("distributed.ddp.compress", message)])
        return DdpStrategy(self)


class DdpStrategy(ProcessGroupStrategy):
    """DistributedDataParallel over the default process group."""

    name = "ddp"

    def __init__(self, options: Ddp) -> None:
        super().__init__(options.timeout, options.setup_timeout)
        self.options = options
        self._names: dict[nn.Parameter, str] = {}
        self._first = True  # whether no step has been done

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap the model. Gradients are views into the buckets; buffers are sent around only if there are any."""
        wrapped = DistributedDataParallel(
            model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            bucket_cap_mb=self.options.bucket_mb,
            gradient_as_bucket_view=True,
            **_buffer_option(any(True for _ in model.buffers())),
            find_unused_parameters=self.options.find_unused_parameters,
            static_graph=self.options.static_graph,
        )
        if self.options.compress == "powersgd":
            state = powerSGD_hook.PowerSGDState(
                None, matrix_approximation_rank=self.options.powersgd_rank, start_powerSGD_iter=self.options.powersgd_after
            )
            wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        elif self.options.compress == "bf16":
            # in a function of another name: torch's own is taken on GPUs only, though gloo reduces bfloat16 as well
            wrapped.register_comm_hook(None, lambda group, bucket: default_hooks.bf16_compress_hook(group, bucket))
        elif self.options.compress == "fp16":
            wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
        self._names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return wrapped

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Nothing is left to reduce, unless a bucket still waits for a parameter that the loss does not depend on.

        Raises:
            ModelError: then, since torch would go on with this process's own gradients, and complain in the next step by number.
        """
        if self.options.find_unused_parameters or self.options.static_graph:
            return
        if unused := [
            self._names.get(p, "one of the optimizer's alone") for p in parameters if p.grad is None and p.requires_grad
        ]:
            more = f" and {len(unused) - _MOST} more" if len(unused) > _MOST else ""
            raise ModelError(
                f"the loss of rank {self.rank} does not depend on {', '.join(unused[:_MOST])}{more}, and ddp waits for their gradients. "
                "Freeze them (requires_grad_(False)) if they are never used; if some steps use them: "
                "distributed = { use = 'ddp', find_unused_parameters = true }"
            )

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any] | None:
        """Leave gradients local."""
        return _NoSync(cast(DistributedDataParallel, model), lambda: self._first and self.options.static_graph)

    def settled(self) -> None:
        """The first step is over, in which torch learns a static graph."""
        super().settled()
        self._first = False

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        """The inner model's weights."""
        return dict(cast(nn.Module, model.module).state_dict())

    def load_model_state(self, model: nn.Module, saved: Mapping[str, Any]) -> None:
        """Load into the inner model."""
        cast(nn.Module, model.module).load_state_dict(saved)


def _buffer_option(sync: bool) -> dict[str, Any]:
    """Whether forward sends rank 0's buffers around; torch 2.13 gave the option a new name."""
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": sync}


class _NoSync(AbstractContextManager[None]):
    """`DistributedDataParallel.no_sync`, but it can be entered again in every step."""

    def __init__(self, model: DistributedDataParallel, learns: Callable[[], bool]) -> None:
        self.model, self.learns = model, learns

    def __enter__(self) -> None:
        # while torch learns a static graph every backward has to reduce: the mean of sums is the sum of means
        self.model.require_backward_grad_sync = self.learns()

    def __exit__(self, *_: object) -> None:
        self.model.require_backward_grad_sync = True
