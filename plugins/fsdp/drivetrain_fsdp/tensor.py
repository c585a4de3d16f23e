"""Tensor parallelism: matrices divided within each block among neighbouring processes (Shoeybi et al. 2019, arXiv:1909.08053)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from drivetrain import ConfigError, ModelError, Problem, option
from drivetrain_fsdp.blocks import shared_parameters

PATH = "distributed.fsdp.tensor_parallel"
# transformers' names. Outputs stay divided after colwise alone, inputs are expected to be divided by rowwise alone.
_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel,
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_colwise": lambda: ColwiseParallel(output_layouts=Replicate()),
}


@attrs.define(kw_only=True)
class TensorParallel:
    """The table `tensor_parallel`."""

    size: int = option(help="processes that compute one model together; neighbouring ranks, best those of one machine")
    plan: dict[str, str] | None = option(
        default=None,
        help="layer name patterns and styles (colwise, rowwise, …; colwise:3 for three matrices in one layer); by default the "
        "model's own plan",
    )


class TensorPlan:
    """Divides the layers of a model over a mesh of one dimension.

    Args:
        model: the whole model, not yet divided.

    Raises:
        ConfigError: when there is no plan, or one that does not fit the model.
    """

    def __init__(self, model: nn.Module, options: TensorParallel, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        plan: dict[str, str] = (
            options.plan or getattr(model, "tensor_parallel_plan", None) or getattr(model, "_tp_plan", None) or {}
        )
        if not plan:
            message = (
                f"{type(model).__name__} has no plan of its own; give layer name patterns and styles ({', '.join(_STYLES)})"
            )
            raise ConfigError([Problem(f"{PATH}.plan", message)])
        self._styles = _matched(model, plan, mesh.size())
        self._orders: dict[nn.Module, Tensor] = {}

    def divide(self, module: nn.Module) -> None:
        """Divide a layer that the plan names; of any other module, every process keeps the parameters whole. In place."""
        style = self._styles.get(module)
        if style is None:
            self._keep_whole(module)
            return
        kind, _, count = style.partition(":")
        if count:
            self._orders[module] = _reorder(module, int(count), self.mesh.size())
        parallelize_module(module, self.mesh, _STYLES[kind]())

    def orders(self) -> dict[int, Tensor]:
        """By the `id` of a parameter: in which order its rows are kept, for those that had to be put into another one."""
        return {id(p): order for module, order in self._orders.items() for p in module.parameters(recurse=False)}

    def _keep_whole(self, module: nn.Module) -> None:
        """The parameters as `DTensor`s like the divided ones: optimizers update lists of one sort."""
        own = {name: p for name, p in module._parameters.items() if p is not None}
        if not own:
            return
        if next(module.children(), None) is not None:
            raise ModelError(
                f"{type(module).__name__} has parameters of its own ({', '.join(own)}) beside its layers; tensor parallelism "
                "needs every parameter in a layer without parts."
            )
        for name, parameter in own.items():
            if not isinstance(parameter, DTensor):  # one tied to another layer's is there already
                whole = distribute_tensor(parameter.data, self.mesh, [Replicate()], src_data_rank=None)
                module._parameters[name] = nn.Parameter(whole, parameter.requires_grad)
        module.register_forward_pre_hook(partial(_entered, self.mesh), with_kwargs=True)
        module.register_forward_hook(_left)


def _matched(model: nn.Module, plan: Mapping[str, str], size: int) -> dict[nn.Module, str]:
    """The style of each layer that the plan names."""
    found: dict[nn.Module, str] = {}
    used: dict[str, bool] = dict.fromkeys(plan, False)
    problems = []
    shared = {id(p) for p in shared_parameters(model)}
    for name, module in model.named_modules():
        for pattern, style in plan.items():
            if not fnmatchcase(name, pattern):
                continue
            used[pattern] = True
            if id(getattr(module, "weight", None)) in shared:  # tied to another layer, which would have to agree
                continue
            if (problem := _problem(module, style, size)) is not None:
                problems.append(Problem(f"{PATH}.plan", f"{name}: {problem}"))
            found[module] = style
    problems += [Problem(f"{PATH}.plan", f"{pattern!r} matches no layer") for pattern, hit in used.items() if not hit]
    if problems:
        raise ConfigError(problems)
    return found


def _problem(module: nn.Module, style: str, size: int) -> str | None:
    kind, _, count = style.partition(":")
    if kind not in _STYLES or (count and (kind != "colwise" or not count.isdecimal() or int(count) < 1)):
        return f"the style {style!r} is unknown; there are {', '.join(_STYLES)} and colwise:N"
    wanted = nn.Embedding if kind.startswith("embedding") else nn.Linear
    if not isinstance(module, wanted):
        return f"{kind} is for {wanted.__name__}, not {type(module).__name__}"
    rows, columns = module.weight.shape
    cut = columns if kind in ("rowwise", "rowwise_rep", "rowwise_split_input", "embedding_colwise") else rows
    return None if cut % (int(count or 1) * size) == 0 else f"{cut} features cannot be divided among {size} processes"


def _reorder(module: nn.Module, count: int, size: int) -> Tensor:
    """Put the rows of `count` matrices that lie above each other into the order in which cutting them gives each process its part of
    every one; in place. Returns the order: row i of the result was row order[i]."""
    rows = len(module.get_parameter("weight"))
    order = torch.arange(rows).view(count, size, rows // (count * size)).transpose(0, 1).reshape(-1)
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data[order.to(parameter.device)]
    return order


def _entered(mesh: DeviceMesh, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    def wrap(x: Any) -> Any:
        plain = isinstance(x, Tensor) and not isinstance(x, DTensor)
        return DTensor.from_local(x, mesh, [Replicate()], run_check=False) if plain else x

    return tuple(wrap(x) for x in args), {name: wrap(x) for name, x in kwargs.items()}


def _left(_module: nn.Module, _args: Any, output: Any) -> Any:
    return output.to_local() if isinstance(output, DTensor) else output
