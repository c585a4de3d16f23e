"""What the caller of `Trainer` handed over, each part of a type that it can have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from attrs import field, frozen
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from drivetrain.components import Component
from drivetrain.config import TrainingConfig
from drivetrain.errors import DrivetrainError
from drivetrain.evaluation import Metrics
from drivetrain.precision import Precision
from drivetrain.strategy import Strategy

_NAMED = (str, Mapping, Component)
_A_NAME = "or a plugin's name or table"


def _part(what: str, *types: Any, remedy: str = "") -> Any:
    """An argument that may be None. One of another type would be left out without a word, or fail far from here."""

    def check(given: Given, attribute: Any, value: Any) -> None:
        fits = isinstance(value, types) and (not isinstance(value, type) or type in types)
        if value is not None and not fits:
            raise DrivetrainError(f"{attribute.name} must be {what}, not {value!r}{remedy and f'; {remedy}'}")

    return field(default=None, validator=check)


def _listed(callbacks: Any) -> tuple[Any, ...]:
    if isinstance(callbacks, (str, Mapping)) or not isinstance(callbacks, Iterable):
        raise DrivetrainError(f"callbacks must be a list, with a single one in brackets, not {callbacks!r}")
    return tuple(callbacks)


@frozen(kw_only=True)
class Given:
    """The arguments of `Trainer`, by their names; None means: take it from the configuration."""

    model: nn.Module | None = _part("an nn.Module", nn.Module, remedy="the configuration names one as `model`")
    args: TrainingConfig = _part("a TrainingConfig", TrainingConfig, remedy="load_training_config reads one from a file")
    train_dataset: Any
    eval_dataset: Any
    callbacks: tuple[Any, ...] = field(converter=_listed)
    loss: Any = _part("a function", Callable)
    step: Any = _part("a function", Callable)
    optimizer: Any = _part(f"a torch optimizer, {_A_NAME}", Optimizer, *_NAMED, remedy="of a function, give what it makes")
    scheduler: Any = _part(f"a torch scheduler, a function, {_A_NAME}", LRScheduler, ReduceLROnPlateau, Callable, *_NAMED)
    data_collator: Any = _part("a function, or a class that takes the samples", Callable, type)
    compute_metrics: Metrics = _part("a function, or a mapping of names to metrics", Callable, Mapping)
    precision: Precision | None = _part("a Precision", Precision, remedy="a name goes into TrainingConfig(precision=...)")
    strategy: Strategy | None = _part("a Strategy", Strategy, remedy="a name goes into TrainingConfig(distributed=...)")
    device: Any
