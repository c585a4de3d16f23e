"""Entry-point registries: which names each kind has, from package metadata alone. Listing imports nothing.

One entry-point group for each kind (`drivetrain.optimizer`, `drivetrain.callback`, …); the entry point's name is the name
written in a configuration. Installed is not active: a plugin is imported only when a configuration or a caller names it.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

from attrs import field, frozen

from drivetrain.catalogue import distribution_of, names_of
from drivetrain.errors import PluginError, suggest

KINDS = (
    "optimizer",
    "scheduler",
    "precision",
    "strategy",
    "callback",
    "tracker",
    "mode",
    "preset",
    "model",
    "dataset",
    "config_format",
    "cluster",
    "device",
    "command",
    "check",
)
CORE = "drivetrain-core"
SWITCH = "DRIVETRAIN_PLUGINS"


@frozen(order=True)
class Candidate:
    """One installed plugin: what its metadata says, before anything of it is imported."""

    kind: str
    name: str
    distribution: str
    version: str
    target: str
    requires: tuple[str, ...] = field(default=(), repr=False)
    _entry: metadata.EntryPoint | None = field(default=None, eq=False, order=False, repr=False)

    def __str__(self) -> str:
        return f"{self.kind}:{self.name} ({self.distribution} {self.version})"

    def load(self) -> object:
        """Import the plugin and return the object it names.

        Raises:
            PluginError: when it asks for another version of the core, or its import fails.
        """
        self.check_version()
        assert self._entry is not None
        try:
            return self._entry.load()
        except PluginError:  # it says by itself what it lacks
            raise
        except Exception as error:
            raise PluginError(
                f"plugin {self} failed to import {self.target}: {type(error).__name__}: {error}. "
                f"Repair or remove it (pip uninstall {self.distribution})."
            ) from error

    def check_version(self) -> None:
        """Refuse, before import, a plugin whose metadata excludes the running core."""
        running = metadata.version(CORE)
        for requirement in self.requires:
            if (wanted := _core_range(requirement)) and not _satisfies(running, wanted):
                raise PluginError(
                    f"plugin {self} needs {CORE}{wanted}, but {CORE} {running} is installed. "
                    f"Upgrade the plugin (pip install -U {self.distribution}) or install a core that it supports."
                )


def candidates(kind: str) -> dict[str, list[Candidate]]:
    """Every installed plugin of `kind` by name, sorted; a name with several entries is claimed by several distributions.

    `DRIVETRAIN_PLUGINS=off` hides them all; a comma-separated list keeps only the names, `kind:name`s or distributions it holds.
    """
    found = {candidate for candidate in _named.get() if candidate.kind == kind}
    for entry in _entry_points(_path_state()).select(group=f"drivetrain.{kind}"):
        found.add(_candidate(kind, entry))
    by_name: dict[str, list[Candidate]] = {}
    for candidate in sorted(found):
        if _allowed(candidate):
            by_name.setdefault(candidate.name, []).append(candidate)
    return by_name


def _candidate(kind: str, entry: metadata.EntryPoint) -> Candidate:
    dist = entry.dist
    if dist is None:
        return Candidate(kind, entry.name, "unknown", "0", entry.value, (), entry)
    # a distribution whose metadata is broken must not hide all others
    meta: Any = dist.metadata
    name, version = meta.get("Name"), meta.get("Version")
    requires = meta.get_all("Requires-Dist") or dist.requires or ()  # `requires` would parse the metadata once more
    return Candidate(kind, entry.name, name or "unknown", version or "0", entry.value, tuple(requires), entry)


@lru_cache(maxsize=1)
def _entry_points(_state: tuple[tuple[str, int], ...]) -> Any:
    """Every entry point of the environment (`importlib.metadata.entry_points()`), read once for each state of `sys.path`."""
    return metadata.entry_points()


def _path_state() -> tuple[tuple[str, int], ...]:
    """What tells whether something was installed or removed since the last look: the path's folders and when they changed."""
    state = []
    for folder in sys.path:
        try:
            state.append((folder, os.stat(folder or ".").st_mtime_ns))
        except OSError:
            state.append((folder, 0))
    return tuple(state)


