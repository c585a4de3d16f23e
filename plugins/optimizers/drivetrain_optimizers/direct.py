"""torch's Adam, AdamW and SGD, whose fused kernels are called at once: same kernel, same bits, a third of the host's time; and the
process is ready half a second earlier.

`torch.optim` gathers every parameter's state anew in each step, sorts all by device and type, and announces the step to the
profiler and to hooks: some 60 µs for ten small parameters whose kernel takes 9, and more with cold caches. Here the lists are
made once, and each step sees whether they still hold. Where they do not, or somebody watches, torch's own step runs.

An optimizer's methods import torch.compile, 850 modules, to tell it not to trace them. Here they do only if it has been imported:
otherwise nothing traces.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from functools import wraps
from itertools import repeat
from operator import is_, is_not
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.optim.sgd import sgd
from torch.utils._python_dispatch import _disable_current_modes

_HOOKS = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
with _disable_current_modes():  # a number, whatever is simulated or the default where this is first imported
    _ONE = torch.ones((), dtype=torch.float32, device="cpu")
_PLUS_ONE: dict[str, Any] = {
    "lr": -1.0,
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "maximize": False,
    "is_first_step": False,
}
_SGD_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
_UNSCALED: dict[str, Any] = {"grad_scale": None, "found_inf": None}


class _Group(NamedTuple):
    """A parameter group whose parameters have one device and type, and each its state."""

    group: dict[str, Any]
    parameters: list[Tensor]
    states: list[dict[str, Tensor]]
    placements: Any  # of the shards, where they are some (DTensor)


def _unwrapped(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` without what torch has put around it; the wrappers of others stay."""
    while method.__globals__["__name__"] in ("torch._compile", "torch.optim.optimizer") and hasattr(method, "__wrapped__"):
        method = method.__wrapped__
    return method


def _without_compiler(guarded: Callable[..., Any], plain: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """An optimizer's method, by `plain`, or what it is without torch's wrappers, where the compiler has not been imported."""
    other = plain or _unwrapped(guarded)

    @wraps(guarded)
    def method(*args: Any, **kwargs: Any) -> Any:
        return (guarded if "torch._dynamo" in sys.modules else other)(*args, **kwargs)

    return method


class _Direct(torch.optim.Optimizer):
    """What they share. A subclass says which tensors of a state its kernel takes, and calls it."""

    add_param_group = _without_compiler(torch.optim.Optimizer.add_param_group)
    zero_grad = _without_compiler(torch.optim.Optimizer.zero_grad)
    state_dict = _without_compiler(torch.optim.Optimizer.state_dict)
    load_state_dict = _without_compiler(torch.optim.Optimizer.load_state_dict)

    _whole_step: ClassVar[Callable[[Any, Any], Any]]  # torch's
    _groups: list[_Group] | None = None  # None: torch's own step has to run first
    _states: list[dict[str, Tensor]]
    _no_grad: torch.no_grad  # made once: it is entered in every step

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        raise NotImplementedError

    def _call(self, group: dict[str, Any], tensors: list[list[Tensor]]) -> None:
        raise NotImplementedError

    def step(self, closure: Any = None) -> Any:
        """One update, as torch's."""
        if closure is None and not self._is_watched():
            gathered = self._gathered()
            if gathered is not None:
                with self._no_grad:
                    for group, tensors in zip(self.param_groups, gathered, strict=True):
                        self._call(group, tensors)
                return None
        loss = self._whole_step(closure)
        self._groups = self._found()
        return loss

    step.hooked = True  # type: ignore[attr-defined]  # torch is to put its profiler and hooks around `_whole_step` alone

    def _is_watched(self) -> bool:
        """Whether hooks or a profiler are to hear of the step, or a scaler has a say in it."""
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks or _HOOKS[0] or _HOOKS[1]
        scaled = "found_inf" in self.__dict__ or "grad_scale" in self.__dict__
        return bool(hooks) or scaled or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]

    def _found(self) -> list[_Group] | None:
        """The lists, if the kernel can be called with them."""
        self._states, self._no_grad = list(self.state.values()), torch.no_grad()
        found = []
        for group in self.param_groups:
            parameters = list(group["params"])
            if not parameters or not group["fused"] or group["differentiable"] or group.get("capturable"):
                return None
            states = [self.state.get(p, {}) for p in parameters]
            names = [name for name in self._names(group) if name != "step"]
            if any(not isinstance(state.get(name), Tensor) for state in states for name in names):
                return None
            tensors = [*parameters, *(state[name] for state in states for name in names)]
            placements = {getattr(tensor, "placements", None) for tensor in tensors}
            if len({(t.device, t.dtype) for t in tensors}) > 1 or len(placements) > 1 or parameters[0].is_complex():
                return None
            found.append(_Group(group, parameters, states, *placements))
        return found

    def _gathered(self) -> list[list[list[Tensor]]] | None:
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
            try:
                tensors: list[list[Any]] = [parameters, grads, *([s[name] for s in states] for name in self._names(group))]
            except KeyError:  # an option has changed, which asks for more
                return None
            if placements is not None:
                if any(getattr(grad, "placements", None) != placements for grad in grads):
                    return None
                tensors = [[getattr(tensor, "_local_tensor", tensor) for tensor in each] for each in tensors]
            gathered.append(tensors)
        return gathered


