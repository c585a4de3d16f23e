"""What a run is made of, as plain data saved with its state, and what of it has changed when the run goes on.

A change is safe (the training computes the same), a warning (rounding, or what comes later, may differ) or refused (the rest
would not fit the beginning). Secrets are not recorded: no environment, and no value of a key such as `api_key`.
"""

from __future__ import annotations

import enum
import hashlib
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from drivetrain import __version__
from drivetrain.components import fields_of
from drivetrain.config import HIDDEN, without_secrets
from drivetrain.duration import Duration

if TYPE_CHECKING:
    from drivetrain.components import Component
    from drivetrain.context import CallbackContext

Verdict = Literal["safe", "warn", "refuse"]

_ABSENT = "(absent)"
_MAYBE_SECRET = re.compile(r"(token|key)s?(?![a-z])", re.IGNORECASE)  # what a run cannot do without is not kept here
_LONGEST = 1000  # characters of a text, items of a list: what is longer is data, not an option

# Configuration keys whose change matters; all others are safe, or show in what follows from them (the batch sizes in `step`).
_OF_KEYS: dict[str, tuple[Verdict, str]] = {
    "seed": ("refuse", "the order of samples and their augmentation follow from it"),
    "max_grad_norm": ("refuse", "the updates would be of another size"),
    "dataloader.shuffle": ("refuse", "the order of samples would be another"),
    "dataloader.drop_last": ("refuse", "an epoch would have other steps"),
    "max_duration": ("warn", "a schedule that looks at the run's length goes on along another curve"),
    "model_name": ("warn", "another model may be meant"),
    "compile": ("warn", "sums may be rounded otherwise"),
    "channels_last": ("warn", "sums may be rounded otherwise"),
    "activation_checkpointing": ("warn", "sums may be rounded otherwise"),
}
_OF_KINDS: dict[str, tuple[Verdict, str]] = {
    "optimizer": ("refuse", "the updates would be others"),
    "scheduler": ("refuse", "the learning rate would go on along another curve"),
    "precision": ("refuse", "the training would go on in other numbers"),
    "mode": ("refuse", "other weights would be trained"),
    "model": ("refuse", "the model would compute something else"),
    "dataset": ("warn", "the samples may be others"),
    "strategy": ("warn", "sums over processes may be rounded otherwise"),
}
_OF_PARTS: dict[str, tuple[Verdict, str]] = {
    "step.samples": ("refuse", "the position in the data counts in steps of this many samples"),
    "step.microbatches": ("warn", "the same samples, but sums may be rounded otherwise"),
    "data.length": ("refuse", "the order of samples would be another"),
    "data.samples": ("refuse", "the samples are not those that the run began with"),
    "data.type": ("warn", "the samples may be others"),
    "eval_data": ("warn", "evaluations, and what follows from them, are of other samples"),
    "model.types": ("refuse", "the weights would go on in other numbers"),
    "model.trainable": ("refuse", "other weights would be trained"),
    "model.tensors": ("warn", "the saved weights may not fit"),
    "optimizer": ("refuse", "the updates would be others"),
    "code": ("warn", "the program may compute something else"),
    "versions": ("warn", "results may differ in rounding"),
    "hardware": ("warn", "results may differ in rounding"),
}


_IN_STEPS: tuple[Verdict, str] = ("warn", "it takes part in the steps")
_EVENTS_IN_STEPS = ("batch", "forward", "loss", "backward", "gradients", "clipped", "optimizer_step")


@attrs.frozen
class Change:
    """One thing that differs between the run that was saved and the one that goes on."""

    key: str
    old: Any
    new: Any
    verdict: Verdict
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.old} → {self.new} ({self.reason or 'the training computes the same'})"


# -- what a run is made of -------------------------------------------------------------------------------------------------