# The modules of files by path and content, for as long as the process lives, as with any import; a file that was edited is another.
_LOADED: dict[tuple[Path, str], tuple[Candidate, ...]] = {}
# What has a name because a configuration names its file: only in the thread or task, and while, that configuration is at work.
_named: ContextVar[tuple[Candidate, ...]] = ContextVar("drivetrain_files", default=())


@contextmanager
def naming(files: Any) -> Iterator[None]:
    """A block in which the components of these files can be found by name; what cannot be loaded is left out."""
    found = list(_named.get())
    for file in files if isinstance(files, (list, tuple)) else ():
        with suppress(PluginError, TypeError):
            found += [candidate for candidate in load_file(file) if candidate not in found]
    token = _named.set(tuple(found))
    try:
        yield
    finally:
        _named.reset(token)


def load_file(path: str | Path) -> tuple[Candidate, ...]:
    """The components that a Python file defines, `LossFloor` as "loss_floor", under the rules of installed ones.

    The file is code and runs: only a caller or a command line may name it, never a configuration file. It runs once for each content.

    Raises:
        PluginError: when there is no such file, it fails, or it defines no component.
    """
    file = Path(path).resolve()
    if file.suffix != ".py" or not file.is_file():
        raise PluginError(f"{path} is no Python file; name one such as ./my_plugin.py.")
    place, content = (hashlib.sha256(data).hexdigest()[:12] for data in (str(file).encode(), file.read_bytes()))
    if (file, content) in _LOADED:
        return _LOADED[file, content]
    name = f"drivetrain_file_{re.sub(r'[^A-Za-z0-9_]', '_', file.stem)}_{place}_{content}"
    spec = util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = util.module_from_spec(spec)
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), vars(module))  # a loader may take an older version for this one
    except Exception as error:
        del sys.modules[name]
        raise PluginError(f"{path} failed to load: {type(error).__name__}: {error}.") from error
    found = [thing for thing in vars(module).values() if getattr(thing, "__module__", None) == name and _is_component(thing)]
    if not found:
        raise PluginError(
            f"{path} defines no component: decorate a subclass of Callback or of another kind's base with @component."
        )
    _LOADED[file, content] = tuple(_of_file(file.name, content, cls) for cls in found)
    return _LOADED[file, content]


def _is_component(thing: Any) -> bool:
    declared = isinstance(thing, type) and "__attrs_attrs__" in vars(thing)
    return declared and getattr(thing, "kind", None) in KINDS and not thing.__name__.startswith("_")


def _of_file(file: str, content: str, cls: type) -> Candidate:
    """The candidate for a class of a file; the file's hash is its version, so that a resumed run notices a change."""
    kind, name = cls.kind, re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()  # type: ignore[attr-defined]
    target = f"{cls.__module__}:{cls.__qualname__}"
    return Candidate(kind, name, file, content, target, (), metadata.EntryPoint(name, target, f"drivetrain.{kind}"))


def all_candidates() -> Iterator[Candidate]:
    """Every installed plugin of every kind, in the order of `KINDS`."""
    for kind in KINDS:
        for group in candidates(kind).values():
            yield from group


def is_installed(kind: str, name: str) -> bool:
    """Whether some installed distribution provides `name`; imports nothing."""
    return name in candidates(kind)


def find(kind: str, name: str) -> Candidate:
    """The one plugin that `name` ("adamw", or "distribution:adamw" when several claim it) means.

    Raises:
        PluginError: when nobody or more than one distribution provides the name.
    """
    distribution, _, bare = name.rpartition(":")
    known = candidates(kind)
    group = [c for c in known.get(bare, []) if not distribution or c.distribution == distribution]
    if not group:
        raise PluginError(_unknown(kind, name, bare, known))
    if len(group) > 1:
        owners = ", ".join(f"{c.distribution} {c.version} ({c.target})" for c in group)
        raise PluginError(
            f"{len(group)} installed distributions provide the {kind} {bare!r}: {owners}. "
            f"Uninstall one, or choose with '{group[0].distribution}:{bare}'."
        )
    return group[0]


