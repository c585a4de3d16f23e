"""`TrainingConfig`: every hyperparameter, typed strictly, each value knowing where it came from."""

from __future__ import annotations

import enum
import os
import re
import types
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import attrs
import tomli

from drivetrain.catalogue import STANDARD_CALLBACKS
from drivetrain.cluster import detect
from drivetrain.components import Component, fields_of, make_component
from drivetrain.duration import Duration
from drivetrain.errors import ConfigError, PluginError, Problem
from drivetrain.formats import read_table, write_table
from drivetrain.limits import Limits
from drivetrain.registry import candidates, is_installed, load_file, naming
from drivetrain.structure import structure, unknown_key, unstructure

P = ParamSpec("P")
R = TypeVar("R")
Spec = Any  # a component's name, a table {use: name, option: value}, or a component object

HIDDEN = "(not recorded)"
# Keys whose value is a secret, the second kind only when it is a text: "max_tokens" is a number, "eos_token" a piece of text.
_SECRET = re.compile(
    r"secret|passw|passphrase|credential|(api|access|private|auth|signing)[_-]?key|(^|[_-])auth$", re.IGNORECASE
)
_SECRET_TEXT = re.compile(r"(?<!(?:bos|cls|eos|pad|sep|unk)[_-])(?<!mask[_-])token$", re.IGNORECASE)
_LOGIN_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")

# What stands for a component that is not named, if it is installed.
SOFT_DEFAULTS = {"optimizer": "adamw", "scheduler": "cosine", "precision": "auto", "training_mode": "full_finetune"}


class TrainingMode(enum.Enum):
    """What is trained: all weights, adapters on quantized weights, or a model from scratch."""

    FULL_FINETUNE = "full_finetune"
    QLORA = "qlora"
    PRETRAINING = "pretraining"


def _key(
    default: Any = None,
    help: str = "",
    *,
    kind: str = "",
    at_least: float | None = None,
    finite: bool = True,
    factory: Any = None,
) -> Any:
    given: dict[str, Any] = {"factory": factory} if factory else {"default": default}
    return attrs.field(metadata={"help": help, "kind": kind, "limits": Limits(at_least, finite=finite)}, **given)


def _on_set_loader(loader: DataLoaderConfig, attribute: attrs.Attribute[Any], value: Any) -> Any:
    path = f"dataloader.{attribute.name}"
    value = structure(value, get_type_hints(DataLoaderConfig)[attribute.name], path)
    if problems := list(_outside(attribute, value, path)):
        raise ConfigError(problems)
    return value


@attrs.define(kw_only=True, on_setattr=_on_set_loader)
class DataLoaderConfig:
    """How samples are fetched. None of these changes which samples a step sees or their random numbers, but for `shuffle` and
    `drop_last`."""

    num_workers: int = _key(0, "worker processes; 0 fetches in the training process", at_least=0)
    shuffle: bool = _key(True, "a new order in each epoch, fixed by (seed, epoch)")
    drop_last: bool = _key(False, "leave out a last microbatch that is not full")
    pin_memory: bool | None = _key(None, "page-locked host memory for faster copies; by default on CUDA devices only")
    prefetch_factor: int = _key(2, "microbatches fetched ahead by each worker", at_least=1)
    timeout: float = _key(0.0, "seconds to wait for a worker, then an error; 0 waits for ever", at_least=0)


def _on_set(config: TrainingConfig, attribute: attrs.Attribute[Any], value: Any) -> Any:
    """Assigning to a key checks the value as writing it in a file would, and records where it came from."""
    with naming(config.plugins):
        value = _structured(attribute, value)
    config._origins = {k: v for k, v in config._origins.items() if k.split(".")[0] != attribute.name}
    config._origins[attribute.name] = "python"
    return value


