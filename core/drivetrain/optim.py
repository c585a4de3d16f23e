"""What optimizer plugins share: the common options, and the parameter groups made from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from drivetrain.components import Component, component, option
from drivetrain.errors import ConfigError, ModelError, Problem


class ForeachOptimizer(torch.optim.Optimizer):
    """Base of optimizers for dense gradients that update all tensors of a group at once, as `torch._foreach_*` functions do.

    A subclass implements `update_group(group, params)` and keeps its state with `states`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the parameters that have a gradient; `closure`, if given, computes the loss again first.

        Raises:
            ModelError: for a sparse gradient; no parameter has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, params in [(group, self._trained(group)) for group in self.param_groups]:
            if params:
                self.update_group(group, params)
        return loss

    def update_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update the parameters of one group that have a gradient: at least one."""
        raise NotImplementedError

    def states(self, params: list[Tensor], key: str, make: Callable[[Tensor], Tensor] = torch.zeros_like) -> list[Tensor]:
        """The state `key` of each parameter, made from the parameter where there is none yet."""
        for parameter in params:
            if key not in self.state[parameter]:
                self.state[parameter][key] = make(parameter.detach())
        return [self.state[parameter][key] for parameter in params]

    @staticmethod
    def gradients(params: list[Tensor]) -> list[Tensor]:
        """The gradients of parameters which all have one."""
        return [p.grad for p in params if p.grad is not None]

    def _trained(self, group: dict[str, Any]) -> list[Tensor]:
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is not None and parameter.grad.is_sparse:
                names = group.get("param_names")
                which = repr(names[index]) if names else f"a parameter of shape {tuple(parameter.shape)}"
                raise ModelError(
                    f"the gradient of {which} is sparse, which {type(self).__name__} cannot use. Make the embedding dense "
                    "(sparse=False), or use sgd."
                )
        return [p for p in group["params"] if p.grad is not None]


@component
class OptimizerComponent(Component):
    """Base of optimizer plugins. A subclass adds its own options and implements `make_optimizer(ctx)`."""

    kind: ClassVar[str] = "optimizer"
    default_scheduler: ClassVar[str | dict[str, Any]] = "cosine"  # a name or table, where the configuration names none
    reason = ""  # why the optimizer was made as it is, where that depends on the machine or the model

    lr: float = option(default=1e-3, at_least=0, help="peak learning rate; the schedule multiplies it")
    weight_decay: float = option(default=0.0, at_least=0, help="decay of the weights it applies to, see `decay`")
    decay: Literal["matrices", "all"] = option(
        default="matrices", help="what decays: tensors of two or more dimensions (not biases, not norms), or everything"
    )
    groups: list[dict[str, Any]] = option(
        factory=list,
        help="settings by parameter name: tables such as {match = '*.bias', lr = 1e-4}; each pattern must match something",
    )

    def parameter_groups(self, model: nn.Module, allowed: tuple[str, ...] = ("lr", "weight_decay")) -> list[dict[str, Any]]:
        """The trainable parameters in groups of equal settings, in the model's order, with their names under `param_names`.

        Args:
            model: the prepared model; parameters that need no gradient are left out.
            allowed: the settings that `groups` may change.

        Raises:
            ConfigError: for a pattern that matches nothing, a parameter matched twice, an unknown setting, or nothing to train.
        """
        named = [(plain_name(name), p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ConfigError([Problem("model", "has no trainable parameter: every parameter has requires_grad = False")])
        settings = self._settings_by_name([name for name, _ in named], allowed)
        groups: dict[tuple[Any, ...], dict[str, Any]] = {}
        for name, parameter in named:
            decays = self.decay == "all" or parameter.ndim >= 2
            given = {"lr": self.lr, "weight_decay": self.weight_decay if decays else 0.0} | settings.get(name, {})
            key = tuple(sorted((k, repr(v)) for k, v in given.items()))
            group = groups.setdefault(key, {**given, "params": [], "param_names": []})
            group["params"].append(parameter)
            group["param_names"].append(name)
        return list(groups.values())

    def _settings_by_name(self, names: list[str], allowed: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        """What `groups` says about each parameter name; empty for most."""
        owner: dict[str, int] = {}
        result: dict[str, dict[str, Any]] = {}
        problems = []
        for index, rule in enumerate(self.groups):
            path = f"{self.plugin_name.replace(':', '.') or 'optimizer'}.groups[{index}]"
            problems += _rule_problems(rule, allowed, path)
            pattern = str(rule.get("match", ""))
            hits = [name for name in names if fnmatchcase(name, pattern)]
            if not hits and pattern:
                examples = ", ".join(names[:3])
                problems.append(
                    Problem(f"{path}.match", f"the pattern {pattern!r} matches no parameter (names look like {examples})")
                )
            for name in hits:
                if name in owner:
                    problems.append(
                        Problem(f"{path}.match", f"{name!r} is matched by groups[{owner[name]}] as well; make one narrower")
                    )
                owner[name] = index
                result[name] = {k: v for k, v in rule.items() if k != "match"}
        if problems:
            raise ConfigError(problems)
        return result


def follow_parameters(optimizer: torch.optim.Optimizer, before: Mapping[str, nn.Parameter], model: nn.Module) -> None:
    """Let an optimizer that was made before the model was prepared hold the parameters that the model has now.

    Sharding and some casts put new parameters in the old ones' places.

    Args:
        before: the parameters by name when the optimizer was made.
        model: the prepared model.

    Raises:
        ModelError: when a parameter is gone, or the optimizer has state for the old ones.
    """
    found = dict(model.named_parameters())
    kept = {id(parameter) for parameter in found.values()}
    # names say all where nothing has been wrapped; a model of the user's may have names that look as if
    now = found if before.keys() <= found.keys() else {plain_name(name): parameter for name, parameter in found.items()}
    names = {id(parameter): name for name, parameter in before.items()}
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            name = names.get(id(parameter))
            if name is None or id(parameter) in kept:
                continue
            new = now.get(name, now.get(plain_name(name)))
            if new is None or optimizer.state:
                why = "has state for it already" if optimizer.state else "would hold one that is no longer there"
                raise ModelError(
                    f"preparing the model replaced the parameter {name!r}, and the optimizer {why}. "
                    "Name the optimizer in the configuration, so that it is made after the model is prepared."
                )
            group["params"][index] = new


def plain_name(name: str) -> str:
    """A parameter's name without the parts that wrapping adds (DDP, torch.compile, activation checkpointing)."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module")).removeprefix(
        "module."
    )


def _rule_problems(rule: Mapping[str, Any], allowed: tuple[str, ...], path: str) -> list[Problem]:
    problems = []
    if not isinstance(rule.get("match"), str):
        problems.append(Problem(f"{path}.match", "is missing: a parameter-name pattern such as '*.bias'"))
    for key, value in rule.items():
        if key != "match" and key not in allowed:
            problems.append(Problem(f"{path}.{key}", f"cannot be set for a group; possible: match, {', '.join(allowed)}"))
        elif key in ("lr", "weight_decay") and (type(value) not in (int, float) or not 0 <= value < math.inf):
            problems.append(Problem(f"{path}.{key}", f"expected a number of at least 0, got {value!r}"))
    return problems
