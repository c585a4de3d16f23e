"""What is checked, and how a check says what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cached_property
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NoReturn

import attrs
import torch

from drivetrain import Callback, CallbackContext, Component, Tracker, Trainer, component, option
from drivetrain.registry import Candidate, all_candidates
from drivetrain_testing.harness import discovery_blocked, tiny_data, tiny_trainer

# The argument of `tiny_trainer` that takes a component of each kind.
_PLACES = {"dataset": "data", "strategy": "distributed", "mode": "training_mode"}
_PLACES |= {kind: kind for kind in ("optimizer", "scheduler", "precision", "model")}
_NEVER = 1000  # a period in steps that the kit's runs do not reach


class ConformanceError(AssertionError):
    """A plugin breaks the contract; the message says how, and what to do about it."""


class CheckError(AssertionError):
    """A check came to no verdict, because something of the plugin raised where it must not; `unsupported` does not excuse it."""


@attrs.define(eq=False, slots=False)
class Subject:
    """One plugin with what its checks need.

    Attributes:
        thing: a component with its options, a command, a function, a config format: what the entry point names, or an instance.
        kind: the kind of plugin.
        model: makes the module to train on, a function at a module's top; the kit's own without it.
        data: makes the data for it.
        loss: `loss(outputs, targets)` where the model returns none.
        environment: for the kind `cluster`: variables as the launcher sets them.
        budget: for callbacks, trackers and schedulers: how many calls of Python an ordinary step may cost.
        allow: distributions whose plugins this one may name.
        device: where its runs compute.
        config: keys of the configuration that its runs need.
    """

    thing: Any
    kind: str
    model: Callable[[], torch.nn.Module] | None = None
    data: Callable[[], Any] | None = None
    loss: Any = None
    environment: Mapping[str, str] = attrs.field(factory=dict)
    budget: int = 200
    allow: tuple[str, ...] = ()
    device: str = "cpu"
    config: Mapping[str, Any] = attrs.field(factory=dict)

    @property
    def cls(self) -> type:
        """The plugin's class; the type of a plugin that is a function."""
        return self.thing if isinstance(self.thing, type) else type(self.thing)

    @property
    def name(self) -> str:
        """What errors call it: "optimizer:lion", or the class where no entry point names it."""
        if self.candidate is not None:
            return f"{self.kind}:{self.candidate.name}"
        return f"{self.kind}:{self.label}"

    @property
    def label(self) -> str:
        """The name of the class or function."""
        return str(getattr(self.thing, "__name__", self.cls.__name__))

    @property
    def is_component(self) -> bool:
        """Whether it is an attrs class of options, as most kinds are."""
        return isinstance(self.thing, Component)

    @property
    def module(self) -> str:
        """The module that defines it."""
        owner = self.thing if isinstance(self.thing, type) or hasattr(self.thing, "__code__") else self.cls
        return self.thing.__name__ if isinstance(self.thing, ModuleType) else str(owner.__module__)

    @property
    def package(self) -> str:
        """The top-level module of its distribution."""
        return self.module.partition(".")[0]

    @cached_property
    def candidate(self) -> Candidate | None:
        """The installed entry point that names it."""
        here = [c for c in all_candidates() if c.kind == self.kind and c.target.partition(":")[0].split(".")[0] == self.package]
        objects = (self.thing, self.cls)
        return next((c for c in here if any(c.load() is thing for thing in objects)), None)

    @cached_property
    def distribution(self) -> str | None:
        """The installed distribution that it comes from."""
        tops = {c.distribution for c in all_candidates() if c.target.partition(":")[0].split(".")[0] == self.package}
        return next(iter(sorted(tops)), None)

    @cached_property
    def folder(self) -> str:
        """Where runs of the subject may write; gone with it."""
        self._folder = TemporaryDirectory(prefix="drivetrain-testing-")
        return self._folder.name

    def __getstate__(self) -> dict[str, Any]:
        """What goes to another process: the folder stays with this one."""
        state = {f.name: getattr(self, f.name) for f in attrs.fields(type(self))} | {"folder": self.folder}
        return state | ({"thing": (self.cls, self._options())} if self.is_component else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.thing, tuple):
            made, options = self.thing
            self.thing = made(**options)

    def _options(self) -> dict[str, Any]:
        """The options as they were given."""
        return {f.name: deepcopy(getattr(self.thing, f.name)) for f in attrs.fields(self.cls) if f.init}

    def fresh(self) -> Any:
        """A copy that no run has touched."""
        return self.cls(**self._options()) if self.is_component else self.thing

    def trainer(self, *callbacks: Any, thing: Any = None, **given: Any) -> Trainer:
        """A tiny trainer in which the plugin, or `thing` in its place, takes part; other plugins are hidden.

        Its steps are ordinary ones, that neither log nor evaluate, but for one log at the end of the run.
        """
        return self._trainer(self.fresh() if thing is None else thing, callbacks, given)

    def plain_trainer(self, *callbacks: Any, **given: Any) -> Trainer:
        """The same without the plugin, for the kinds that a run can do without."""
        return self._trainer(None, callbacks, given)

    def _trainer(self, thing: Any, callbacks: tuple[Any, ...], checked: dict[str, Any]) -> Trainer:
        given: dict[str, Any] = {
            "steps": 8,
            "log_interval": f"{_NEVER}st",
            "model": self.model and self.model(),
            "loss": self.loss,
        }
        given |= {**self.config, **checked}
        given = {"device": self.device, "resume": "never", "output_dir": self.folder, "eval_interval": f"{_NEVER}st"} | given
        if self.data is not None:
            given = {"train_dataset": self.data(), "eval_dataset": self.data()} | given
        elif self.kind != "dataset":
            given.setdefault("eval_dataset", tiny_data(given.get("dtype", torch.float32), seed=2, rows=32))
        if self.kind in ("callback", "tracker"):
            own = [TrackerHost(tracker=thing) if self.kind == "tracker" else thing] if thing is not None else []
            callbacks = (*callbacks, *own)
        elif thing is not None:
            given[_PLACES[self.kind]] = thing
        with self.blocked():
            return tiny_trainer(*callbacks, **given)

    def blocked(self) -> Any:
        """Hide all plugins but the subject's own distribution and those allowed."""
        return discovery_blocked(*filter(None, [self.distribution, *self.allow]))

    def fail(self, what: str, remedy: str) -> NoReturn:
        """Raise: `what` is wrong, and what to do."""
        raise ConformanceError(f"{self.name}: {what}\n  → {remedy}")

    def require(self, holds: object, what: str, remedy: str) -> None:
        """Raise unless `holds`."""
        if not holds:
            self.fail(what, remedy)


@component
class TrackerHost(Callback):
    """Calls a tracker as the logging callback does, on rank 0 alone."""

    tracker: Tracker = option(help="the tracker")

    def on_run_start(self, ctx: CallbackContext) -> None:
        if ctx.is_main:
            self.tracker.start(ctx)
            self.tracker.text("config", "text", ctx.step)

    def on_log(self, ctx: CallbackContext) -> None:
        if ctx.is_main:
            self.tracker.log(ctx.metrics, ctx.step)

    def on_run_end(self, ctx: CallbackContext) -> None:
        if ctx.is_main:
            self.tracker.close()

    def state_dict(self) -> dict[str, Any]:
        return self.tracker.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.tracker.load_state_dict(saved)


def kind_of(thing: Any) -> str | None:
    """The kind of a plugin as far as it shows."""
    if isinstance(thing, Component):
        return None if thing.kind == "component" else thing.kind
    if hasattr(thing, "add_arguments"):
        return "command"
    return "config_format" if hasattr(thing, "loads") and hasattr(thing, "dumps") else None
