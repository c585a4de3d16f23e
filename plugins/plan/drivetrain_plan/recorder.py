"""What a step does, written down operation by operation: memory as it comes and goes, arithmetic, traffic and collectives."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ACTIVATIONS, TEMPORARY, GATHERED = "activations", "temporary", "gathered parameters"
UNREDUCED = "unreduced gradients"  # of a strategy that divides them only at the last microbatch
BEFORE = "before"  # the phase of what was there when the step began
_COLLECTIVES = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_gather_into_tensor_out": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "broadcast_": "broadcast",
    "alltoall_base_": "all-to-all",
    "all_to_all_single": "all-to-all",
}
_NO_TRAFFIC = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "wait_tensor"}
_NO_TRAFFIC |= {"_unsafe_view", "_reshape_alias", "lift_fresh", "set_", "resize_"}
_LOOKUPS = {"embedding", "index", "index_select", "gather", "nll_loss_forward", "nll_loss_backward", "slice"}
_HERE = ("/torch/", "/drivetrain/", "/drivetrain_plan/")


class Storage:
    """One piece of memory."""

    __slots__ = ("kind", "phase", "size")

    def __init__(self, size: int, phase: str) -> None:
        self.size, self.phase, self.kind = size, phase, ""


class Operation(NamedTuple):
    """Operations that cost the same: equal ones are counted, not listed."""

    phase: str
    name: str
    flops: int
    traffic: int  # bytes read and written
    dtype: torch.dtype | None  # of the first tensor


class Collective(NamedTuple):
    """Collectives of one kind and size among as many processes."""

    phase: str
    name: str
    size: int  # bytes of the whole tensor: what all-gather gives and reduce-scatter takes
    ranks: tuple[int, ...]


class Recorder(TorchDispatchMode):
    """Inside, every operation is written down. Works on real tensors as on fake ones.

    Attributes:
        phase: of the step, set by whoever knows it.
        operations, collectives: how often each was done since `clear`.
        events: (storage, bytes more or less, phase), in order.
        reads: places outside torch and Drivetrain that read a value, which a simulation does not have.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "build"
        self.operations: Counter[Operation] = Counter()
        self.collectives: Counter[Collective] = Counter()
        self.events: list[tuple[Storage, int, str]] = []
        self.reads: Counter[str] = Counter()
        self._live: dict[int, tuple[weakref.ref[Any], Storage]] = {}
        self._resize: Any = None

    def clear(self) -> None:
        """Forget what was done; what is alive stays known."""
        self.operations.clear()
        self.collectives.clear()
        self.events = [(storage, storage.size, BEFORE) for _, storage in self._live.values()]

    # -- the mode ----------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        self._resize = torch.UntypedStorage.resize_
        original, storages = self._resize, self._live

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            if (found := storages.get(storage._cdata)) is not None:
                self._resized(found[1], size)
            return result

        _STORAGES.resize_ = resize_  # no operation: FSDP frees gathered parameters so
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        _STORAGES.resize_ = self._resize
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back with the local tensors
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags:
            return self._read(func, args, kwargs)
        result = func(*args, **kwargs)
        given, made = _tensors((args, kwargs)), _tensors(result)
        for tensor in (*made, *given):
            self._see(tensor)
        if func.namespace == "fsdp" and func._overloadpacket.__name__ != "chunk_cat":  # what blocks are gathered into
            self.tag([result, kwargs.get("out")], GATHERED)
        self._count(func, args, kwargs, result, given, made)
        return result

    def _read(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A value is asked for. Fake tensors have none; 0 stands in its place: no overflow, nobody wants to stop."""
        if not any(isinstance(tensor, FakeTensor) for tensor in _tensors(args)):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if self.phase.startswith("forward") and (place := _caller()) is not None:
            self.reads[place] += 1
        dtype = args[0].dtype
        if dtype.is_floating_point and _in_optimizer():  # the number of a step, which is divided by
            return 1.0
        return 0.0 if dtype.is_floating_point else False if dtype is torch.bool or func._schema.name != _SCALAR else 0

    # -- memory ------------------------------------------------------------------------------------------------------------

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if (known := self._live.get(key)) is not None and known[0]() is not None:
            return
        entry = Storage(storage.nbytes(), self.phase)
        self._live[key] = (weakref.ref(storage, self._forget(key, entry)), entry)
        self.events.append((entry, entry.size, self.phase))

    def _forget(self, key: int, entry: Storage) -> Callable[[Any], None]:
        def forget(ref: Any) -> None:
            if (known := self._live.get(key)) is not None and known[1] is entry:
                del self._live[key]
            if entry.size:
                self.events.append((entry, -entry.size, self.phase))

        return forget

    def _resized(self, entry: Storage, size: int) -> None:
        self.events.append((entry, size - entry.size, self.phase))
        entry.size = size
        entry.kind = entry.kind or GATHERED

    def tag(self, tensors: Iterable[Any], kind: str, again: bool = False) -> None:
        """Say what the memory of these tensors is for; the first that does is right, unless `again`."""
        for tensor in local_tensors(tensors):
            self._see(tensor)
            entry = self._live[tensor.untyped_storage()._cdata][1]
            if not entry.kind or again:
                entry.kind = kind

    def alive(self, phase: str) -> list[Storage]:
        """What was made in a phase, lives, and belongs to nothing else."""
        return [entry for _, entry in self._live.values() if entry.phase == phase and not entry.kind]

    # -- work --------------------------------------------------------------------------------------------------------------

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any, given: list[Tensor], made: list[Tensor]) -> None:
        name = func._overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            self._count_collective(name, (args, kwargs), given, made)
            return
        if name in _NO_TRAFFIC or func.namespace == "prim" or _is_view(func):  # prim: questions such as which device it is on
            return
        flops, packet = 0, func._overloadpacket
        if (formula := _FORMULAS.get(packet)) is not None:
            flops = formula(*args, **kwargs, out_val=result)
        traffic = _bytes(made)
        traffic = 2 * traffic if name in _LOOKUPS else traffic + _bytes(given)
        dtype = given[0].dtype if given else made[0].dtype if made else None
        self.operations[Operation(self.phase, name, int(flops), traffic, dtype)] += 1

    def _count_collective(self, name: str, arguments: Any, given: list[Tensor], made: list[Tensor]) -> None:
        kind = _COLLECTIVES.get(name)
        if kind is None:
            return
        size = max(_bytes(made), _bytes(given)) if kind != "all-reduce" else _bytes(given)
        if name.endswith("_base_") or name == "allgather_":  # given are both the whole and this rank's part
            size = max((t.nbytes for t in given), default=0)
        self.collectives[Collective(self.phase, kind, size, _ranks(arguments))] += 1
        if kind == "all-gather":
            self.tag(made or given[:1], GATHERED)


_STORAGES: Any = torch.UntypedStorage
_SCALAR = "aten::_local_scalar_dense"
_FORMULAS: dict[Any, Callable[..., int]] = dict(flop_counter.flop_registry)


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> int:
    return int(flop_counter.sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward_flops(out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> int:
    return int(flop_counter.sdpa_backward_flop_count(out.shape, query.shape, key.shape, value.shape))


_FORMULAS[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = _attention_flops
_FORMULAS[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward] = _attention_backward_flops


def _tensors(tree: Any) -> list[Tensor]:
    """Of an operation's arguments or results; pytree would take longer than the operation."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [tensor for item in tree for tensor in _tensors(item)]
    if isinstance(tree, dict):
        return [tensor for item in tree.values() for tensor in _tensors(item)]
    return []


def local_tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of this process alone, those inside of parameters (the constants of quantized ones) included."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, DTensor):
            yield leaf._local_tensor
        elif isinstance(leaf, Tensor):
            yield leaf
            state: Any = getattr(leaf, "quant_state", None)
            for part in () if state is None else (state, getattr(state, "state2", None)):
                yield from (t for t in vars(part or object).values() if isinstance(t, Tensor)) if part is not None else ()


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _ranks(arguments: Any) -> tuple[int, ...]:
    for leaf in pytree.tree_leaves(arguments):
        if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type()):
            return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(leaf)))
        if isinstance(leaf, str) and leaf in _groups():
            return tuple(dist.get_process_group_ranks(_groups()[leaf]))
    return tuple(range(dist.get_world_size()))


def _groups() -> dict[str, Any]:
    return {name: group for group, name in dist.distributed_c10d._world.pg_names.items()}


def _in_optimizer() -> bool:
    frame: Any = sys._getframe(2)
    for _ in range(8):
        if frame is None or "/torch/optim/" in frame.f_code.co_filename.replace("\\", "/"):
            return frame is not None
        frame = frame.f_back
    return False


def _caller() -> str | None:
    """The innermost place outside torch and Drivetrain, as FILE:LINE."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename.replace("\\", "/")
        if not any(part in name for part in _HERE) and "/drivetrain_" not in name and not name.startswith("<"):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return None
