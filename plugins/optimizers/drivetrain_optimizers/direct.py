"""torch's Adam and AdamW, whose fused kernel is called at once: same kernel, same bits, a third of the host's time.

`torch.optim` gathers every parameter's state anew in each step, sorts all by device and type, and announces the step to the
profiler and to hooks: some 60 µs for ten small parameters whose kernel takes 9, and more with cold caches. Here the lists are
made once, and each step sees whether they still hold. Where they do not, or somebody watches, torch's own step runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import repeat
from operator import is_, is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

_WATCHERS = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
_ONE = torch.ones(())
_PLAIN_SGD: dict[str, Any] = {
    "weight_decay": 0.0,
    "momentum": 0.0,
    "dampening": 0.0,
    "nesterov": False,
    "maximize": False,
    "is_first_step": False,
}
_ARGUMENTS = ("amsgrad", "lr", "weight_decay", "eps", "maximize")


class _Group(NamedTuple):
    """A parameter group whose parameters have one device and type, and each its state."""

    group: dict[str, Any]
    parameters: list[Tensor]
    states: list[dict[str, Tensor]]
    placements: Any  # of the shards, where they are some (DTensor)


class _Direct(torch.optim.Adam):
    """What both share. `_kernel` and `_whole_step` are torch's."""

    _kernel: Callable[..., None]
    _whole_step: Callable[[Any, Any], Any]
    _groups: list[_Group] | None = None  # None: torch's own step has to run first
    _states: list[dict[str, Tensor]]
    _no_grad: torch.no_grad  # made once: it is entered in every step

    def step(self, closure: Any = None) -> Any:
        """One update, as torch's."""
        if closure is None and not self._is_watched():
            tensors = self._gathered()
            if tensors is not None:
                self._update(tensors)
                return None
        loss = self._whole_step(closure)
        self._groups = self._found()
        return loss

    step.hooked = True  # type: ignore[attr-defined]  # torch is to put its profiler and hooks around `_whole_step` alone

    def _is_watched(self) -> bool:
        """Whether hooks or a profiler are to hear of the step, or a scaler has a say in it."""
        watchers = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks or _WATCHERS[0] or _WATCHERS[1]
        scaled = "found_inf" in self.__dict__ or "grad_scale" in self.__dict__
        return bool(watchers) or scaled or torch.autograd._profiler_enabled()

    def _found(self) -> list[_Group] | None:
        """The lists, if the kernel can be called with them."""
        self._states, self._no_grad = list(self.state.values()), torch.no_grad()
        found = []
        for group in self.param_groups:
            parameters = list(group["params"])
            states = [self.state[p] for p in parameters if p in self.state]
            if not states or len(states) < len(parameters):
                return None
            if not group["fused"] or group["differentiable"] or group["capturable"]:
                return None
            tensors = [*parameters, *(state["exp_avg"] for state in states), *(state["exp_avg_sq"] for state in states)]
            placements = {getattr(tensor, "placements", None) for tensor in tensors}
            if len({(p.device, p.dtype) for p in tensors}) > 1 or len(placements) > 1 or any(map(torch.is_complex, parameters)):
                return None
            found.append(_Group(group, parameters, states, *placements))
        return found

    def _gathered(self) -> list[tuple[list[Tensor], ...]] | None:
        """What the kernel takes, for each group; None where something is no longer as it was found."""
        groups, now = self._groups, self.param_groups
        if groups is None or len(groups) != len(now) or not _same(self.state.values(), self._states):
            return None
        gathered = []
        for (group, parameters, states, placements), current in zip(groups, now, strict=True):
            if current is not group or not _same(group["params"], parameters) or isinstance(group["lr"], Tensor):
                return None
            grads = [p.grad for p in parameters]
            if not all(map(is_not, grads, repeat(None))):
                return None
            averages, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
            lists = [parameters, grads, averages, squares, [s["max_exp_avg_sq"] for s in states] if group["amsgrad"] else []]
            if placements is not None:
                if any(getattr(grad, "placements", None) != placements for grad in grads):  # type: ignore[union-attr]
                    return None
                lists = [[tensor._local_tensor for tensor in tensors] for tensors in lists]  # type: ignore[union-attr]
            gathered.append((*lists, [s["step"] for s in states]))
        return gathered  # type: ignore[return-value]

    def _update(self, gathered: list[tuple[list[Tensor], ...]]) -> None:
        with self._no_grad:
            for group, (*tensors, steps) in zip(self.param_groups, gathered, strict=True):
                _count(steps)
                beta1, beta2 = group["betas"]
                arguments = {name: group[name] for name in _ARGUMENTS}
                self._kernel(*tensors, steps, beta1=beta1, beta2=beta2, grad_scale=None, found_inf=None, **arguments)


def _count(steps: list[Tensor]) -> None:
    """Add 1 to each."""
    if steps[0].is_cpu and steps[0].dtype == torch.float32:
        # one call for all, where `_foreach_add_` makes one of each: SGD with the rate −1 and gradients of 1
        torch._fused_sgd_(steps, [_ONE] * len(steps), [], lr=-1.0, **_PLAIN_SGD)
    else:
        torch._foreach_add_(steps, 1)


def _same(now: Iterable[Any], before: list[Any]) -> bool:
    """Whether these are the very same objects, in the same order."""
    return len(now) == len(before) and all(map(is_, now, before))  # type: ignore[arg-type]


def _hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """torch's step of a class, with profiler and hooks around it as torch puts them when it makes the first one of a class."""
    return step if getattr(step, "hooked", False) else torch.optim.Optimizer.profile_hook_step(step)


class Adam(_Direct):
    """`torch.optim.Adam`."""

    _kernel = staticmethod(torch._fused_adam_)
    _whole_step = _hooked(torch.optim.Adam.step)


class AdamW(torch.optim.AdamW, _Direct):
    """`torch.optim.AdamW`."""

    step = _Direct.step
    _kernel = staticmethod(torch._fused_adamw_)
    _whole_step = _hooked(torch.optim.AdamW.step)