def _same(now: Collection[Any], before: Sequence[Any]) -> bool:
    """Whether these are the very same objects, in the same order."""
    return len(now) == len(before) and all(map(is_, now, before))


def _hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """torch's step of a class, with profiler and hooks around it as torch puts them when it makes the first one of a class."""
    hook = torch.optim.Optimizer.profile_hook_step
    guarded = step if getattr(step, "hooked", False) else hook(step)
    bare = _unwrapped(guarded)
    if bare is guarded:  # somebody else's wrapper around torch's
        return guarded

    def plain(self: torch.optim.Optimizer, closure: Any = None) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):  # the other thing that torch's wrapper does
            return bare(self, closure)

    return _without_compiler(guarded, hook(plain))


class _AdamFamily(_Direct):
    kernel: ClassVar[Callable[..., None]]

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "step", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))

    def _call(self, group: dict[str, Any], tensors: list[list[Tensor]]) -> None:
        parameters, grads, averages, squares, steps, *largest = tensors
        _count(steps)
        self.kernel(
            parameters,
            grads,
            averages,
            squares,
            largest[0] if largest else [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            **_UNSCALED,
        )


def _count(steps: list[Tensor]) -> None:
    """Add 1 to each."""
    first = steps[0]
    if type(first) is Tensor and first.is_cpu and first.dtype == torch.float32:
        # one call for all, where `_foreach_add_` makes one of each: SGD with the rate −1 and gradients of 1
        torch._fused_sgd_(steps, [_ONE] * len(steps), [], **_PLUS_ONE)
    else:
        torch._foreach_add_(steps, 1)


class Adam(_AdamFamily, torch.optim.Adam):
    """`torch.optim.Adam`."""

    kernel = staticmethod(torch._fused_adam_)
    _whole_step = _hooked(torch.optim.Adam.step)


class AdamW(_AdamFamily, torch.optim.AdamW):
    """`torch.optim.AdamW`."""

    kernel = staticmethod(torch._fused_adamw_)
    _whole_step = _hooked(torch.optim.AdamW.step)


class SGD(_Direct, torch.optim.SGD):
    """`torch.optim.SGD`."""

    _whole_step = _hooked(torch.optim.SGD.step)

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _init_group(self, group: dict[str, Any], params: list[Any], grads: list[Any], buffers: list[Any]) -> Any:
        """torch's. Its fused kernel takes no step that is the first for some parameters only: those are updated here, by themselves."""
        has_sparse: Any = super()._init_group(group, params, grads, buffers)  # type: ignore[no-untyped-call]
        new = [index for index, buffer in enumerate(buffers) if buffer is None] if group["fused"] else []
        if 0 < len(new) < len(buffers):
            parameters, gradients, made = ([each[index] for index in new] for each in (params, grads, buffers))
            options: dict[str, Any] = {name: group[name] for name in _SGD_OPTIONS}
            options |= {name: getattr(self, name, None) for name in _UNSCALED}
            sgd(parameters, gradients, made, has_sparse, fused=True, **options)
            for parameter, buffer in zip(parameters, made, strict=True):
                self.state[parameter]["momentum_buffer"] = buffer
            for index in reversed(new):
                del params[index], grads[index], buffers[index]
        return has_sparse

    def _call(self, group: dict[str, Any], tensors: list[list[Tensor]]) -> None:
        parameters, grads, *buffers = tensors
        options = {name: group[name] for name in _SGD_OPTIONS}
        # any momentum has its buffers already
        torch._fused_sgd_(parameters, grads, buffers[0] if buffers else [], is_first_step=False, **options, **_UNSCALED)
