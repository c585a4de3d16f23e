"""Models built without memory, and filled block by block with exactly the weights that building them at once would have given.

While the model is built on the meta device, every operation on tensors is written down, and random ones draw their numbers, so that
the random state is what it would be. Later the operations that lead to one block's tensors are done again, each random one from the
random state it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from drivetrain import ModelError

_LOG = "_drivetrain_deferred"


def deferred(make: Callable[[], nn.Module | None]) -> nn.Module | None:
    """Call `make`, which builds a model, without giving the model memory.

    The result lies on the meta device until the strategy `fsdp` shards it. Afterwards torch's random state on the CPU, from which
    initial weights are drawn, is what building the model at once would have left.

    Raises:
        ModelError: when the initial weights depend on values that are read while the model is built, or on a generator of its own.
    """
    log = _Log()
    try:
        with torch.device("meta"), _drawn_at_once(log), _AsIfReal(), log:
            model = make()
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        raise ModelError(f"the model cannot be built on the meta device (torch says: {error}). Build it for real.") from error
    if model is not None:
        setattr(model, _LOG, log)
    return model


class Filler:
    """Gives the tensors that modules hold on the meta device their memory and their first values, in place.

    A model that `deferred` built gets those it would have had. For any other, each module's own `reset_parameters` is called, on the
    CPU.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self._log: _Log | None = model.__dict__.pop(_LOG, None)

    def __call__(self, module: nn.Module) -> None:
        """Fill the tensors that belong to the module itself, not to its parts.

        Raises:
            ModelError: when it does not say what is to be in them.
        """
        tensors = list(_on_meta(module))
        if not tensors:
            return
        if self._log is not None:
            self._put(module, self._log.values(tensors))
            return
        if not callable(reset := getattr(module, "reset_parameters", None)):
            raise ModelError(
                f"a {type(module).__name__} on the meta device has tensors of its own but no reset_parameters() that could fill "
                "them. Build the model with drivetrain_fsdp.deferred(make), or let the configuration name it (defer_init)."
            )
        cpu = torch.device("cpu")
        with torch.device(cpu):
            self._put(module, {id(tensor): torch.empty_like(tensor, device=cpu) for tensor in tensors}, cpu)
            reset()
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                tensor.data = tensor.data.to(self.device)

    def _put(self, module: nn.Module, values: dict[int, Tensor], device: torch.device | None = None) -> None:
        for name, old in module._parameters.items():
            if old is not None and old.is_meta:
                module._parameters[name] = nn.Parameter(values[id(old)].to(device or self.device), old.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = values[id(buffer)].to(device or self.device)


def _on_meta(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and tensor.is_meta:
            yield tensor


class _AsIfReal(TorchFunctionMode):
    """Inside, what would do nothing, or lose values unseen, on the meta device works as on any other."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _IS_META:  # some of torch.nn.init leave such tensors alone
            return False
        if func not in (torch.tensor, torch.as_tensor) or any(isinstance(x, Tensor) for x in args[:1]):
            return func(*args, **kwargs)
        value = func(*args, **kwargs | {"device": "cpu"})
        if not value.numel():  # made to ask for the default device: transformers gives no initial weights on meta
            return value
        return torch.empty_like(value, device="meta").copy_(value)


_IS_META = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]


@contextmanager
def _drawn_at_once(log: _Log) -> Iterator[None]:
    """Let `trunc_normal_` be one operation of the log: it draws until every number is within its bounds, and reads them for that."""
    original: Any = getattr(nn.init, "_no_grad_trunc_normal_", None)
    if original is None:
        yield
        return

    def draw(tensor: Tensor, *args: Any, generator: torch.Generator | None = None) -> Tensor:
        if tensor.device.type != "meta":
            return original(tensor, *args, generator=generator)  # type: ignore[no-any-return]
        log.add(original, (tensor, *args), {"generator": generator}, [tensor], drawn=True, written=[tensor])
        return tensor

    init: Any = nn.init
    init._no_grad_trunc_normal_ = draw
    try:
        yield
    finally:
        init._no_grad_trunc_normal_ = original


@frozen
class _Operation:
    call: Any
    args: Any
    kwargs: Any
    outputs: list[Tensor]
    random: Tensor | None  # the generator's state before it, if it draws numbers

    used: frozenset[int]  # storages
    written: frozenset[int]  # those of them that it makes or changes


def _storages(tree: Any) -> frozenset[int]:
    return frozenset(_storage(x) for x in pytree.tree_leaves(tree) if isinstance(x, Tensor))


class _Log(TorchDispatchMode):
    """The operations done inside this context, in order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[_Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        schema = func._schema.arguments
        changed = [a for a, s in zip(args, schema, strict=False) if s.alias_info is not None and s.alias_info.is_write]
        changed += [kwargs[s.name] for s in schema if s.name in kwargs and s.alias_info is not None]
        self.add(func, args, kwargs, outputs, torch.Tag.nondeterministic_seeded in func.tags, changed)
        return result

    def add(self, call: Any, args: Any, kwargs: Any, outputs: list[Tensor], drawn: bool, written: list[Any]) -> None:
        """Write an operation down. One that draws numbers does so now, for nothing but the generator's state afterwards."""
        random = None
        if drawn:
            if kwargs.get("generator") is not None:
                raise ModelError("the model draws its weights from a generator of its own; build it for real, not on meta.")
            random = torch.default_generator.get_state()
            with _disable_current_modes():
                call(*pytree.tree_map(_scratch, args), **pytree.tree_map(_scratch, kwargs))
        used = _storages((args, kwargs, outputs))
        self.operations.append(_Operation(call, args, kwargs, outputs, random, used, _storages((written, outputs))))

    def values(self, wanted: list[Tensor]) -> dict[int, Tensor]:
        """The tensors by `id` with the values they would have now, on the CPU."""
        real: dict[int, Tensor] = {}  # by meta storage: one dimension over the whole of it
        before = torch.default_generator.get_state()
        try:
            for operation in self._leading_to({_storage(tensor) for tensor in wanted}):
                self._do(operation, real)
        finally:
            torch.default_generator.set_state(before)
        return {id(tensor): _real(tensor, real) for tensor in wanted}

    def _leading_to(self, storages: set[int]) -> list[_Operation]:
        needed, found = set(storages), []
        for operation in reversed(self.operations):
            if operation.written & needed:
                needed |= operation.used
                found.append(operation)
        return found[::-1]

    def _do(self, operation: _Operation, real: dict[int, Tensor]) -> None:
        def given(x: Any) -> Any:
            if isinstance(x, Tensor):
                return _real(x, real) if x.is_meta else x
            return torch.device("cpu") if isinstance(x, torch.device) else x

        if operation.random is not None:
            torch.default_generator.set_state(operation.random)
        result = operation.call(*pytree.tree_map(given, operation.args), **pytree.tree_map(given, operation.kwargs))
        made = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        for meta, tensor in zip(operation.outputs, made, strict=True):
            real.setdefault(_storage(meta), tensor)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _real(tensor: Tensor, real: dict[int, Tensor]) -> Tensor:
    """The part of a real storage that `tensor` is of its own."""
    storage = real[_storage(tensor)].untyped_storage()
    return torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _scratch(x: Any) -> Any:
    """Something of the same size to draw numbers into."""
    if isinstance(x, Tensor):
        return torch.zeros(x.shape, dtype=x.dtype, device="cpu") if x.device.type == "meta" else x
    return torch.device("cpu") if isinstance(x, torch.device) else x
