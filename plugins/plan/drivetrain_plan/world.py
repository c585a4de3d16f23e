"""A world that is not there: many processes of which this is one, tensors without memory, initial weights without numbers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # here and now: imported inside, it would see what is replaced there
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from drivetrain import DeviceManager, DrivetrainError, Strategy
from drivetrain_plan.recorder import Recorder

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def simulated(ranks: int, per_node: int) -> Iterator[Recorder]:
    """Inside, this process is rank 0 of `ranks` that torchrun started, and tensors have shapes but no memory.

    Collectives return at once and move nothing (torch's fake process group). What a program may not ask of tensors without
    values is answered as if every value were 0, and written down.

    Raises:
        DrivetrainError: when this process is part of a real group already.
    """
    if dist.is_initialized():
        raise DrivetrainError("plan: this process has joined others already; plan before that, or in a process of its own.")
    environment = {"RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(min(ranks, per_node))}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    left = {key: value for key, value in os.environ.items() if key not in _LAUNCHED}
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, left | (environment if ranks > 1 else {}), clear=True))
        stack.enter_context(patch.object(nn.Module, "_apply", _apply))
        stack.enter_context(patch.object(nn.init, "_no_grad_trunc_normal_", lambda tensor, *_, **__: tensor))
        stack.enter_context(patch("torch.nn.parallel.distributed._verify_param_shape_across_processes", lambda *_: None))
        stack.enter_context(patch("torch.nn.parallel.distributed._sync_module_states", lambda **_: None))
        stack.enter_context(patch.object(DistributedDataParallel, "__init__", _reducing(DistributedDataParallel.__init__)))
        stack.enter_context(patch.object(DistributedDataParallel, "register_comm_hook", lambda *_: None))
        stack.enter_context(patch.object(torch.Tensor, "_make_subclass", staticmethod(_make_subclass)))
        for name in ("__init__", "__getitem__", "_concatenate"):  # which ranks there are is no matter of simulation
            if (made := getattr(DeviceMesh, name, None)) is not None:
                stack.enter_context(patch.object(DeviceMesh, name, _for_real(made)))
        if hasattr(_fsdp_param, "_chunk_with_empty"):
            stack.enter_context(patch.object(_fsdp_param, "_chunk_with_empty", _first_chunk))
        if ranks > 1:
            stack.enter_context(patch.object(sys, "excepthook", sys.excepthook))  # torch names the rank there from here on
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
            stack.callback(dist.destroy_process_group)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(Recorder())


def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """As torch's, which refuses fake parameters that somebody has looked at."""
    for module in self.children() if recurse else ():
        module._apply(fn)
    for parameter in self._parameters.values():
        if parameter is None:
            continue
        with torch.no_grad():
            changed: Tensor = fn(parameter)
        if changed is not parameter and (changed.dtype != parameter.dtype or changed.device != parameter.device):
            made = nn.Parameter(changed, parameter.requires_grad)
            torch._C._swap_tensor_impl(parameter, made)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self


def _for_real(call: Any) -> Any:
    """A function whose tensors have values."""

    @wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        with real():
            return call(*args, **kwargs)

    return run


def _first_chunk(tensor: Tensor, num_chunks: int, dim: int) -> list[Tensor]:
    """This rank's part alone; for thousands of ranks FSDP makes as many views of each parameter, which takes longer than the step."""
    return [tensor.narrow(dim, 0, -(-tensor.shape[dim] // num_chunks))]


_made: dict[Any, Any] = {}


def _make_subclass(cls: Any, data: Tensor, requires_grad: bool = False, **kwargs: Any) -> Any:
    """As torch's, also for fake tensors: quantized parameters are of a class of their own."""
    if not isinstance(data, FakeTensor):
        return _torchs_make_subclass(cls, data, requires_grad, **kwargs)
    made: Any = data.detach().requires_grad_(requires_grad)
    made.__class__ = _made.setdefault(cls, type(cls)(cls.__name__, (cls, FakeTensor), {}))
    return made


_torchs_make_subclass: Any = torch.Tensor._make_subclass


def _reducing(init: Any) -> Any:
    """DDP's constructor, with the reduction of buckets as a hook: what the fake group returns, its own reducer cannot use."""
    register = DistributedDataParallel.register_comm_hook

    def reduce(_state: Any, bucket: Any) -> torch.futures.Future[Tensor]:
        dist.all_reduce(bucket.buffer())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    reduce.__annotations__ = {}  # which torch would compare with its own

    @wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        register(self, None, reduce)
        self.reducer = _Reducer(self.reducer)

    return __init__


class _Reducer:
    """DDP's reducer, which keeps its first buckets: to order them anew it would send their numbers around."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return (lambda: False) if name == "_rebuild_buckets" else getattr(self._reducer, name)


@contextmanager
def of_memory(size: float | None) -> Iterator[None]:
    """Inside, every device has that many bytes of memory of its own; None as for a CPU, which has none."""
    with patch.object(DeviceManager, "total_memory", None if size is None else int(size)):
        yield


@contextmanager
def meeting(components: Iterable[type]) -> Iterator[None]:
    """Inside, the strategies that components of these classes make meet processes that are not there."""
    with ExitStack() as stack:
        for cls in components:
            stack.enter_context(patch.object(cls, "make_strategy", _meeting(cls.make_strategy)))  # type: ignore[attr-defined]
        yield


def _meeting(make: Any) -> Any:
    @wraps(make)
    def make_strategy(self: Any, ctx: Any) -> Strategy:
        return rank_of(make(self, ctx))

    return make_strategy


def rank_of(strategy: Strategy) -> Strategy:
    """Let a strategy meet processes that are not there: for this it needs tensors with values."""
    setup = strategy.setup

    def meet(device: torch.device) -> None:
        with real():
            setup(device)

    strategy.setup = meet  # type: ignore[method-assign]
    strategy.gather = lambda value: [value] * strategy.world_size  # type: ignore[method-assign]
    return strategy


def real() -> Any:
    """The context in which tensors have memory again, within a simulated world."""
    return _disable_current_modes()
