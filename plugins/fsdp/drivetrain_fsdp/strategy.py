"""The strategy: the mesh, sharding block by block, clipping, and states that any other strategy reads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from drivetrain import ConfigError, Problem, ProcessGroupStrategy
from drivetrain_fsdp.blocks import blocks_to_shard, shared_parameters
from drivetrain_fsdp.deferred import Filler, deferred
from drivetrain_fsdp.tensor import TensorPlan

if TYPE_CHECKING:
    from drivetrain import CallbackContext
    from drivetrain_fsdp import Fsdp


class FsdpStrategy(ProcessGroupStrategy):
    """`fully_shard` on every block and on the model, over processes laid out as [replicas, shards, tensor parallel].

    Attributes:
        mesh: that layout; dimensions of size 1 are left out, but for "shard".
    """

    name = "fsdp"
    mesh: DeviceMesh

    def __init__(self, options: Fsdp, ctx: CallbackContext) -> None:
        super().__init__(options.timeout, options.setup_timeout)
        self.options, self.ctx = options, ctx
        self._orders: dict[int, Tensor] = {}  # by the id of a parameter, when its rows are not in the model's order

    @property
    def data_ranks(self) -> int:
        return self.world_size // self._tensor_size

    @property
    def data_rank(self) -> int:
        return self.rank // self._tensor_size

    @property
    def _tensor_size(self) -> int:
        return 1 if self.options.tensor_parallel is None else self.options.tensor_parallel.size

    def setup(self, device: torch.device) -> None:
        """Join the other processes and lay them out as a mesh.

        Raises:
            ConfigError: when the number of processes is no multiple of what it is to be divided into.
        """
        super().setup(device)
        tensor = self._divisor("tensor_parallel.size", self._tensor_size, self.world_size)
        shards = self.options.shards
        shards = self.data_ranks if shards is None else self._divisor("shards", shards, self.data_ranks)
        sizes = {"replicate": self.data_ranks // shards, "shard": shards, "tensor": tensor}
        used = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
        self.mesh = init_device_mesh(device.type, tuple(used.values()), mesh_dim_names=tuple(used))

    def _divisor(self, option: str, size: int, processes: int) -> int:
        if size < 1 or processes % size:
            message = f"{processes} processes cannot be divided into groups of {size}"
            raise ConfigError([Problem(f"distributed.fsdp.{option}", message)])
        return size

    # -- the model ---------------------------------------------------------------------------------------------------------

    def build(self, make: Callable[[], nn.Module | None]) -> nn.Module | None:
        """Without memory if that is wanted."""
        return deferred(make) if self.options.defer_init else make()

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Nothing yet: no device has room for the whole model. Sharding moves it block by block."""
        return model

    def wrap(self, model: nn.Module) -> nn.Module:
        """Shard the model in place, in the order of its modules: at most one block more than the shards is whole at a time."""
        blocks = blocks_to_shard(model, self.options.min_block_parameters)
        fill, plan = Filler(model, self.device), self._tensor_plan(model)
        ties = list(shared_parameters(model).values())
        seen: set[nn.Module] = set()

        def visit(module: nn.Module) -> None:
            if module in seen:
                return
            seen.add(module)
            _tie(module, ties)
            fill(module)
            if plan is not None:
                plan.divide(module)
            for child in module.children():
                visit(child)
            if module in blocks:
                self._shard(module, self._block_precision(), self.options.reshard_after_forward and module is not blocks[-1])

        visit(model)
        self._shard(model, MixedPrecisionPolicy(), reshard=False)  # what lies around the blocks is needed last and first
        if self.device.type != "cpu":  # where a gathering takes its time from the computation that it was to hide behind
            _prefetch(cast("list[FSDPModule]", blocks))
        self._orders = {} if plan is None else plan.orders()
        return model

    def _tensor_plan(self, model: nn.Module) -> TensorPlan | None:
        options = self.options.tensor_parallel
        return None if options is None or options.size == 1 else TensorPlan(model, options, self.mesh["tensor"])

    def _block_precision(self) -> MixedPrecisionPolicy:
        """What blocks are gathered in: what they compute in. Inputs are left to autocast, as on one device, and so is what lies
        around the blocks: an embedding's outputs run through the whole model."""
        dtype = self.ctx.precision.dtype
        if dtype not in (torch.bfloat16, torch.float16):
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def _shard(self, module: nn.Module, precision: MixedPrecisionPolicy, reshard: bool) -> None:
        names = tuple(name for name in self.mesh.mesh_dim_names or () if name != "tensor")
        fully_shard(
            module,
            mesh=self.mesh[names],
            reshard_after_forward=reshard,
            mp_policy=precision,
            offload_policy=CPUOffloadPolicy(pin_memory=self.device.type != "cpu")
            if self.options.cpu_offload
            else OffloadPolicy(),
            ignored_params={p for p in module.parameters() if not p.is_floating_point()},
        )

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any] | None:
        """Leave gradients unreduced."""
        return _NoSync(cast(FSDPModule, model))

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float | None, factor: Tensor | None) -> Tensor | None:
        """As in one process: the norm is that of the whole gradients. One reduction of one number."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if not grads:
            return None
        norm, scale = None, factor
        if max_norm is not None:
            norm = self._norm(grads)
            norm = norm if factor is None else norm * factor
            scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            scale = scale if factor is None else scale * factor
        if scale is not None:
            locals_ = [_local(g) for g in grads]
            torch._foreach_mul_(locals_, scale.to(locals_[0].device))
        return norm

    def _norm(self, grads: Sequence[Tensor]) -> Tensor:
        """The 2-norm of all gradients: each process adds up the squares of its parts, a part that n processes have for 1/n."""
        parts: dict[int, list[Tensor]] = {}
        for grad in grads:
            parts.setdefault(self._copies(grad), []).append(_local(grad))
        norms = {
            copies: torch.stack(torch._foreach_norm(same, 2.0, dtype=torch.promote_types(same[0].dtype, torch.float32)))
            for copies, same in parts.items()
        }
        self.norms = next(iter(norms.values())) if len(norms) == 1 else None  # otherwise not in the order of the gradients
        squares = [each.square().sum() / copies for copies, each in norms.items()]
        total = torch.stack(squares).sum().to(self.device)
        dist.all_reduce(total)
        return total.sqrt()

    def _copies(self, tensor: Tensor) -> int:
        """How many processes have the same part of it."""
        if not isinstance(tensor, DTensor):
            return self.world_size
        mesh = tensor.device_mesh
        copies = math.prod(mesh.size(i) for i, placement in enumerate(tensor.placements) if placement.is_replicate())
        return copies * (self.world_size // mesh.size())

    # -- states ------------------------------------------------------------------------------------------------------------

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        """Whole weights, gathered one at a time; empty on all ranks but the first."""
        state = {name: self._whole(value, value) for name, value in model.state_dict(keep_vars=True).items()}
        return state if self.rank == 0 else {}

    def load_model_state(self, model: nn.Module, saved: Mapping[str, Any]) -> None:
        """Divide whole weights."""
        present = model.state_dict(keep_vars=True)
        model.load_state_dict({name: self._divided(value, present.get(name)) for name, value in saved.items()})

    def optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Whole state, gathered one tensor at a time; empty on all ranks but the first."""
        saved, parameters = optimizer.state_dict(), _parameters(optimizer)
        state = {
            index: {name: self._whole(value, parameters[index]) for name, value in entries.items()}
            for index, entries in saved["state"].items()
        }
        return {**saved, "state": state} if self.rank == 0 else {}

    def load_optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
        """Divide whole state as its parameters are divided: every tensor of a parameter's own shape."""
        parameters = _parameters(optimizer)
        state = {
            index: {name: self._divided(value, parameters[index]) for name, value in entries.items()}
            for index, entries in saved["state"].items()
        }
        optimizer.load_state_dict({**saved, "state": state})

    def own_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
        """This process's parts."""
        return dict(model.state_dict()), optimizer.state_dict()

    def pieces(self, tensor: Tensor, like: Any) -> Sequence[tuple[tuple[int, ...], Tensor]]:
        """This process's part: one piece, or a run of rows for each place where the rows are not in the model's order."""
        if not isinstance(tensor, DTensor):
            return [((0,) * tensor.dim(), tensor.detach())]
        local = tensor.to_local().detach()
        if not local.numel():
            return []
        (chunk,) = tensor.__create_chunk_list__()
        first, *others = chunk.offsets or (0,)
        order = self._orders.get(id(like))
        if order is None:
            return [(tuple(chunk.offsets), local)]
        rows = order[first : first + len(local)]
        starts = [0, *((rows.diff() != 1).nonzero().flatten() + 1).tolist(), len(rows)]
        return [((int(rows[a]), *others), local[a:b]) for a, b in itertools.pairwise(starts)]

    def _whole(self, value: Any, parameter: Any) -> Any:
        """A divided tensor put together, rows in the model's order; all ranks take part, the first one keeps it, in host memory."""
        if not isinstance(value, DTensor):
            return value.detach() if isinstance(value, Tensor) else value
        placed = cast(
            DTensor, value.detach().to(self.device)
        )  # from host memory, if it is kept there: the group is the device's
        whole = placed.full_tensor()
        if self.rank != 0:
            return None
        order = self._orders.get(id(parameter))
        return whole.cpu() if order is None else torch.empty_like(whole, device="cpu").index_copy_(0, order, whole.cpu())

    def _divided(self, value: Any, parameter: Any) -> Any:
        """A whole tensor laid out as the parameter is; one that is (of `own_state`) stays."""
        whole = isinstance(value, Tensor) and not isinstance(value, DTensor)
        if not (isinstance(parameter, DTensor) and whole and value.shape == parameter.shape):
            return value
        order = self._orders.get(id(parameter))
        value = value.to(parameter.device) if order is None else value[order.to(value.device)].to(parameter.device)
        # every rank has read the whole tensor: each cuts its own part out, nothing is sent
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _tie(module: nn.Module, ties: list[list[tuple[nn.Module, str]]]) -> None:
    """Give a module those parameters anew that it shares with one before it, whose parameters have been replaced."""
    for (owner, owners_name), *others in ties:
        for other, name in others:
            if other is module:
                module._parameters[name] = owner._parameters[owners_name]


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _prefetch(blocks: list[FSDPModule]) -> None:
    """Gather the next block's parameters while one computes, in both directions."""
    for here, after in itertools.pairwise(blocks):
        here.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([here])


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _NoSync(AbstractContextManager[None]):
    """Gradients stay unreduced inside; can be entered again in every step."""

    def __init__(self, model: FSDPModule) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.model.set_requires_gradient_sync(False)

    def __exit__(self, *_: object) -> None:
        self.model.set_requires_gradient_sync(True)
