"""Which parts of a model are sharded by themselves."""

from __future__ import annotations

from torch import nn

from drivetrain import repeated_blocks

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # never called, so nothing would gather them


def blocks_to_shard(model: nn.Module, min_parameters: int = 0) -> list[nn.Module]:
    """The blocks, in the model's order: classes that transformers marks as not to be split, else repeated modules, else by size.

    Args:
        min_parameters: smaller blocks are left to the one around them. By size, also the least that a block has; at least an eighth of
            the model.
    """
    marked = set(getattr(model, "_no_split_modules", None) or ())
    found = [m for m in model.modules() if type(m).__name__ in marked and m is not model] or list(repeated_blocks(model))
    if found:
        return [block for block in found if _size(block) >= min_parameters]
    least = max(min_parameters, _size(model) // 8, 1)
    shared = {id(p) for p in shared_parameters(model)}
    return [block for child in model.children() for block in _by_size(child, least, shared)]


def _by_size(module: nn.Module, least: int, shared: set[int]) -> list[nn.Module]:
    """The innermost modules of at least that size; with what is left over around them, outer ones."""
    found = [block for child in module.children() for block in _by_size(child, least, shared)]
    inside = {id(p) for block in found for p in block.parameters()}
    own = [p for p in module.parameters() if id(p) not in inside]
    big = sum(p.numel() for p in own) >= least
    if big and not isinstance(module, _CONTAINERS) and not any(id(p) in shared for p in own):
        found.append(module)
    return found


def shared_parameters(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """The parameters that several modules have, with the modules in order and the names there."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(parameter, []).append((module, name))
    return {parameter: found for parameter, found in places.items() if len(found) > 1}


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
