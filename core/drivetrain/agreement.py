"""Before training, the processes of a run compare what they were started with: differences would show as a hang, or not at all."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Sequence
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
    from drivetrain.strategy import Strategy

_MAY_DIFFER = ("callbacks", "output_dir", "device")  # callbacks are compared as components; the others name what is local
_CALLBACK = "version of "  # of a callback, which one rank may have alone
_MOST = 8  # differences shown


def agree(ctx: CallbackContext, components: Iterable[Component]) -> None:
    """Compare configuration, components, versions and devices over all ranks, and learn who the others are: one gather.

    Raises:
        ConfigError: on every rank alike, naming the ranks and the keys.
    """
    strategy = ctx.strategy
    if strategy.world_size == 1:
        return
    mine = _started_with(ctx, components)
    found = strategy.gather((_digest(mine), Peer.here(strategy.rank, _identity(ctx.device))))
    strategy.peers = tuple(peer for _, peer in found)
    announce_failures(strategy.peers[strategy.rank])
    _compare(strategy, mine, [digest for digest, _ in found])
    if shared := _shared_devices(strategy.peers):
        raise ConfigError([Problem("device", shared)])


def agree_on_parts(ctx: CallbackContext, samples: int | None) -> None:
    """The same for what could only be compared once it was there: the lengths of the data and the model's shapes. One gather.

    Args:
        samples: of the training data; None where it has no number of them.
    """
    if ctx.strategy.world_size == 1:
        return
    lengths = {
        "samples of the training data": samples,
        "steps in an epoch": ctx.steps_per_epoch,
        "batches in an evaluation": ctx.eval_batches,
    }
    mine = lengths | {f"shape of {name}": tuple(value.shape) for name, value in ctx.model.named_parameters()}
    _compare(ctx.strategy, mine, ctx.strategy.gather(_digest(mine)))


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()


def _compare(strategy: Strategy, mine: dict[str, Any], digests: list[str]) -> None:
    """Where the digests differ, find out in what."""
    if len(set(digests)) > 1 and (problems := _differences(strategy.gather(mine), strategy.peers)):
        raise ConfigError(problems)


def _started_with(ctx: CallbackContext, components: Iterable[Component]) -> dict[str, Any]:
    config = ctx.config
    keys = [f for f in attrs.fields(type(config)) if f.init and not f.metadata["kind"] and f.name not in _MAY_DIFFER]
    rows = flat({f.name: plain(getattr(config, f.name), f.name) for f in keys})
    for thing in components:
        if thing.kind == "callback":  # one may do something on its own rank alone, but what is periodic ends in a collective
            every = getattr(thing, "every", None)
            rows |= {} if every is None else {f"{thing.plugin_name}.every": str(every)}
            rows[_CALLBACK + thing.plugin_name] = thing.origin
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


def _differences(found: list[dict[str, Any]], peers: Sequence[Peer]) -> list[Problem]:
    """What differs from rank 0, each key with the first rank that has another value."""
    problems = []
    for key in sorted(set().union(*found)):
        has = [row.get(key, "(absent)") for row in found]
        others = [
            rank for rank, value in enumerate(has) if value != has[0] and not (key.startswith(_CALLBACK) and "(absent)" in has)
        ]
        if others:
            here, there = has[0], has[others[0]]
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            problems.append(Problem(key, f"{here!r} on {peers[0]}, but {there!r} on {peers[others[0]]}{more}"))
    if not problems:
        return []
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
