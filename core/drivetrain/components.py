"""What a plugin is made of: an attrs class whose fields are its options and whose hook methods the loop calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar, cast, dataclass_transform

import attrs

from drivetrain.errors import ConfigError, PluginError, Problem
from drivetrain.limits import Limits
from drivetrain.registry import find
from drivetrain.structure import structure, unknown_key, unstructure

C = TypeVar("C", bound=type)
HOOK_MARK = "drivetrain_hook"


def option(
    *,
    default: Any = attrs.NOTHING,
    factory: Callable[[], Any] | None = None,
    help: str = "",
    validator: Any = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """One option of a component: a typed attrs field with a line of help. Without `default` or `factory` it must be given.

    A number, or each of several, must be `at_least` so much, or `above` that, and `at_most` or `below`. For anything else
    `validator(component, field, value)` raises ValueError; the error that people see names the option.
    """
    chosen: dict[str, Any] = {"factory": factory} if factory is not None else {"default": default}
    limits = Limits(at_least, above, at_most, below)
    # none where nothing is to be checked: attrs calls Python for every assignment to an object that has one
    check = _naming(limits, validator) if validator or str(limits) else None
    return attrs.field(**chosen, validator=check, metadata={"help": help, "limits": limits})


def _naming(limits: Limits, validator: Any) -> Callable[[Any, Any, Any], None]:
    given = validator if validator is None or callable(validator) else attrs.validators.and_(*validator)

    def check(instance: Any, field: Any, value: Any) -> None:
        try:
            limits.check(value)
            if given is not None:
                given(instance, field, value)
        except ValueError as error:
            raise ConfigError([Problem(field.name, str(error))]) from None

    return check


def state(*, default: Any = attrs.NOTHING, factory: Callable[[], Any] | None = None) -> Any:
    """One piece of a component's own state: not an option, saved in every checkpoint and restored from it."""
    chosen: dict[str, Any] = {"factory": factory} if factory is not None else {"default": default}
    # written in steps, and no option: nothing checks what is written
    return attrs.field(init=False, repr=False, metadata={"state": True}, on_setattr=attrs.setters.NO_OP, **chosen)


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(option, state, attrs.field))
def component(cls: C) -> C:
    """Make a class a component: keyword-only typed options, compared by identity.

    Equality by value would make two callbacks with the same options one callback to pluggy.
    """
    return attrs.define(kw_only=True, eq=False, slots=False)(cls)


def fields_of(cls: type) -> tuple[attrs.Attribute[Any], ...]:
    """The attrs fields of a component class; a plain subclass of one has its parent's."""
    return tuple(attrs.fields(cast(Any, cls)))


def hook(*, tryfirst: bool = False, trylast: bool = False, not_before: str | None = None) -> Callable[[Any], Any]:
    """Mark a hook method's place among the other listeners of its event, and when it sleeps. Methods with a hook's name need no mark.

    `not_before` names an attribute of the component, a number: while `ctx.step` is less, the event does not call the method. A
    listener of steps that seldom has something to do sleeps so (`float("inf")` until further notice, 0 to be called).
    """

    def mark(method: Any) -> Any:
        setattr(method, HOOK_MARK, {"tryfirst": tryfirst, "trylast": trylast, "not_before": not_before})
        return method

    return mark


@component
class Component:
    """Base of everything a configuration can name. Subclass it (or `Callback`) and decorate the subclass with `@component`."""

    kind: ClassVar[str] = "component"
    # Whether a run that goes on with other options of this is warned of; by default told by whether it has events within steps.
    changes_training: ClassVar[bool | None] = None
    # Whether its on_gradients, on_clipped and on_optimizer_step, if it has them, can do without gradients; see
    # `CallbackContext.updates_in_backward`.
    without_gradients: ClassVar[bool] = False
    plugin_name: str = attrs.field(default="", init=False, repr=False)  # "callback:early_stopping", set when a run adopts it
    origin: str = attrs.field(default="", init=False, repr=False)  # "drivetrain-early-stopping 0.1.0", or the class's module

    def state_dict(self) -> dict[str, Any]:
        """Everything this component must remember to go on exactly: by default the fields made with `state()`."""
        return {f.name: getattr(self, f.name) for f in fields_of(type(self)) if f.metadata.get("state")}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        known = {f.name for f in fields_of(type(self)) if f.metadata.get("state")}
        if unknown := sorted(set(saved) - known):
            raise PluginError(f"{self.plugin_name or type(self).__name__}: the saved state has unknown parts {unknown}")
        for name, value in saved.items():
            setattr(self, name, value)

    def options(self) -> dict[str, Any]:
        """The options as plain data, defaults included."""
        return {f.name: unstructure(getattr(self, f.name)) for f in fields_of(type(self)) if f.init}


class Callback(Component):
    """A listener: define any `on_*` method of `drivetrain.hookspecs`; each gets the `CallbackContext`.

    `every` (an option or attribute such as `"500st"`) is the period of `on_every`.
    """

    kind: ClassVar[str] = "callback"


def make_component(kind: str, spec: Any, path: str = "") -> Component:
    """Make the component that a configuration means by `spec`: a name, a table `{use: name, option: value}` or a ready object.

    Raises:
        ConfigError: for every unknown name, unknown option or wrong value at once, each with its path below `path`.
    """
    if isinstance(spec, Component):
        return adopt(_checked(spec, path))
    table = {"use": spec} if isinstance(spec, str) else spec
    if not isinstance(table, Mapping) or not isinstance(table.get("use"), str):
        raise ConfigError([Problem(path, f"expected a name or a table with the key 'use', got {spec!r}")])
    name = table["use"]
    try:
        candidate = find(kind, name)
        cls = candidate.load()
    except PluginError as error:
        raise ConfigError([Problem(path, str(error))]) from error
    if not (isinstance(cls, type) and issubclass(cls, Component)):
        raise ConfigError([Problem(path, f"plugin {candidate} is not a component class: {cls!r}")])
    made: Component = structure_component(
        cls, {k: v for k, v in table.items() if k != "use"}, f"{path}.{name}" if path else name
    )
    return adopt(made, f"{kind}:{candidate.name}", f"{candidate.distribution} {candidate.version}")


def structure_component(cls: type[Component], options: Mapping[str, Any], path: str) -> Component:
    """Structure one component's options strictly into its class."""
    fields = {f.name: f for f in fields_of(cls) if f.init}
    # cattrs would refuse these as well; done here so that an unknown key keeps its own path among the other problems
    problems = [Problem(key, unknown_key(key, list(fields))).under(path) for key in options if key not in fields]
    try:
        made: Component = structure({k: v for k, v in options.items() if k in fields}, cls, path)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return made


def _checked(thing: Component, path: str) -> Component:
    """Hold a component made in Python to the same types as one from a file, so that `every="500st"` means the same in both."""
    attrs.resolve_types(cast(Any, type(thing)))
    problems: list[Problem] = []
    for f in fields_of(type(thing)):
        value = getattr(thing, f.name, None)
        if not f.init or f.type is Any or (isinstance(f.type, type) and isinstance(value, f.type)):
            continue
        try:
            setattr(thing, f.name, structure(value, f.type, f"{path or type(thing).__name__}.{f.name}"))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return thing


def adopt(thing: Component, name: str = "", origin: str = "") -> Component:
    """Give a component the name and origin that errors and listings use."""
    cls = type(thing)
    thing.plugin_name = name or getattr(thing, "plugin_name", "") or f"{cls.kind}:{cls.__name__}"
    thing.origin = origin or getattr(thing, "origin", "") or cls.__module__
    return thing
