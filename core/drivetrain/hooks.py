"""From a run's components to what the loop calls: registration through pluggy, then binding.

Registration checks names and signatures and settles the order. Binding resolves each event once into `None` (nobody listens)
or one function, so that the loop never dispatches: a pluggy call costs 0.7 µs with no listener, a bound one nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pluggy

from drivetrain.components import HOOK_MARK, Component
from drivetrain.errors import PluginError, suggest
from drivetrain.hookspecs import EVENTS, HOOKS, PROJECT, SPECS

Event = Callable[[Any], None]
_RUN_ALL = ("on_run_end", "on_exception")


class RunPluginManager(pluggy.PluginManager):
    """The hooks of one run: it holds that run's components and nothing else, so two runs never meet."""

    def __init__(self, components: Iterable[Component] = ()) -> None:
        super().__init__(PROJECT)
        for specs in SPECS:
            self.add_hookspecs(specs)
        self.components = tuple(components)
        self.wraps: list[Callable[[Event, str, Component], Event]] = []  # what components put around each listener
        for thing in reversed(
            self.components
        ):  # pluggy calls the last registered first; ours is the order of the configuration
            self._add(thing)

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        """A method is a hook when it has a hook's name; `@hook(...)` adds an order."""
        if name not in HOOKS:
            return None
        method = getattr(plugin, name)
        given = {"wrapper": False, "hookwrapper": False, "optionalhook": False, "specname": None}
        return given | {"tryfirst": False, "trylast": False} | {k: v for k, v in _marks(method).items() if k != "not_before"}

    def _add(self, thing: Component) -> None:
        _check_names(thing)
        if self.is_registered(thing):
            raise PluginError(
                f"{thing.plugin_name} ({thing.origin}) is given twice, the same object: leave one out, or make two."
            )
        try:
            self.register(thing, name=self._free_name(thing))
        except (ValueError, pluggy.PluginValidationError) as error:
            raise PluginError(f"{thing.plugin_name} ({thing.origin}) cannot be registered: {error}") from error

    def _free_name(self, thing: Component) -> str:
        """Two callbacks of one class may take part; the second is called `callback:x#2`."""
        name, count = thing.plugin_name, 1
        while self.has_plugin(name):
            count += 1
            name = f"{thing.plugin_name}#{count}"
        thing.plugin_name = name
        return name

    def choose(self, maker: str, ctx: Any) -> Any:
        """Ask for one `make_*` object; None when no component makes it.

        Raises:
            PluginError: when two components want to make it.
        """
        makers = getattr(self.hook, maker).get_hookimpls()
        if len(makers) > 1:
            names = ", ".join(impl.plugin_name for impl in makers)
            raise PluginError(f"{maker}: {len(makers)} components want to provide it ({names}); keep one of them.")
        return self.call_one(makers[0], maker, ctx) if makers else None

    @staticmethod
    def call_one(impl: Any, name: str, ctx: Any) -> Any:
        """Call one implementation, with the plugin's name noted on whatever it raises."""
        try:
            return impl.function(ctx)
        except Exception as error:
            error.add_note(note_of(name, impl.plugin))
            raise

    def listeners(self, event: str) -> list[tuple[Event, Component]]:
        """Who listens to an event, in the order of the calls."""
        found = [(impl.function, impl.plugin) for impl in reversed(getattr(self.hook, event).get_hookimpls())]
        for wrap in self.wraps:
            found = [(wrap(call, event, thing), thing) for call, thing in found]
        return found

    def wrap_listeners(self, ctx: Any) -> None:
        """Let the components that time or trace others put their wrappers around, the first of the configuration outermost."""
        makers = self.hook.make_listener_wrapper.get_hookimpls()
        self.wraps = [self.call_one(impl, "make_listener_wrapper", ctx) for impl in makers]


