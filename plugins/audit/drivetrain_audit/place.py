"""From a call stack to the plugin and the line that a person can change."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from types import CodeType, FrameType
from typing import Any

from attrs import frozen

_OURS = ("drivetrain_audit",)
_STDLIB = sys.stdlib_module_names
_CALLS = {"forward": "model", "loss": "loss"}  # methods of the core's ModelCall
_CALLED_BY = {"backward": "model", "step": "scheduler"}  # methods of its Loop, and whose code runs in them


@frozen
class Place:
    """Who did something: `plugin` as in `callback:ema`, or "model", "loss", "drivetrain"; `event` is None outside of hooks."""

    plugin: str
    event: str | None
    file: str
    line: int


def place_of(frame: FrameType | None, ctx: Any, parts: Mapping[int, str], hooks: CodeType) -> Place | None:
    """Where in a step of this run a stack stands; None for other runs and threads, for the data, and outside of steps.

    Args:
        parts: the names of the run's parts, such as its optimizer, by `id`.
        hooks: the code of the function around each listener, whose locals are `audit_ctx`, `thing` and `event`.
    """
    frames: list[FrameType] = []
    part: str | None = None
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if frame.f_code is hooks:
            found = frame.f_locals
            if found["audit_ctx"] is not ctx:
                return None
            return _place(found["thing"].plugin_name, found["event"], frames, type(found["thing"]).__module__)
        if module in ("drivetrain.data", "drivetrain.agenda", "importlib._bootstrap"):
            return None
        if module == "drivetrain.loop" and (loop := frame.f_locals.get("self")) is not None:
            if getattr(loop, "ctx", None) is not ctx:
                return None
            return _place(part or _CALLED_BY.get(frame.f_code.co_name, "drivetrain"), None, frames or [frame], None)
        if module == "drivetrain.calling":
            part = _CALLS.get(frame.f_code.co_name, part)
        elif (owner := frame.f_locals.get("self")) is not None:
            part = part or parts.get(id(owner))
        if _is_a_counter_of_torch(frame, module):
            return None
        if not module.startswith(_OURS):
            frames.append(frame)
        frame = frame.f_back
    return None


def _is_a_counter_of_torch(frame: FrameType, module: str) -> bool:
    """Optimizers of torch keep the number of their steps in tensors on the host, whatever the device."""
    return module == "torch.optim.optimizer" and frame.f_code.co_name == "_get_value"


def _place(plugin: str, event: str | None, frames: list[FrameType], module: str | None) -> Place:
    """The innermost line of the plugin's own package; else the innermost that is neither torch's, the core's nor Python's."""
    package = module.partition(".")[0] if module else None
    names = [str(f.f_globals.get("__name__", "")).partition(".")[0] for f in frames]
    own = [f for f, name in zip(frames, names, strict=True) if name == package]
    foreign = [f for f, name in zip(frames, names, strict=True) if name not in ("torch", "drivetrain") and name not in _STDLIB]
    main = [f for f, name in zip(frames, names, strict=True) if name == "__main__"]
    chosen = (own or foreign or main or frames)[0]
    return Place(plugin, event, _shown(chosen.f_code.co_filename), chosen.f_lineno)


def _shown(path: str) -> str:
    """A path as short as it can be understood: below the working directory, or below site-packages."""
    _, found, below = path.partition(f"site-packages{os.sep}")
    if found:
        return below
    here = os.getcwd() + os.sep
    return path[len(here) :] if path.startswith(here) else path
