"""Before training, the processes of a run compare what they were started with: differences would show as a hang, or not at all."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import __version__
from drivetrain.components import Component, fields_of
from drivetrain.errors import ConfigError, Problem
from drivetrain.manifest import flat, plain
from drivetrain.peers import Peer, announce_failures

if TYPE_CHECKING:
    from drivetrain.context import CallbackContext

_MAY_DIFFER = ("callbacks", "output_dir", "device")  # callbacks are compared as components; the others name what is local
_MOST = 8  # differences shown


def agree(ctx: CallbackContext, components: Iterable[Component]) -> None:
    """Compare configuration, components, versions and devices over all ranks, and learn who the others are: one gather.

    Raises:
        ConfigError: on every rank alike, naming the ranks and the keys.
    """
    strategy = ctx.strategy
    if strategy.world_size == 1:
        return
    started_with = _started_with(ctx, components)
    digest = hashlib.sha256(repr(sorted(started_with.items())).encode()).hexdigest()
    found = strategy.gather((digest, Peer.here(strategy.rank, _identity(ctx.device))))
    strategy.peers = tuple(peer for _, peer in found)
    announce_failures(strategy.peers[strategy.rank])
    if len({other for other, _ in found}) > 1:
        raise ConfigError(_differences(strategy.gather(started_with), strategy.peers))
    if shared := _shared_devices(strategy.peers):
        raise ConfigError([Problem("device", shared)])


def _started_with(ctx: CallbackContext, components: Iterable[Component]) -> dict[str, Any]:
    config = ctx.config
    keys = [f for f in attrs.fields(type(config)) if f.init and not f.metadata["kind"] and f.name not in _MAY_DIFFER]
    rows = flat({f.name: plain(getattr(config, f.name), f.name) for f in keys})
    for thing in components:
        if thing.kind == "callback":  # one may do something on its own rank alone, but what is periodic ends in a collective
            every = getattr(thing, "every", None)
            rows |= {} if every is None else {f"{thing.plugin_name}.every": str(every)}
        else:
            rows |= {f"{thing.plugin_name}.{key}": plain(value, key) for key, value in _options(thing).items()}
            rows[f"{thing.plugin_name} from"] = thing.origin
    python = ".".join(platform.python_version_tuple()[:2])
    return rows | {
        "version of Python": python,
        "version of torch": torch.__version__,
        "version of drivetrain-core": __version__,
    }


def _options(thing: Component) -> dict[str, Any]:
    return {f.name: getattr(thing, f.name, None) for f in fields_of(type(thing)) if f.init}


def _differences(found: list[dict[str, Any]], peers: tuple[Peer, ...]) -> list[Problem]:
    """What differs from rank 0, each key with the first rank that has another value."""
    problems = []
    for key in sorted(set().union(*found)):
        others = [rank for rank, row in enumerate(found) if row.get(key, "(absent)") != found[0].get(key, "(absent)")]
        if others:
            here, there = (row.get(key, "(absent)") for row in (found[0], found[others[0]]))
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            problems.append(Problem(key, f"{here!r} on {peers[0]}, but {there!r} on {peers[others[0]]}{more}"))
    more_keys = [Problem("", f"… and {len(problems) - _MOST} more keys")] if len(problems) > _MOST else []
    return [*problems[:_MOST], *more_keys, Problem("", "Start every process with the same configuration, code and versions.")]


def _identity(device: torch.device) -> str:
    """What tells a device from the machine's others, whatever numbers processes see them under; empty where that is not known."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _shared_devices(peers: Iterable[Peer]) -> str:
    first: dict[tuple[str, str], Peer] = {}
    for peer in peers:
        if peer.device and (other := first.setdefault((peer.host, peer.device), peer)) is not peer:
            return f"{other} and rank {peer.rank} have the same device; start as many processes on a machine as it has devices"
    return ""
