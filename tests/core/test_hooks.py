"""Registration and binding: order, misspelt hooks, names in errors, two runs never meeting."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from drivetrain import Callback, PluginError, component, hook, option, state
from drivetrain.hooks import Events, RunPluginManager, bind
from drivetrain.hookspecs import EVENTS, HOOKS, EventSpecs


@component
class Says(Callback):
    name: str = option(default="a")

    def on_log(self, ctx: list[str]) -> None:
        ctx.append(self.name)


class First(Says):
    @hook(tryfirst=True)
    def on_log(self, ctx: list[str]) -> None:
        ctx.append("first")


class Last(Says):
    @hook(trylast=True)
    def on_log(self, ctx: list[str]) -> None:
        ctx.append("last")


def named(*things: Callback) -> list[Callback]:
    for thing in things:
        thing.plugin_name = f"callback:{type(thing).__name__}"
    return list(things)


def test_listeners_run_in_the_order_given_with_tryfirst_and_trylast_around() -> None:
    heard: list[str] = []
    pm = RunPluginManager(named(Last(), Says(name="b"), Says(name="a"), First()))
    event = Events(pm).log
    assert event is not None
    event(heard)
    assert heard == ["first", "b", "a", "last"]
    assert [thing.plugin_name for _, thing in pm.listeners("on_log")] == [
        "callback:First",
        "callback:Says#2",
        "callback:Says",
        "callback:Last",
    ]


class Sleeper(Callback):
    until: float = 3

    @hook(not_before="until")
    def on_step_end(self, ctx: Any) -> None:
        ctx.heard.append(f"sleeper {ctx.step}")


class Counter(Callback):
    def on_step_end(self, ctx: Any) -> None:
        ctx.heard.append(f"counter {ctx.step}")


def test_a_listener_sleeps_until_the_step_that_it_names() -> None:
    sleeper, ctx = Sleeper(), SimpleNamespace(heard=[], step=0)
    pm = RunPluginManager(named(sleeper, Counter()))
    wrapped: list[Any] = []

    def wrap(call: Any, event: str, thing: Any) -> Any:
        return lambda ctx: (wrapped.append(type(thing)), call(ctx))

    pm.wraps = [wrap]
    event = Events(pm).step_end
    assert event is not None
    for ctx.step in range(2, 6):
        event(ctx)
        if ctx.step == 4:
            sleeper.until = float("inf")
    assert ctx.heard == ["counter 2", "sleeper 3", "counter 3", "sleeper 4", "counter 4", "counter 5"]
    assert wrapped.count(Sleeper) == 2  # whoever times listeners does not meet one that sleeps


def test_errors_of_a_listener_that_woke_name_the_plugin() -> None:
    class Bad(Callback):
        until: float = 0

        @hook(not_before="until")
        def on_step_end(self, ctx: Any) -> None:
            raise KeyError("x")

    event = Events(RunPluginManager(named(Bad()))).step_end
    assert event is not None
    with pytest.raises(KeyError) as caught:
        event(SimpleNamespace(step=0))
    assert "on_step_end of callback:Bad" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("event", "attribute", "said"),
    [
        ("on_step_end", "untill", "no attribute 'untill' .not_before.. Did you mean 'until'"),
        ("on_run_end", "until", "on_run_end cannot sleep, it is always called"),
        ("make_loss", "until", "make_loss cannot sleep, it is always called"),
    ],
)
def test_what_cannot_sleep_is_an_error(event: str, attribute: str, said: str) -> None:
    def method(self: Any, ctx: Any) -> None:
        pass

    bad = type("Bad", (Callback,), {event: hook(not_before=attribute)(method)})()
    bad.until = 0
    with pytest.raises(PluginError, match=f"callback:Bad.*{said}"):
        RunPluginManager(named(bad))


def test_two_runs_never_meet() -> None:
    one, two = RunPluginManager(named(Says())), RunPluginManager()
    assert Events(one).log is not None
    assert Events(two).log is None


def test_equal_components_are_two_components() -> None:
    assert len(RunPluginManager(named(Says(), Says())).get_plugins()) == 2


@pytest.mark.parametrize(
    ("method", "nearest"), [("on_step_ends", "on_step_end"), ("on_lgo", "on_log"), ("make_optimiser", "make_optimizer")]
)
def test_misspelt_hooks_are_errors(method: str, nearest: str) -> None:
    bad = type("Bad", (Callback,), {method: lambda self, ctx: None})()
    with pytest.raises(PluginError, match=f"'{method}', which is no hook. Did you mean '{nearest}'"):
        RunPluginManager(named(bad))


@pytest.mark.parametrize(
    "function", [lambda self: None, lambda self, ctx, more: None, lambda self, context: None, lambda self, ctx, x=1: None]
)
def test_hooks_take_exactly_ctx(function: Any) -> None:
    bad = type("Bad", (Callback,), {"on_log": function})()
    with pytest.raises(PluginError, match="callback:Bad"):
        RunPluginManager(named(bad))


def test_choose_one_refuses_two() -> None:
    class A(Callback):
        def make_loss(self, ctx: Any) -> Any:
            return len

    class B(A):
        pass

    assert RunPluginManager(named(A())).choose("make_loss", None) is len
    assert RunPluginManager().choose("make_loss", None) is None
    with pytest.raises(PluginError, match=r"make_loss: 2 components.*callback:"):
        RunPluginManager(named(A(), B())).choose("make_loss", None)


def test_errors_in_makers_name_the_plugin() -> None:
    class Bad(Callback):
        def make_loss(self, ctx: Any) -> Any:
            raise KeyError("x")

    with pytest.raises(KeyError) as caught:
        RunPluginManager(named(Bad())).choose("make_loss", None)
    assert "make_loss of callback:Bad" in caught.value.__notes__[0]


def test_teardown_runs_everybody() -> None:
    heard: list[str] = []

    class Bad(Callback):
        def on_run_end(self, ctx: Any) -> None:
            heard.append("x")
            raise ValueError("x")

    event = bind(RunPluginManager(named(Bad(), Bad())), "on_run_end")
    assert event is not None
    with pytest.raises(ExceptionGroup) as caught:
        event(None)
    assert len(caught.value.exceptions) == len(heard) == 2


@pytest.mark.parametrize("also", ["", "an error"])
def test_teardown_runs_everybody_though_one_is_interrupted(also: str) -> None:
    heard: list[str] = []

    class Slow(Callback):
        def on_run_end(self, ctx: Any) -> None:
            raise KeyboardInterrupt

    class Tidy(Callback):
        def on_run_end(self, ctx: Any) -> None:
            heard.append("tidy")
            if also:
                raise ValueError(also)

    event = bind(RunPluginManager(named(Slow(), Tidy())), "on_run_end")
    assert event is not None
    with pytest.raises(KeyboardInterrupt) as caught:
        event(None)
    assert heard == ["tidy"] and str(caught.value.__cause__ or "") == also


def test_specifications_are_documented_and_take_ctx() -> None:
    import inspect

    for name in EVENTS:
        spec = getattr(EventSpecs, name)
        assert list(inspect.signature(spec).parameters) == ["self", "ctx"]
        assert spec.__doc__
    assert len(set(HOOKS)) == len(HOOKS)


def test_state_fields_are_kept_and_unknown_ones_refused() -> None:
    @component
    class Counts(Callback):
        limit: int = option(default=3)
        hits: int = state(default=0)

    thing = Counts()
    thing.hits = 4
    assert thing.state_dict() == {"hits": 4}
    assert thing.options() == {"limit": 3}
    other = Counts()
    other.load_state_dict({"hits": 4})
    assert other.hits == 4
    with pytest.raises(PluginError, match="unknown parts"):
        other.load_state_dict({"hit": 4})
    with pytest.raises(TypeError):
        Counts(hits=3)  # type: ignore[call-arg]
