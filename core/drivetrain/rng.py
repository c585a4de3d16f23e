"""Random state: seeding by position, saving and putting back. numpy takes part when something else has imported it."""

from __future__ import annotations

import gc
import random
import sys
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

_MASK = (1 << 64) - 1


def mix(*parts: int, state: int = 0) -> int:
    """One 64-bit seed from several numbers, such as (seed, epoch, index), by the finaliser of splitmix64.

    Nearby inputs give unrelated outputs (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", fig. 19).
    `mix(a, b)` is `mix(b, state=mix(a))`.
    """
    for part in parts:
        state = (state + (part & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def seed_host(seed: int) -> None:
    """Seed the host's generators: python's, torch's CPU generator and numpy's global one if it is loaded."""
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed & 0xFFFFFFFF)


def seed_all(seed: int, device: torch.device) -> None:
    """Seed the host's generators and the device's."""
    seed_host(seed)
    if device.type != "cpu":
        _device_module(device).manual_seed(seed)


def host_state() -> dict[str, Any]:
    """The state of the host's generators, as they give it."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.default_generator.get_state()}
    if (numpy := sys.modules.get("numpy")) is not None:
        state["numpy"] = numpy.random.get_state()
    return state


def drawn_since(before: Mapping[str, Any]) -> bool:
    """Whether a number has been drawn from one of the host's generators, or one was seeded, since they gave this state."""
    now = host_state()
    if now["python"] != before["python"] or not torch.equal(now["torch"], before["torch"]) or len(now) != len(before):
        return True
    if "numpy" not in now:
        return False
    (_, key, *rest), (_, key_before, *rest_before) = now["numpy"], before["numpy"]
    return bool(rest != rest_before or key.tobytes() != key_before.tobytes())


def set_host_state(state: Mapping[str, Any]) -> None:
    """Put back what `host_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.default_generator.set_state(state["torch"])
    if "numpy" in state:
        numpy = sys.modules.get("numpy") or import_module("numpy")  # the saved run had it loaded, so its state matters
        name, key, *rest = state["numpy"]
        numpy.random.set_state((name, numpy.asarray(key, dtype=numpy.uint32), *rest))


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of the host's generators and the device's: numbers, tuples and tensors."""
    state = host_state()
    if "numpy" in state:
        name, key, *rest = state["numpy"]
        state["numpy"] = (name, key.tolist(), *rest)
    if device.type != "cpu":
        state["device"] = _device_module(device).get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `random_state` gave; a state saved on another kind of device has no part for this one."""
    set_host_state(state)
    if device.type != "cpu" and "device" in state:
        _device_module(device).set_rng_state(state["device"], device)


@contextmanager
def isolated(seed: int | None = None, device: torch.device | None = None) -> Iterator[None]:
    """Run a block without touching the host's generators, seeded with `seed` if it is given, nor the device's if that is given."""
    module = None if device is None or device.type == "cpu" else _device_module(device)
    with _lock:
        before, before_there = host_state(), module and module.get_rng_state(device)
        try:
            if seed is not None:
                seed_host(seed)
            yield
        finally:
            set_host_state(before)
            if module is not None:
                module.set_rng_state(before_there, device)


# Torch, Python and NumPy have one global generator for each process, and dropout takes no other. So the runs of a process take
# turns: during a step the generators are one run's alone, and whoever comes next finds them as it left them itself.
_lock = threading.RLock()  # one thread may nest runs: a callback that trains something else
_nested: list[Turn] = []  # the runs in whose turns the thread that has the lock is, the innermost last
# Whose state a generator ("host" or a device) has now, and the states of all others; None is the code outside of runs.
_holders: dict[object, Turn | None] = {}
_states: dict[tuple[object, Turn | None], Any] = {}


class Turn:
    """The global generators with one run's state in them, as a context: held by one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._generators = ("host",) if device.type == "cpu" else ("host", device)

    def __enter__(self) -> None:
        _lock.acquire()
        _nested.append(self)
        self._take()

    def __exit__(self, *error: object) -> None:
        _nested.pop()
        if _nested:
            _nested[-1]._take()
        _lock.release()

    def _take(self) -> None:
        for generator in self._generators:
            if _holders.get(generator) is not self:
                with _uncollected():
                    self._change(generator)

    def _change(self, generator: object) -> None:
        holder = _holders.get(generator)
        _states[generator, holder] = _get(generator)
        _set(generator, _states.pop((generator, self), _states[generator, None]))
        _holders[generator] = self

    def end(self) -> None:
        """The run is over: the state that it has put back is that of code outside of runs."""
        for generator in self._generators:
            _states.pop((generator, self), None)
            if _holders.get(generator) is self:
                del _holders[generator]


def in_turns(turn: Turn, steps: Generator[Any, None, None]) -> Generator[Any, None, None]:
    """Each item of `steps`, computed in one turn; between two of them other runs may have theirs."""
    try:
        while True:
            with turn:
                step = next(steps, None)
            if step is None:
                return
            yield step
    finally:
        with turn:
            steps.close()
            turn.end()


@contextmanager
def _uncollected() -> Iterator[None]:
    """A block in which no garbage is collected: a run that was left in a cycle ends when it is, and takes its turn for that."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _get(generator: Any) -> Any:
    return host_state() if generator == "host" else _device_module(generator).get_rng_state(generator)


def _set(generator: Any, state: Any) -> None:
    if generator == "host":
        set_host_state(state)
    else:
        _device_module(generator).set_rng_state(state, generator)


def _device_module(device: torch.device) -> Any:
    return torch.get_device_module(device)
