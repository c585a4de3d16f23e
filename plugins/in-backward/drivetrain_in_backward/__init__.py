"""Each weight is updated as soon as its gradient is there, and the gradient goes: they are never all in memory at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from drivetrain import Callback, ConfigError, ModelError, Problem, component, hook

if TYPE_CHECKING:
    from drivetrain import CallbackContext

__all__ = ["OptimizerInBackward"]

_ASK_FOR_GRADIENTS = ("on_gradients", "on_clipped", "on_optimizer_step")


@component
class OptimizerInBackward(Callback):
    """Update each weight in the backward pass, when its gradient is complete, and let the gradient go.

    Saves the memory of the gradients, one number a parameter in the weights' type, with the same bits as an update after backward.
    A weight's gradient is complete when everything that needs the weight in backward has run, so nothing sees the new value.

    It asks for what an early update allows: one process, one microbatch a step, no `max_grad_norm` (the norm is known when all
    gradients are), no loss scale, an optimizer whose weights do not depend on each other (tried out at the start on a few
    numbers), and no component that looks at gradients. Anything else is refused before the first step, with what to change.

    Source: Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (arXiv:2306.09782),
    figure 1, for any optimizer; `torch.Tensor.register_post_accumulate_grad_hook`.
    """

    changes_training: ClassVar[bool] = False
    without_gradients: ClassVar[bool] = True

    _handles: list[Any] = attrs.field(factory=list, init=False, repr=False)
    _steps: int = attrs.field(default=0, init=False, repr=False)  # backward passes of steps so far
    _is_training: bool = attrs.field(default=False, init=False, repr=False)  # whether backward is that of a step
    _has_begun: bool = attrs.field(default=False, init=False, repr=False)  # whether this step has come to it

    @hook(tryfirst=True)
    def on_run_start(self, ctx: CallbackContext) -> None:
        """Look whether all can be updated early, and begin; first, since others go by `ctx.updates_in_backward`.

        Raises:
            ConfigError: for whatever cannot.
        """
        if problems := list(_problems(ctx)):
            raise ConfigError(problems)
        ctx.updates_in_backward = True
        names = {parameter: name for name, parameter in ctx.model.named_parameters()}
        for index, group in enumerate(ctx.optimizer.param_groups):
            for parameter in group["params"]:
                if parameter.requires_grad:
                    update = _Update(ctx.optimizer, index, parameter, names.get(parameter, "?"))
                    handle = parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, update))
                    self._handles.append(handle)

    def on_step_start(self, ctx: CallbackContext) -> None:
        """Nothing of this step has changed yet."""
        self._has_begun = False

    def on_loss(self, ctx: CallbackContext) -> None:
        """The backward pass that follows is the training's, not one that somebody runs beside it.

        Raises:
            ModelError: when the step begins anew in smaller microbatches, since memory ran out.
        """
        if self._has_begun or ctx.microbatches > 1:
            raise ModelError(
                "optimizer_in_backward: memory ran out in this step, which cannot be repeated in smaller parts, since weights are "
                "updated while backward runs. Set a smaller per_device_batch_size, or leave optimizer_in_backward out."
            )
        self._has_begun = self._is_training = True
        self._steps += 1

    def on_backward(self, ctx: CallbackContext) -> None:
        """All is updated."""
        self._is_training = False

    def on_run_end(self, ctx: CallbackContext) -> None:
        """Leave the parameters as they were."""
        self._is_training = False
        while self._handles:
            self._handles.pop().remove()

    def _on_gradient(self, update: _Update, parameter: Tensor) -> None:
        if self._is_training:
            update(self._steps)
            parameter.grad = None


class _Update:
    """One parameter's part of an optimizer's step, with the state that the whole optimizer has for it."""

    def __init__(self, optimizer: torch.optim.Optimizer, group: int, parameter: nn.Parameter, name: str = "") -> None:
        self._whole, self._group, self._parameter, self._name = optimizer, group, parameter, name
        self._own = {**optimizer.param_groups[group], "params": [parameter]}
        self._optimizer = _like(optimizer, [self._own])
        self._newest = 0

    def __call__(self, step: int) -> None:
        """Update the parameter by its gradient; once in a step."""
        if step == self._newest:
            raise ModelError(
                f"optimizer_in_backward: the gradient of {self._name!r} comes in several parts (reentrant activation checkpointing "
                "does so). Use the key activation_checkpointing in its place, or leave optimizer_in_backward out."
            )
        self._newest, parameter, state = step, self._parameter, self._optimizer.state
        known = self._whole.state.get(parameter)
        if known is None:  # the first step, or the run has gone back to before it
            state.pop(parameter, None)
        elif state.get(parameter) is not known:  # a state has been loaded
            state[parameter] = known
        group = self._whole.param_groups[self._group]  # another one when a state has been loaded
        self._own.update({name: value for name, value in group.items() if name != "params"})  # the learning rate, say
        self._optimizer.step()
        if known is None and parameter in state:
            self._whole.state[parameter] = state[parameter]


def _like(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The same optimizer over other groups, without state."""
    other: torch.optim.Optimizer = object.__new__(type(optimizer))
    other.__dict__.update(optimizer.__dict__)
    other.__dict__.pop("step", None)  # torch's schedulers put one there, which is bound to the optimizer
    other.param_groups, other.state = groups, defaultdict(dict)
    return other