def describe(ctx: CallbackContext) -> dict[str, Any]:
    """The run as plain data: nested tables of numbers, texts, lists, truth values and None. Draws no random number."""
    config, run = ctx.config, ctx.run
    source, split = run.source, run.source.split
    microbatches = split.accumulation * split.world_size
    keys = {f.name: getattr(config, f.name) for f in attrs.fields(type(config)) if f.init and not f.metadata["kind"]}
    del keys["callbacks"]
    kinds = {thing.kind for thing in run.components}
    return {
        "config": {key: {"value": plain(value, key), "origin": config.origin(key)} for key, value in keys.items()},
        "components": {thing.plugin_name: _component(thing) for thing in run.components},
        # a component's options say the same, and more
        "optimizer": {} if "optimizer" in kinds else _optimizer(ctx.optimizer),
        "step": {"samples": split.batch_size * microbatches, "microbatches": microbatches},
        "data": _data(source.data),
        "eval_data": {} if run.eval_source is None else _data(run.eval_source.data),
        "model": _model(run.model),
        "code": {"git": git_commit(Path.cwd())},
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "drivetrain-core": __version__},
        "hardware": _hardware(ctx.device),
        "processes": {"strategy": ctx.strategy.name, "world_size": ctx.strategy.world_size},
    }


def _component(thing: Component) -> dict[str, Any]:
    options = {f.name: plain(getattr(thing, f.name, None), f.name) for f in fields_of(type(thing)) if f.init}
    takes_part = thing.changes_training
    if takes_part is None:
        takes_part = any(hasattr(thing, f"on_{event}") for event in _EVENTS_IN_STEPS)
    return {"origin": thing.origin, "options": options, "in_steps": takes_part}


def _optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A ready optimizer: its class and the options of its groups, the learning rate being the one that a schedule multiplies."""
    rows = [{**group, "lr": group.get("initial_lr", group.get("lr"))} for group in optimizer.param_groups]
    groups = [{k: plain(v, k) for k, v in row.items() if k not in ("params", "initial_lr")} for row in rows]
    return {"class": _name_of(type(optimizer)), "groups": groups}


def _data(data: Any) -> dict[str, Any]:
    """Type, length and, where that can be told without side effects, a hash of the first, middle and last sample."""
    inner: Any = data.dataset if isinstance(data, DataLoader) else data
    try:
        length = len(inner)
    except (TypeError, NotImplementedError):
        length = None
    return {"type": _name_of(type(inner)), "length": length, "samples": _sample_hash(inner, length or 0)}


def _sample_hash(data: Any, length: int) -> str | None:
    """None for data sets of other classes: reading a sample may open a file that worker processes must not share, or count."""
    for name in ("fingerprint", "_fingerprint"):  # a data set's own word on its content; the second is Hugging Face's
        if isinstance(named := getattr(data, name, None), str):
            return named
    inner = data
    while type(inner) is Subset:
        inner = inner.dataset
    if type(inner) not in (list, tuple, TensorDataset) or not length:
        return None
    digest = hashlib.sha256()
    for index in sorted({0, length // 2, length - 1}):
        for part in _leaves(data[index]):
            digest.update(part)
    return digest.hexdigest()[:16]


def _leaves(value: Any) -> Iterator[bytes]:
    """The content of a sample as bytes."""
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield bytes(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist()) if value.numel() else b""
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, (str, int, float, bytes, bool, type(None))):
        yield repr(value).encode()


def _model(model: nn.Module) -> dict[str, Any]:
    tensors = sorted([*model.named_parameters(), *model.named_buffers()])
    parameters = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "tensors": _hash(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors),
        "types": _hash(f"{name} {tensor.dtype}" for name, tensor in tensors),
    }


def _hardware(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":  # how sums are split depends on the number of threads
        return {"device": "cpu", "name": platform.machine(), "threads": torch.get_num_threads()}
    name = getattr(torch.get_device_module(device), "get_device_name", lambda _: "")
    return {"device": device.type, "name": str(name(device)), "threads": None}


def git_commit(folder: Path) -> str | None:
    """The commit checked out around a folder, read from git's own files; whether files differ from it is not known."""
    for parent in (folder, *folder.parents):
        try:
            if (parent / ".git").exists():
                return _head(parent / ".git")
        except (OSError, ValueError):
            return None
    return None


def _head(git: Path) -> str | None:
    if git.is_file():  # a worktree or submodule
        git = git.parent / git.read_text().removeprefix("gitdir:").strip()
    common = git / (git / "commondir").read_text().strip() if (git / "commondir").exists() else git
    kind, _, name = (git / "HEAD").read_text().strip().partition(" ")
    if kind != "ref:":
        return _commit(kind)
    for place in (git / name, common / name):
        if place.is_file():
            return _commit(place.read_text().strip())
    packed = common / "packed-refs"
    rows = packed.read_text().splitlines() if packed.is_file() else []
    return next((_commit(row.split()[0]) for row in rows if row.endswith(f" {name}")), None)


