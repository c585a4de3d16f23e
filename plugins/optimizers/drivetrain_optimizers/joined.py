"""Several optimizers that everyone else sees as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Joined(torch.optim.Optimizer):
    """One optimizer made of others, each over parameters of its own.

    Its groups are theirs, the very dictionaries: a learning rate written into one is used at once. Its state dict has the form of
    any optimizer's; each part writes and reads its own share, so that one with a way of its own (8-bit state) keeps it.

    Args:
        parts: the optimizers, in the order of the groups.
    """

    def __init__(self, parts: Iterable[torch.optim.Optimizer]) -> None:
        self._parts: list[torch.optim.Optimizer] = []
        for part in parts:
            self._parts += part._parts if isinstance(part, Joined) else [part]
        self._complete = False
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._complete = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters; `closure`, if given, computes the loss again first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            self._step(part)
        if len(self.state) != sum(len(part.state) for part in self._parts):
            self._gather()
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether every part leaves an overflowing step out by itself, on the device: torch's protocol between the gradients' scaler
        and fused optimizers, which then find `grad_scale` and `found_inf` as their attributes."""
        return all(getattr(part, "_step_supports_amp_scaling", False) for part in self._parts)

    def _step(self, part: Any) -> None:
        given = {key: getattr(self, key) for key in ("grad_scale", "found_inf") if hasattr(self, key)}
        if not given:
            part.step()
            return
        vars(part).update(given)
        try:
            part.step()
        finally:
            for key in given:
                delattr(part, key)

    def _gather(self) -> None:
        """Take groups and state, new or loaded, from the parts. The entries of the state are the parts' own."""
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        self.state.clear()
        for part in self._parts:
            self.state.update(part.state)

    def state_dict(self) -> dict[str, Any]:
        """The parts' states in one, parameters counted through."""
        state: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        for part in self._parts:
            first, saved = sum(len(group["params"]) for group in groups), part.state_dict()
            state |= {first + index: value for index, value in saved["state"].items()}
            groups += [{**group, "params": [first + index for index in group["params"]]} for group in saved["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: when it has other groups.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        saved = state_dict["param_groups"]
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError("its groups have other sizes: it was made by other routes, or for another model")
        for part in self._parts:
            own, saved = saved[: len(part.param_groups)], saved[len(part.param_groups) :]
            places = {index: place for place, index in enumerate(index for group in own for index in group["params"])}
            state = {places[index]: value for index, value in state_dict["state"].items() if index in places}
            groups = [{**group, "params": [places[index] for index in group["params"]]} for group in own]
            part.load_state_dict({"state": state, "param_groups": groups})
        self._gather()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while it is made: which part a later group should go to, nobody says."""
        if self._complete:
            raise TypeError("groups cannot be added to joined optimizers; add them to a part before joining")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_parts": self._parts, "_complete": True}
