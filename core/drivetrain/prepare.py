"""Model preparation in fixed phases; registration order has no say in it.

build → quantize → adapt → place on the device → cast → memory format → activation checkpointing → compile → shard or wrap
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from drivetrain.activations import Offload, recompute
from drivetrain.compiling import compile_blocks
from drivetrain.config import TrainingConfig
from drivetrain.context import CallbackContext
from drivetrain.errors import ConfigError, ModelError, Problem
from drivetrain.hooks import RunPluginManager
from drivetrain.rng import isolated, mix


def build(given: nn.Module | None, pm: RunPluginManager, ctx: CallbackContext) -> nn.Module:
    """The module that the user gave, or the one that the model component builds from the run's seed."""
    if given is None:
        with isolated(mix(ctx.config.seed)):
            given = ctx.strategy.build(lambda: pm.choose("make_model", ctx))
    if given is None:
        raise ConfigError([Problem("model", "is missing: pass Trainer(model, ...), or name a model in the configuration")])
    if not isinstance(given, nn.Module):
        raise ModelError(f"the model is a {type(given).__name__}, not a torch.nn.Module")
    return given


def prepare(pm: RunPluginManager, ctx: CallbackContext) -> nn.Module:
    """Take `ctx.model` through the phases after building; sets it to what the loop calls and returns the inner module."""
    for phase in ("make_quantized_model", "make_adapted_model"):
        changed = pm.choose(phase, ctx)
        ctx.model = ctx.model if changed is None else changed
    model = ctx.precision.cast(ctx.strategy.place(ctx.model, ctx.device))
    if ctx.config.channels_last:  # of the weights alone: a convolution's output takes the format of its weight
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if ctx.config.activation_checkpointing or ctx.config.compile:
        _change_blocks(model, ctx.config)
    ctx.model = ctx.strategy.wrap(model)
    return model


def _change_blocks(model: nn.Module, config: TrainingConfig) -> None:
    """Activations and compilation of the repeated blocks, in place."""
    blocks, spared = list(repeated_blocks(model)), config.activation_checkpointing
    if spared and not blocks:
        message = "found no repeated blocks in the model (a ModuleList or Sequential of several modules of one class)"
        raise ConfigError([Problem("activation_checkpointing", message)])
    if spared and spared != "offload":
        recompute(blocks, selective=spared == "selective")
    if config.compile:
        compile_blocks(blocks or [model])
    if spared == "offload":  # what compiled code keeps, which is less
        Offload().of(blocks)


def repeated_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks a model repeats: the members of every outermost ModuleList or Sequential that holds several of one class with
    parameters."""
    for child in model.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and _repeats(child):
            yield from child
        else:
            yield from repeated_blocks(child)


def _repeats(modules: nn.ModuleList | nn.Sequential) -> bool:
    first = next(iter(modules), None)
    same = all(type(m) is type(first) for m in modules)
    return len(modules) > 1 and same and any(True for _ in modules.parameters())