def _commit(text: str) -> str | None:
    return text if re.fullmatch(r"[0-9a-f]{40,64}", text) else None


def plain(value: Any, key: str = "", depth: int = 0) -> Any:
    """A value as plain data: what is no option (a tensor, an object, long data) becomes the name of its type."""
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):  # of NumPy and the like as well
        return without_secrets(int(value) if isinstance(value, int) else float(value), key)
    if _MAYBE_SECRET.search(key):
        return HIDDEN
    if isinstance(value, (str, Path, Duration)) and len(text := str(value)) <= _LONGEST:
        return without_secrets(text, key)
    if depth < 4 and isinstance(value, Mapping) and len(value) <= _LONGEST:
        return {str(k): without_secrets(plain(v, str(k), depth + 1), key) for k, v in value.items()}
    if depth < 4 and isinstance(value, (list, tuple)) and len(value) <= _LONGEST:
        return [plain(item, key, depth + 1) for item in value]
    if attrs.has(type(value)) and depth < 4:
        return {f.name: plain(getattr(value, f.name), f.name, depth + 1) for f in attrs.fields(type(value)) if f.init}
    return f"({_name_of(type(value))})"


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _name_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


# -- what has changed ------------------------------------------------------------------------------------------------------


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """What differs between two descriptions, each change with its verdict. What only one of them knows of is never refused:
    it came or went with a version."""
    changes = list(_config_changes(old["config"], new["config"]))
    changes += _component_changes(old["components"], new["components"])
    before, after = flat(_parts(old)), flat(_parts(new))
    for key in sorted(before.keys() | after.keys()):
        verdict, reason = _rule(_OF_PARTS, key)
        changes += _change(key, before.get(key, _ABSENT), after.get(key, _ABSENT), verdict, reason)
    return changes


def _config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    before = flat({key: row["value"] for key, row in old.items()})
    after = flat({key: row["value"] for key, row in new.items()})
    for key in sorted(before.keys() | after.keys()):
        verdict, reason = _OF_KEYS.get(key, ("safe", ""))
        yield from _change(key, before.get(key, _ABSENT), after.get(key, _ABSENT), verdict, reason)


def _component_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for name in sorted(old.keys() | new.keys()):
        in_steps = any(side.get(name, {}).get("in_steps") for side in (old, new))
        verdict, reason = _OF_KINDS.get(name.partition(":")[0], _IN_STEPS if in_steps else ("safe", ""))
        if name not in old or name not in new:
            was, is_now = ("active" if name in side else _ABSENT for side in (old, new))
            yield Change(name, was, is_now, verdict, reason)
            continue
        before, after = flat(old[name]["options"]), flat(new[name]["options"])
        for key in sorted(before.keys() | after.keys()):
            yield from _change(f"{name}.{key}", before.get(key, _ABSENT), after.get(key, _ABSENT), verdict, reason)
        yield from _change(f"{name} from", old[name]["origin"], new[name]["origin"], *_OF_PARTS["versions"])


def _parts(description: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in description.items() if key not in ("config", "components")}


def _change(key: str, old: Any, new: Any, verdict: Verdict, reason: str) -> Iterator[Change]:
    if old == new or (key.endswith("data.samples") and None in (old, new)):  # None: not known
        return
    if verdict == "refuse" and _ABSENT in (old, new):
        verdict = "warn"
    yield Change(key, old, new, verdict, reason)


def _rule(rules: Mapping[str, tuple[Verdict, str]], key: str) -> tuple[Verdict, str]:
    """The rule for a dotted key or the nearest table above it."""
    while key:
        if key in rules:
            return rules[key]
        key = key.rpartition(".")[0]
    return "safe", ""


def flat(table: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys; lists are compared whole."""
    if not isinstance(table, Mapping) or not table:
        return {prefix: table} if prefix else {}
    rows: dict[str, Any] = {}
    for key, value in table.items():
        rows |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return rows