def _with_files(method: Callable[Concatenate[TrainingConfig, P], R]) -> Callable[Concatenate[TrainingConfig, P], R]:
    """Let the components of the files in `plugins` have their names while a method of the configuration is at work."""

    @wraps(method)
    def run(config: TrainingConfig, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with naming(config.plugins):
            return method(config, *args, **kwargs)

    return run


@attrs.define(kw_only=True, on_setattr=_on_set, eq=False)
class TrainingConfig:
    """Every hyperparameter of a run. The keys are the same in Python, TOML, YAML and JSON.

    Raises:
        ConfigError: with every wrong value at once.
    """

    plugins: list[str] = _key(
        help="Python files whose components may be named, such as ./my_plugin.py; for code and the command line, never for a file",
        factory=list,
    )
    training_mode: TrainingMode | Spec = _key(TrainingMode.FULL_FINETUNE, "what is trained", kind="mode")
    model_name: str | None = _key(None, "a label or path that model plugins and presets read")
    model: Spec = _key(None, "the model, for runs from the command line", kind="model")
    data: Spec = _key(None, "the training data, for runs from the command line", kind="dataset")
    eval_data: Spec = _key(None, "the evaluation data; without it, the part that `data` holds out, if it does", kind="dataset")
    run_name: str | None = _key(None, "the run's directory is output_dir/run_name")
    output_dir: Path = _key(Path("runs"), "where runs are kept")
    seed: int = _key(0, "fixes initial weights of built models, sample order, augmentation and dropout", at_least=0)
    max_duration: Duration = _key(Duration(3, "ep"), "when to stop: '3ep', '1000st', '1e9tok', '2h'")
    per_device_batch_size: int = _key(8, "samples in one microbatch of one process", at_least=1)
    per_device_eval_batch_size: int | None = _key(None, "the same in evaluation; by default per_device_batch_size", at_least=1)
    gradient_accumulation_steps: int = _key(1, "microbatches in one step", at_least=1)
    global_batch_size: int | None = _key(None, "samples in one step of all processes, in place of the accumulation", at_least=1)
    precision: Spec = _key(None, "fp32, tf32, bf16, fp16; by default what the device runs best", kind="precision")
    optimizer: Spec = _key(None, "the optimizer; by default adamw", kind="optimizer")
    scheduler: Spec = _key(None, "the learning rate over the run; by default cosine", kind="scheduler")
    max_grad_norm: float | None = _key(
        1.0, "clip the gradients' total norm to this; inf only measures it, false leaves them", at_least=0, finite=False
    )
    distributed: Spec = _key("auto", "ddp, fsdp, mpi, none; auto picks by the launch environment", kind="strategy")
    device: str = _key("auto", "cpu, cuda, cuda:1, mps, xpu, a plugin's; auto picks the accelerator if there is one")
    callbacks: list[Spec] = _key(help="callbacks to add, or to configure when they are standard ones", factory=list)
    standard_callbacks: bool = _key(True, "add the installed ones of gc, throughput, progress, logging and checkpoint")
    log_interval: Duration = _key(Duration(10, "st"), "how often values are read from the device and logged")
    eval_interval: Duration | None = _key(Duration(1, "ep"), "how often to evaluate; false for never")
    eval_at_start: bool = _key(False, "evaluate before the first step as well")
    dataloader: DataLoaderConfig = _key(help="how samples are fetched", factory=DataLoaderConfig)
    compile: bool = _key(False, "torch.compile the model, each repeated block by itself")
    channels_last: bool = _key(
        False, "store the weights of 2-D convolutions with the channels last, in which most devices are faster"
    )
    activation_checkpointing: bool | Literal["selective", "offload"] = _key(
        False,
        "save memory: recompute the repeated blocks' activations in backward; selective: all but matrix products; "
        "offload: keep them in host memory instead",
    )
    resume: str = _key("auto", "auto: go on from the newest checkpoint of this run; never; or the path of a run or checkpoint")
    resume_changed: Literal["refuse", "allow"] = _key(
        "refuse", "when what is trained was changed since the run began (learning rate, seed, data, …): stop, or go on with it"
    )
    _origins: dict[str, str] = attrs.field(factory=dict, init=False, repr=False, on_setattr=attrs.setters.NO_OP)

    def __attrs_post_init__(self) -> None:
        problems: list[Problem] = []
        given = {}
        for f in _fields():
            value = getattr(self, f.name)
            try:
                with naming(self.plugins):
                    object.__setattr__(self, f.name, _structured(f, value))
            except ConfigError as error:
                problems += error.problems
            given[f.name] = "default" if value == _default(f) else "python"
        self._origins = given
        problems += self._contradictions() if not problems else []
        if problems:
            raise ConfigError(problems)

    def check(self) -> None:
        """Raise `ConfigError` for keys that contradict each other, which assigning them one by one does not notice."""
        if problems := list(self._contradictions()):
            raise ConfigError(problems)

    def _contradictions(self) -> Iterable[Problem]:
        if self.run_name is not None and (wrong := run_name_problem(self.run_name)):
            yield Problem("run_name", wrong)
        if not _can_be_a_path(self.output_dir):
            yield Problem("output_dir", "cannot be a path: it is too long, or has a character that no file's name can have")
        if self.max_duration.unit == "%":
            yield Problem("max_duration", "cannot be a percentage; it is what percentages are of")
        if self.global_batch_size is not None and self.gradient_accumulation_steps != 1:
            yield Problem("global_batch_size", "is given together with gradient_accumulation_steps; give one of the two")

    # -- where values come from ------------------------------------------------------------------------------------------

    @classmethod
    def from_table(cls, table: Mapping[str, Any], origin: str = "python") -> TrainingConfig:
        """Make a configuration from plain data.

        Raises:
            ConfigError: for every unknown key and wrong value at once.
        """
        known = {f.name: f for f in _fields()}
        problems = [Problem(str(key), unknown_key(str(key), list(known))) for key in table if key not in known]
        values = {}
        for key in (key for key in known if key in table):  # `plugins` first: the others may name what they hold
            try:
                with naming(table.get("plugins")):
                    values[key] = _structured(known[key], table[key])
            except ConfigError as error:
                problems += error.problems
        if problems:
            order = {key: index for index, key in enumerate(table)}
            raise ConfigError(sorted(problems, key=lambda p: order.get(p.path.replace("[", ".").split(".")[0], 0)), origin)
        try:
            config = cls(**values)
        except ConfigError as error:
            raise ConfigError(error.problems, origin) from None
        config._origins |= dict.fromkeys(flatten(table), origin) | dict.fromkeys(table, origin)
        return config

    def origin(self, key: str) -> str:
        """Where a value came from: "default", "python", a file's name, "preset NAME", or "override"; `key` is dotted."""
        while key:
            if key in self._origins:
                return self._origins[key]
            key = key.rpartition(".")[0]
        return "default"

    def explain(self) -> list[tuple[str, Any, str]]:
        """Every value with its dotted key and origin, the options of components included; secrets are left out."""
        rows = []
        full = self.to_dict(full=True, secrets=False)
        for key, value in flatten({f.name: full.get(f.name) for f in _fields()}).items():
            named = key in self._origins or any(key.startswith(f"{k}.") and "." in k for k in self._origins)
            top = key.split(".")[0].split("[")[0]
            nested = key != top
            rows.append((key, value, self._origins.get(key, "default") if nested or named else self.origin(key)))
        return rows

    # -- components ------------------------------------------------------------------------------------------------------

    @_with_files
    def components(self, replaced: Container[str] = ()) -> RunComponents:
        """Make the components that this configuration names, and the soft defaults that are installed.

        Args:
            replaced: keys whose place a ready object takes; nothing is made for them.

        Raises:
            ConfigError: for every unknown name and wrong option at once.
        """
        problems: list[Problem] = []

        def make(kind: str, spec: Spec, path: str) -> Component | None:
            try:
                return make_component(kind, spec, path)
            except ConfigError as error:
                problems.extend(error.problems)
                return None

        single: dict[str, Component | None] = {}
        for f in _fields():
            default = SOFT_DEFAULTS.get(f.name)
            if f.name == "scheduler":  # an optimizer may ask for another
                default = getattr(single.get("optimizer"), "default_scheduler", None) or default
            kind, spec = f.metadata["kind"], _with_default(f.name, getattr(self, f.name), default)
            spec = _routed(spec) if f.name == "optimizer" else spec
            if kind and kind not in ("mode", "strategy") and spec is not None and f.name not in replaced:
                single[f.name] = make(kind, spec, f.name)
        if "distributed" not in replaced and (strategy := self.strategy_spec()) is not None:
            single["distributed"] = make("strategy", strategy, "distributed")
        if self.mode_name != SOFT_DEFAULTS["training_mode"] or is_installed("mode", self.mode_name):
            spec = self.training_mode
            single["training_mode"] = make("mode", spec.value if isinstance(spec, TrainingMode) else spec, "training_mode")
        callbacks = [make("callback", spec, f"callbacks[{index}]") for index, spec in enumerate(self.callbacks)]
        if problems:
            raise ConfigError(problems)
        return RunComponents(single={k: c for k, c in single.items() if c}, callbacks=[c for c in callbacks if c])

    def strategy_spec(self) -> Spec:
        """The strategy to make: the one named, or with "auto" one for the processes that a launcher started; None for none."""
        name = _use(self.distributed)
        if name != "auto":
            return None if name == "none" else self.distributed
        cluster = detect()
        if cluster.world_size == 1:
            return None
        return "mpi" if cluster.launcher == "mpi" and is_installed("strategy", "mpi") else "ddp"

    @property
    def mode_name(self) -> str:
        """The training mode as a registry name: "full_finetune", "qlora", …"""
        mode = self.training_mode
        if isinstance(mode, Component):
            return mode.plugin_name.partition(":")[2] or type(mode).__name__.lower()
        return mode.value if isinstance(mode, TrainingMode) else _use(mode)

    # -- plain data ------------------------------------------------------------------------------------------------------

    @_with_files
    def to_dict(self, full: bool = False, secrets: bool = True) -> dict[str, Any]:
        """The configuration as plain data that `from_table` reads.

        Args:
            full: write every option of every component with its default, leave out keys without a value, and write false for those
                whose value was taken away (`eval_interval`).
            secrets: False puts "(not recorded)" in the place of what a key such as `api_key` holds.
        """
        table: dict[str, Any] = {}
        made = self.components() if full else None
        for f in _fields():
            value = getattr(self, f.name)
            if f.name == "callbacks":
                table[f.name] = [_plain(c) for c in made.callbacks] if made else [_plain(c) for c in value]
            elif made and f.name in made.single:
                table[f.name] = _plain(made.single[f.name])
            else:
                table[f.name] = _plain(value)
        table = table if secrets else without_secrets(table)
        return _readable(table) if full else table

    @_with_files
    def save(self, path: str | Path) -> None:
        """Write the configuration to a file whose suffix names the format; `load_training_config` gives it back.

        Secrets are not written (see `without_secrets`); whoever loads the file has to give them again, as overrides.

        Raises:
            ConfigError: for components made in Python of classes that have no name.
        """
        made = [(f.name, getattr(self, f.name)) for f in _fields() if f.name != "callbacks"]
        made += [(f"callbacks[{index}]", thing) for index, thing in enumerate(self.callbacks)]
        nameless = [(key, v) for key, v in made if isinstance(v, Component) and not is_installed(v.kind, _name_of(v))]
        if nameless:
            why = "has no name that a file could hold; give it an entry point, or a Python file named in `plugins`"
            raise ConfigError([Problem(key, f"{type(thing).__name__} {why}") for key, thing in nameless])
        write_table(Path(path), without_secrets(_readable(self.to_dict())))


@attrs.frozen
class RunComponents:
    """The components of one run: `single` by the key that named them, and the callbacks in order."""

    single: dict[str, Component]
    callbacks: list[Component]


def load_training_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Read a configuration file (TOML, JSON, or a format that a plugin adds) and check all of it, components included.

    Args:
        path: the file.
        overrides: `key=value` texts with dotted keys, such as "optimizer.lr=6e-4" or "callbacks.checkpoint.every=100st".
            Values are read as TOML, or as plain text where that fails.

    Raises:
        ConfigError: naming the file and every problem in it.
    """
    source = str(path)
    table = read_table(Path(path))
    problems: list[Problem] = []
    keys = []
    for text in overrides:
        try:
            keys.append(_override(table, text))
        except ConfigError as error:
            problems += error.problems
    if table.get("plugins") and "plugins" not in keys:  # it names code to run: the file may be a stranger's
        del table["plugins"]
        message = "names code to run, which a file may not do; say it where you start the run: plugins='[\"./my_plugin.py\"]'"
        problems.append(Problem("plugins", message))
    config = None
    try:
        config = TrainingConfig.from_table(table, Path(path).name)
        problems += _component_problems(config)
    except ConfigError as error:
        problems += error.problems
        problems += _component_problems(_salvage(table, {p.path.replace("[", ".").split(".")[0] for p in error.problems}))
    problems += [
        Problem(key, f"is a secret, which is not kept with a run; give it again: {key}=…")
        for key, value in flatten(table).items()
        if HIDDEN in str(value)
    ]
    if problems or config is None:
        raise ConfigError(problems, source)
    config._origins |= dict.fromkeys(keys, "override")
    return config


def _salvage(table: Mapping[str, Any], bad: set[str]) -> TrainingConfig | None:
    """The rest of a table that has problems, so that those of its components are reported in the same pass."""
    try:
        return TrainingConfig.from_table({k: v for k, v in table.items() if k not in bad})
    except ConfigError:
        return None


def _component_problems(config: TrainingConfig | None) -> Sequence[Problem]:
    try:
        if config is not None:
            config.components()
    except ConfigError as error:
        return error.problems
    return ()


def _with_default(key: str, spec: Spec, default: str | Mapping[str, Any] | None) -> Spec:
    """A component's spec with the soft default where none is written; None when there is nothing to make."""
    table = {"use": default} if isinstance(default, str) else dict(default or {})
    if isinstance(spec, Mapping) and "use" not in spec and default:
        return table | dict(spec)
    if spec is None and default and is_installed(_kind_of(key), table["use"]):
        return table
    return spec


def _routed(spec: Spec) -> Spec:
    """An optimizer's table with `routes`, other optimizers for some parameters, as that of the plugin for it; itself has the rest."""
    if not isinstance(spec, Mapping) or "routes" not in spec or _use(spec).rpartition(":")[2] == "routed":
        return spec
    return {"use": "routed", "routes": spec["routes"], "default": {k: v for k, v in spec.items() if k != "routes"}}


def without_secrets(value: Any, key: str = "") -> Any:
    """Plain data with `HIDDEN` for what is under a telling key, such as `api_key` or `token`, and for logins in addresses."""
    if isinstance(value, Mapping):
        return {k: without_secrets(v, key if _SECRET.search(key) else str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item, key) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if _SECRET.search(key) or (isinstance(value, str) and _SECRET_TEXT.search(key)):
        return HIDDEN
    return _LOGIN_IN_URL.sub(HIDDEN, value) if isinstance(value, str) else value


def flatten(table: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys. In lists of components the place is the component's name: `callbacks.checkpoint.every`."""
    if isinstance(table, Mapping) and table:
        rows: dict[str, Any] = {}
        for key, value in table.items():
            path = f"{prefix}.{key}" if prefix else str(key)
            rows |= {prefix: value} if key == "use" else flatten(value, path)
        return rows
    if isinstance(table, list) and table and all(_use(item) for item in table):
        rows = {}
        for item in table:
            rows |= flatten({"use": item} if isinstance(item, str) else item, f"{prefix}.{_use(item)}")
        return rows
    return {prefix: table}


def _fields() -> list[attrs.Attribute[Any]]:
    return [f for f in attrs.fields(TrainingConfig) if f.init]


def _kind_of(key: str) -> str:
    return next((f.metadata["kind"] for f in _fields() if f.name == key), "")


def _default(f: attrs.Attribute[Any]) -> Any:
    default: Any = f.default
    return default.factory() if hasattr(default, "factory") else default


def _use(spec: Any) -> str:
    """The name in a component's spec; empty for an object."""
    return spec if isinstance(spec, str) else str(spec.get("use", "")) if isinstance(spec, Mapping) else ""


def _plain(value: Any) -> Any:
    if isinstance(value, Component):
        defaults = {f.name: f.default for f in fields_of(type(value))}
        given = value.options().items()  # what is none and not by default is written as false: TOML has no word for it
        return {"use": _name_of(value), **{k: False if v is None and defaults[k] is not None else v for k, v in given}}
    return unstructure(value)


def _readable(table: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that have a value, and false for those whose default was taken away: files have no word for None."""
    taken = {f.name for f in _fields() if f.default is not None}
    return {k: False if v is None else v for k, v in table.items() if v is not None or k in taken}


def _name_of(thing: Component) -> str:
    """The name by which a file can ask for a component made in Python; its class's where nobody provides it."""
    cls, known = type(thing), thing.plugin_name.partition(":")[2].partition("#")[0]
    package = cls.__module__.partition(".")[0]
    for name, group in candidates(cls.kind).items():
        for found in group:
            module, _, target = found.target.partition(":")
            same = module.partition(".")[0] == package and target == cls.__qualname__  # so loading it imports nothing new
            if name == known or (same and found.load() is cls):
                return name
    return known or cls.__name__


_HINTS: dict[str, Any] = {}


def _structured(f: attrs.Attribute[Any], value: Any) -> Any:
    """One value, checked against its key's type."""
    if not _HINTS:
        _HINTS.update(get_type_hints(TrainingConfig))
    wanted, kind = _HINTS[f.name], f.metadata["kind"]
    if f.name == "training_mode":
        return _mode(value)
    if f.name == "plugins":
        return _loaded(value)
    if kind:  # `distributed` has a word for none, which files can hold
        return _checked_spec("none" if value is None and f.default else value, f.name)
    if f.name == "callbacks":
        return _checked_callbacks(value)
    if value is False and _optional(wanted):
        return None
    result = structure(value, wanted, f.name) if not isinstance(value, DataLoaderConfig) else value
    if problems := list(_outside(f, result, f.name)):
        raise ConfigError(problems)
    return result


def _outside(f: attrs.Attribute[Any], value: Any, path: str) -> Iterator[Problem]:
    """What is outside its limits, in a table each key that is."""
    if isinstance(value, DataLoaderConfig):
        for inner in attrs.fields(DataLoaderConfig):
            yield from _outside(inner, getattr(value, inner.name), f"{path}.{inner.name}")
    try:
        f.metadata["limits"].check(value)
    except ValueError as error:
        yield Problem(path, str(error))


def _optional(wanted: Any) -> bool:
    return get_origin(wanted) in (Union, types.UnionType) and type(None) in get_args(wanted) and bool not in get_args(wanted)


def _loaded(value: Any) -> list[str]:
    """Load the files; every one that cannot be is a problem of its own."""
    files: list[str] = structure(value, list[str], "plugins")
    problems = []
    for index, file in enumerate(files):
        try:
            load_file(file)
        except PluginError as error:
            problems.append(Problem(f"plugins[{index}]", str(error)))
    if problems:
        raise ConfigError(problems)
    return files


def _mode(value: Any) -> TrainingMode | Spec:
    if isinstance(value, Component):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("use"), str):  # a mode with options
        named = _mode(value["use"])
        return {**value, "use": named.value if isinstance(named, TrainingMode) else named}
    if isinstance(value, str) and is_installed("mode", value.lower()) and value.upper() not in TrainingMode.__members__:
        return value.lower()
    mode: TrainingMode = structure(value, TrainingMode, "training_mode")
    return mode


def _checked_spec(value: Any, path: str) -> Spec:
    if value is None or isinstance(value, (str, Component)):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("use", ""), str):
        return dict(value)
    raise ConfigError([Problem(path, f"expected a name or a table with the key 'use', got {value!r}")])


def _checked_callbacks(value: Any) -> list[Spec]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError([Problem("callbacks", f"expected a list of names or tables, got {value!r}")])
    problems: list[Problem] = []
    result: list[Spec] = []
    for index, spec in enumerate(value):
        if not isinstance(spec, Component) and not _use(spec):
            problems.append(Problem(f"callbacks[{index}]", f"expected a name or a table with the key 'use', got {spec!r}"))
        elif (name := _use(spec)) in STANDARD_CALLBACKS and name in map(_use, result):  # others may well be, such as ema
            problems.append(Problem(f"callbacks[{index}]", f"{name!r} cannot be there twice: leave one out"))
        result.append(spec)
    if problems:
        raise ConfigError(problems)
    return result


def _override(table: dict[str, Any], text: str) -> str:
    """Apply one `key=value` to a table in place; returns the dotted key."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key or any(not part for part in key.split(".")):
        raise ConfigError([Problem(text, "expected key=value, such as optimizer.lr=6e-4")])
    try:
        value = tomli.loads(f"value = {raw}")["value"]
    except (ValueError, RecursionError):  # no TOML, or what Python will not read: thousands of digits or brackets
        value = raw
    first, *rest = key.split(".")
    if not rest:
        table[first] = value
    elif first == "callbacks":
        _override_callback(table, rest, value, key)
    else:
        known = table.get(first)
        if known is not None and not isinstance(known, (str, Mapping)):
            raise ConfigError(
                [Problem(key, f"{first} is {known!r} in the file, which has nothing below it; override {first} itself")]
            )
        nested = {"use": known} if isinstance(known, str) else dict(known or {})
        _set(nested, rest, value, key)
        table[first] = nested
    return key


def _override_callback(table: dict[str, Any], rest: list[str], value: Any, key: str) -> None:
    if len(rest) < 2:
        raise ConfigError([Problem(key, "expected callbacks.NAME.OPTION=value")])
    listed = list(table.get("callbacks") or [])
    index = next((i for i, spec in enumerate(listed) if _use(spec) == rest[0]), len(listed))
    spec = listed[index] if index < len(listed) else rest[0]
    nested = {"use": spec} if isinstance(spec, str) else dict(spec)
    _set(nested, rest[1:], value, key)
    table["callbacks"] = [*listed[:index], nested, *listed[index + 1 :]]


def _set(table: dict[str, Any], path: list[str], value: Any, key: str) -> None:
    for part in path[:-1]:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError([Problem(key, f"{part!r} is not a table")])
        table = inner
    table[path[-1]] = value


def _can_be_a_path(path: Path) -> bool:
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:  # half of a character, which JSON can hold
        return False
    return b"\0" not in encoded and len(encoded) < 3000 and all(len(part) < 256 for part in encoded.split(b"/"))


def run_name_problem(name: str) -> str | None:
    """What is wrong with a run's name as the name of a directory; None when nothing is."""
    if len(name) > 100:
        return f"is {len(name)} characters long, the limit is 100"
    if re.fullmatch(r"(con|prn|aux|nul|(com|lpt)[0-9])(\..*)?|.*\.", name, re.IGNORECASE):
        return f"{name!r} cannot name a directory on Windows, where it is a device's name or loses its last dot: choose another"
    if not re.fullmatch(r"[A-Za-z0-9][\w.+=@-]*", name, re.ASCII):
        return f"{name!r} cannot name a directory: begin with a letter or digit, then letters, digits and any of . _ - + = @"
    return None