def bind(pm: RunPluginManager, event: str, only: Component | None = None) -> Event | None:
    """Resolve one event (of one component, if `only` is given) into a function, or None when nobody listens."""
    found = [(call, thing) for call, thing in pm.listeners(event) if only is None or thing is only]
    if not found:
        return None
    if event in _RUN_ALL:
        return _run_all(tuple((call, note_of(event, thing)) for call, thing in found), event)
    return _run_in_order(
        tuple((call, note_of(event, thing), thing, _marks(getattr(thing, event)).get("not_before")) for call, thing in found)
    )


def _run_in_order(calls: tuple[tuple[Event, str, Component, str | None], ...]) -> Event:
    """One after the other, without those that sleep: see `hook`."""

    def dispatch(ctx: Any) -> None:
        for call, note, thing, not_before in calls:
            if not_before is not None and ctx.step < getattr(thing, not_before):
                continue
            try:
                call(ctx)
            except Exception as error:
                error.add_note(note)
                raise

    return dispatch


def _run_all(calls: tuple[tuple[Event, str], ...], event: str) -> Event:
    """Teardown: every listener gets its turn, whoever is interrupted by Ctrl-C, then what they raised is raised together."""

    def dispatch(ctx: Any) -> None:
        errors: list[Exception] = []
        interrupt: BaseException | None = None
        for call, note in calls:
            try:
                call(ctx)
            except Exception as error:
                error.add_note(note)
                errors.append(error)
            except BaseException as error:
                interrupt = error
        several = ExceptionGroup(f"{len(errors)} plugins failed in {event}", errors) if len(errors) > 1 else None
        failed = several or (errors[0] if errors else None)
        if interrupt is not None:
            raise interrupt from failed
        if failed is not None:
            raise failed

    return dispatch


class Events:
    """The bound events of one run: one attribute each, without the `on_` (`events.step_end`), None when nobody listens."""

    __slots__ = tuple(event.removeprefix("on_") for event in EVENTS)

    def __init__(self, pm: RunPluginManager) -> None:
        for event in EVENTS:
            setattr(self, event.removeprefix("on_"), bind(pm, event))

    def __getattr__(self, name: str) -> Event | None:  # for type checkers: slots are filled in __init__
        raise AttributeError(f"no event named {name!r}")


def _marks(method: Any) -> dict[str, Any]:
    """What `hook` said of a method."""
    return getattr(method, HOOK_MARK, {})


def note_of(event: str, thing: Component) -> str:
    """What is added to an error that a component's method raised."""
    return f"raised in {event} of {thing.plugin_name} ({thing.origin})"


def _check_names(thing: Component) -> None:
    """Refuse a method that looks like a hook and is none, and a hook that does not take exactly one argument or cannot sleep."""
    for name in dir(type(thing)):
        if not name.startswith(("on_", "make_")):
            continue
        if name not in HOOKS:
            raise PluginError(
                f"{thing.plugin_name} ({thing.origin}) has a method {name!r}, which is no hook.{suggest(name, HOOKS)} "
                "Rename it, or begin its name with an underscore."
            )
        found = list(inspect.signature(getattr(thing, name)).parameters)
        if len(found) != 1:
            raise PluginError(
                f"{thing.plugin_name} ({thing.origin}): {name} must take one argument, ctx, but takes ({', '.join(found)})."
            )
        if why := _keeps_awake(thing, name):
            raise PluginError(f"{thing.plugin_name} ({thing.origin}): {name} cannot sleep, {why}")


def _keeps_awake(thing: Component, name: str) -> str:
    """What is wrong with a hook's `not_before`; empty when nothing is."""
    attribute = _marks(getattr(thing, name)).get("not_before")
    if attribute is None:
        return ""
    if name not in EVENTS or name in _RUN_ALL:
        return "it is always called; take not_before away."
    if not hasattr(thing, attribute):
        return f"for it has no attribute {attribute!r} (not_before).{suggest(attribute, vars(thing))}"
    return ""