def _problems(ctx: CallbackContext) -> Iterator[Problem]:
    """Everything in a run that needs all gradients at once."""
    mine = "with optimizer_in_backward"
    if ctx.config.max_grad_norm:
        yield Problem("max_grad_norm", f"must be false {mine}: the norm of all gradients is known only when all are there")
    if ctx.strategy.world_size > 1:
        yield Problem("distributed", f"must be one process {mine}; to spread memory over several, use fsdp without it")
    if (parts := ctx.run.source.split.accumulation) > 1:
        yield Problem("gradient_accumulation_steps", f"must be 1 {mine}, not {parts}: gradients would add up in memory")
    if ctx.precision.scales:
        yield Problem(
            "precision", f"cannot be {ctx.precision.name} {mine}: it has work to do around the whole update. Use bf16"
        )
    for event in _ASK_FOR_GRADIENTS:
        for _, thing in ctx.run.pm.listeners(event):
            if not thing.without_gradients:
                yield Problem("callbacks", f"{thing.plugin_name} needs gradients ({event}), which are gone by then {mine}")
    if (why_not := _why_not_apart(ctx.optimizer)) is not None:
        yield Problem("optimizer", f"{type(ctx.optimizer).__name__} cannot be used {mine}: {why_not}")


def _why_not_apart(optimizer: torch.optim.Optimizer) -> str | None:
    """Why updating parameters one by one would not be the optimizer's step; None when it is, bit for bit.

    Tried out on small parameters of the same types and numbers of dimensions.
    """
    hooked: Any = optimizer
    if hooked._optimizer_step_pre_hooks or hooked._optimizer_step_post_hooks:
        return "hooks are registered on its step, which would run for each parameter"
    together, apart, untouched = (_small(optimizer) for _ in range(3))
    whole = _like(optimizer, together)
    parts = [_Update(_like(optimizer, apart), i, p) for i, group in enumerate(apart) for p in group["params"]]
    before = [_settings(group) for group in together]
    devices = {p.device for p in _parameters(apart) if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices):
            for step in range(1, 4):
                _give_gradients(together, step)
                whole.step()
                _give_gradients(apart, step)
                for part in parts:
                    part(step)
    except Exception as error:  # an optimizer that has more than groups and state may do anything here
        return f"it does not take parameters one by one ({type(error).__name__}: {error})"
    if [_settings(group) for group in together] != before:
        return "its step changes what is kept for all parameters together"
    if any(map(torch.equal, _parameters(together), _parameters(untouched))):
        return "its step does not go by its parameter groups"
    if not all(map(torch.equal, _parameters(together), _parameters(apart))):
        return "its update of one parameter depends on the others"
    return None


def _small(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The groups, with two small parameters for each sort that they have."""
    groups = []
    for group in optimizer.param_groups:
        sorts = {(p.ndim, p.dtype, p.device) for p in group["params"]}
        small = []
        for ndim, dtype, device in sorted(sorts, key=str):
            for sign in (1, -1):
                size = 64 if ndim <= 2 else 4
                numbers = torch.linspace(-sign, sign, size**ndim, device=device).to(dtype)
                small.append(nn.Parameter(numbers.reshape([size] * ndim)))
        groups.append({**group, "params": small, "lr": 0.1})  # a schedule may begin at 0
    return groups


def _give_gradients(groups: list[dict[str, Any]], step: int) -> None:
    for index, parameter in enumerate(_parameters(groups)):
        numbers = torch.linspace(-1, 1, parameter.numel(), device=parameter.device)
        parameter.grad = (numbers * (3 + step) + index).cos().reshape(parameter.shape).to(parameter.dtype)


def _parameters(groups: list[dict[str, Any]]) -> list[nn.Parameter]:
    return [p for group in groups for p in group["params"]]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: repr(value) for name, value in group.items() if name != "params"}
