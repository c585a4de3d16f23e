"""Drivetrain: a small PyTorch training engine whose parts are plugins.

`import drivetrain` is cheap: each public name is imported from its module when it is first used.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drivetrain.components import Callback as Callback
    from drivetrain.components import Component as Component
    from drivetrain.components import component as component
    from drivetrain.components import hook as hook
    from drivetrain.components import make_component as make_component
    from drivetrain.components import option as option
    from drivetrain.components import state as state
    from drivetrain.config import TrainingConfig as TrainingConfig
    from drivetrain.config import TrainingMode as TrainingMode
    from drivetrain.config import load_training_config as load_training_config
    from drivetrain.context import CallbackContext as CallbackContext
    from drivetrain.data import SampleOrder as SampleOrder
    from drivetrain.devices import DeviceManager as DeviceManager
    from drivetrain.distributed import ProcessGroupStrategy as ProcessGroupStrategy
    from drivetrain.duration import Duration as Duration
    from drivetrain.errors import ConfigError as ConfigError
    from drivetrain.errors import DataError as DataError
    from drivetrain.errors import DrivetrainError as DrivetrainError
    from drivetrain.errors import ModelError as ModelError
    from drivetrain.errors import PeerFailure as PeerFailure
    from drivetrain.errors import PluginError as PluginError
    from drivetrain.errors import Problem as Problem
    from drivetrain.errors import RunError as RunError
    from drivetrain.loss import Loss as Loss
    from drivetrain.loss import map_tensors as map_tensors
    from drivetrain.optim import ForeachOptimizer as ForeachOptimizer
    from drivetrain.optim import OptimizerComponent as OptimizerComponent
    from drivetrain.output import Step as Step
    from drivetrain.output import TrainOutput as TrainOutput
    from drivetrain.peers import Peer as Peer
    from drivetrain.precision import Precision as Precision
    from drivetrain.prepare import repeated_blocks as repeated_blocks
    from drivetrain.presets import get_pretraining_config as get_pretraining_config
    from drivetrain.presets import get_qlora_config as get_qlora_config
    from drivetrain.presets import parameters_of as parameters_of
    from drivetrain.registry import is_installed as is_installed
    from drivetrain.rng import random_state as random_state
    from drivetrain.rng import set_random_state as set_random_state
    from drivetrain.scalars import at_hand as at_hand
    from drivetrain.strategy import Strategy as Strategy
    from drivetrain.synchronizer import GradientSynchronizer as GradientSynchronizer
    from drivetrain.tracking import Tracker as Tracker
    from drivetrain.trainer import Trainer as Trainer

__version__ = "0.1.0"

_HOME = {
    "Callback": "components",
    "CallbackContext": "context",
    "Component": "components",
    "ConfigError": "errors",
    "DataError": "errors",
    "DeviceManager": "devices",
    "at_hand": "scalars",
    "DrivetrainError": "errors",
    "Duration": "duration",
    "ForeachOptimizer": "optim",
    "GradientSynchronizer": "synchronizer",
    "Loss": "loss",
    "ModelError": "errors",
    "OptimizerComponent": "optim",
    "Peer": "peers",
    "PeerFailure": "errors",
    "PluginError": "errors",
    "Precision": "precision",
    "Problem": "errors",
    "ProcessGroupStrategy": "distributed",
    "RunError": "errors",
    "SampleOrder": "data",
    "Step": "output",
    "Strategy": "strategy",
    "TrainOutput": "output",
    "Tracker": "tracking",
    "Trainer": "trainer",
    "TrainingConfig": "config",
    "TrainingMode": "config",
    "component": "components",
    "get_pretraining_config": "presets",
    "get_qlora_config": "presets",
    "hook": "components",
    "is_installed": "registry",
    "load_training_config": "config",
    "make_component": "components",
    "map_tensors": "loss",
    "option": "components",
    "parameters_of": "presets",
    "random_state": "rng",
    "repeated_blocks": "prepare",
    "set_random_state": "rng",
    "state": "components",
}
# Classes of the standard plugins, under the names of the documented interface; each needs its distribution installed.
_FROM_PLUGINS = {
    "CheckpointCallback": "checkpoint",
    "EarlyStoppingCallback": "early_stopping",
    "LoggingCallback": "logging",
    "ProgressCallback": "progress",
}

# Public names that will go, with what to use instead: they warn for one minor release (docs/versions.md).
_RETIRING: dict[str, str] = {}

__all__ = [*_HOME, *_FROM_PLUGINS]


def __getattr__(name: str) -> Any:
    if name in _RETIRING:
        warnings.warn(f"drivetrain.{name} will go: {_RETIRING[name]}", DeprecationWarning, stacklevel=2)
    if name in _HOME:
        value = getattr(import_module(f"drivetrain.{_HOME[name]}"), name)
    elif name in _FROM_PLUGINS:
        from drivetrain.registry import load

        value = load("callback", _FROM_PLUGINS[name])
    else:
        raise AttributeError(f"module 'drivetrain' has no attribute {name!r}")
    if name not in _RETIRING:  # every use of those is to be told
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
