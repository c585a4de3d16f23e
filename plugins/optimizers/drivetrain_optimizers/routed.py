"""Different optimizers for different parameters, chosen by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import nn

from drivetrain import (
    CallbackContext,
    Component,
    ConfigError,
    OptimizerComponent,
    PluginError,
    Problem,
    component,
    make_component,
    option,
)
from drivetrain_optimizers.joined import Joined


@component
class Routed(Component):
    """Parameters to different optimizers by their names, as one optimizer.

    Each route is the table of an optimizer with a name pattern: {match = "embed*", use = "lion", lr = 1e-4}; what no pattern
    matches goes to `default`. Every pattern must match something, and no parameter may be matched twice. Rules such as muon's, or
    a route's own `groups`, see the parameters of their route only. The schedule multiplies every rate.
    """

    kind: ClassVar[str] = "optimizer"

    routes: list[dict[str, Any]] = option(
        help="tables with `match`, a parameter-name pattern, and an optimizer with its options"
    )
    default: Any = option(default="adamw", help="the optimizer of all other parameters: a name or a table")

    def __attrs_post_init__(self) -> None:
        """Make the optimizers' components, so that every mistake in them is found with those of the configuration."""
        problems = [] if self.routes else [Problem("routes", "is empty; without routes name the optimizer itself")]
        self._components: list[Any] = []
        tables = [(f"routes[{index}]", route) for index, route in enumerate(self.routes)]
        for path, table in tables:
            if not isinstance(table.get("match"), str):
                problems.append(Problem(f"{path}.match", "is missing: a parameter-name pattern such as 'embed*'"))
        for path, table in [*tables, ("default", self.default)]:
            spec = {k: v for k, v in table.items() if k != "match"} if isinstance(table, Mapping) else table
            try:
                self._components.append(_optimizer(spec, path))
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """The routes' optimizers and the default one, joined.

        Raises:
            ConfigError: for a pattern that matches nothing, or a parameter that is matched twice.
            PluginError: when an optimizer leaves some of its parameters out.
        """
        groups = OptimizerComponent().parameter_groups(ctx.model)
        named = {name: p for group in groups for name, p in zip(group["param_names"], group["params"], strict=True)}
        chosen = self._divide(list(named))
        parts = []
        for maker, names in zip(self._components, chosen, strict=True):
            if names:
                with _only([named[name] for name in names], named.values()):
                    part = maker.make_optimizer(ctx)
                _check_complete(part, [named[name] for name in names], maker)
                parts.append(part)
        return Joined(parts)

    def _divide(self, names: list[str]) -> list[list[str]]:
        """The names of each route's parameters, and of the default's."""
        path = self.plugin_name.replace(":", ".") or "optimizer"
        result: list[list[str]] = []
        problems, owner = [], dict[str, int]()
        for index, route in enumerate(self.routes):
            result.append([name for name in names if fnmatchcase(name, route["match"])])
            if not result[-1]:
                message = f"the pattern {route['match']!r} matches no parameter (names look like {', '.join(names[:3])})"
                problems.append(Problem(f"{path}.routes[{index}].match", message))
            for name in result[-1]:
                if (other := owner.setdefault(name, index)) != index:
                    message = f"{name!r} is matched by routes[{other}] as well; make one narrower"
                    problems.append(Problem(f"{path}.routes[{index}].match", message))
        if problems:
            raise ConfigError(problems)
        return [*result, [name for name in names if name not in owner]]


def _optimizer(spec: Any, path: str) -> Component:
    """The component of one route, if it can do without the run's events."""
    made = make_component("optimizer", spec, path)
    if events := sorted(name for name in dir(type(made)) if name.startswith("on_")):
        name = made.plugin_name.rpartition(":")[2]
        message = f"{name} takes part in the run's events ({', '.join(events)}), which it cannot do behind a route"
        raise ConfigError([Problem(path, message)])
    return made


@contextmanager
def _only(chosen: Iterable[nn.Parameter], everything: Iterable[nn.Parameter]) -> Iterator[None]:
    """Hide all other parameters from an optimizer plugin: it leaves out what needs no gradient."""
    shown = {id(p) for p in chosen}
    hidden = [p for p in everything if id(p) not in shown]
    for parameter in hidden:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in hidden:
            parameter.requires_grad_(True)


def _check_complete(made: torch.optim.Optimizer, expected: list[nn.Parameter], maker: Component) -> None:
    found = {id(p) for group in made.param_groups for p in group["params"]}
    if found != {id(p) for p in expected}:
        raise PluginError(f"{maker.plugin_name} ({maker.origin}) does not take exactly the parameters that its route gave it")