def load(kind: str, name: str) -> object:
    """Import and return the object behind `name` of `kind`; raises `PluginError`."""
    return find(kind, name).load()


def _unknown(kind: str, name: str, bare: str, known: dict[str, list[Candidate]]) -> str:
    said = f"no plugin named {name!r} of the kind {kind}."
    if bare in known:
        homes = [c.distribution for c in known[bare]]
        right = [bare] if len(homes) == 1 else [f"{home}:{bare}" for home in homes]
        return f"{said} {bare!r} comes from {', '.join(homes)}: write {' or '.join(map(repr, right))}."
    if (home := distribution_of(kind, bare)) is not None:
        hidden = f" or look at {SWITCH}={os.environ[SWITCH]!r}, which may hide it" if SWITCH in os.environ else ""
        return f"{said} It comes with {home}: pip install {home}{hidden}"
    hint = suggest(bare, {*known, *names_of(kind)})
    near = re.search(r"'(.+)'", hint)
    if near and near[1] not in known and (home := distribution_of(kind, near[1])):
        return f"{said}{hint} (pip install {home})"
    return f"{said}{hint} Installed: {', '.join(known) or 'none'}."


def _allowed(candidate: Candidate) -> bool:
    wanted = os.environ.get(SWITCH, "").strip()
    if not wanted:
        return True
    names = {item.strip() for item in wanted.split(",")}
    return bool(names & {candidate.name, f"{candidate.kind}:{candidate.name}", candidate.distribution})


def _core_range(requirement: str) -> str | None:
    """The version range in a `Requires-Dist` line on the core; None when the line is about something else, or holds elsewhere.

    A line for an extra, or whose marker excludes this environment, does not count. Markers take `packaging`, which every tool that
    installs has; without it a line with one counts.
    """
    match = re.match(r"\s*([\w.-]+)\s*(?:\[[^\]]*\])?\s*\(?\s*([^;)]*)\)?\s*(?:;\s*(.+))?$", requirement)
    if match is None or re.sub(r"[-_.]+", "-", match[1]).lower() != CORE:
        return None
    return match[2].replace(" ", "") if match[3] is None or _holds(match[3]) else None


def _holds(marker: str) -> bool:
    try:
        from packaging.markers import InvalidMarker, Marker
    except ImportError:
        return "extra" not in marker
    try:
        return Marker(marker).evaluate({"extra": ""})
    except InvalidMarker:
        return True


def _satisfies(version: str, wanted: str) -> bool:
    """Whether `version` lies in a PEP 440 range. Pre-release suffixes are ignored: 0.2.0rc1 counts as 0.2.0."""
    here = _release(version)
    for clause in filter(None, wanted.split(",")):
        match = re.match(r"(~=|==|!=|<=|>=|<|>)(.+)", clause)
        if match is None:
            continue
        operator, text = match.groups()
        there = _release(text)
        if operator in ("==", "!=") and text.endswith(".*"):
            equal = here[: len(there)] == there
        else:
            equal = _padded(here) == _padded(there)
        ordered = (_padded(here) > _padded(there)) - (_padded(here) < _padded(there))
        holds = {
            "==": equal,
            "!=": not equal,
            ">=": ordered >= 0,
            "<=": ordered <= 0,
            ">": ordered > 0,
            "<": ordered < 0,
            "~=": ordered >= 0 and here[: len(there) - 1] == there[:-1],
        }[operator]
        if not holds:
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", re.match(r"[\d.]*", version)[0]))  # type: ignore[index]


def _padded(release: tuple[int, ...]) -> tuple[int, ...]:
    return release + (0,) * (6 - len(release))
