"""The callback that hands the values of a run to its trackers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import Callback, ConfigError, Problem, Tracker, component, hook, make_component, option, registry
from drivetrain.tracking import printable
from drivetrain_logging.jsonl import JsonlTracker

if TYPE_CHECKING:
    from drivetrain import CallbackContext

_said = logging.getLogger("drivetrain.logging")


@component
class LoggingCallback(Callback):
    """Write the values of the log and of evaluations to trackers: files, boards, servers.

    `jsonl` is always among them (unless the list is empty): reports are made from it. When a run goes back to an earlier state, the
    trackers are told to take back what they have beyond it; W&B and MLflow, which cannot, leave out what is repeated.

    A tracker that cannot be started ends the run before it trains. One that fails later (a full disk, a server that is gone)
    does not: its first failure is said as a warning, it is tried again with the next values, and training goes on.
    """

    trackers: list[Any] | None = option(
        default=None,
        help="names or tables {use: name, option: value}, beside jsonl; by default tensorboard when it is installed",
    )

    _active: list[Tracker] = attrs.field(factory=list, init=False, repr=False)
    _failed: set[str] = attrs.field(factory=set, init=False, repr=False)
    _restored: dict[str, Any] = attrs.field(factory=dict, init=False, repr=False)
    _ctx: Any = attrs.field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.trackers is not None:  # found out now, with the rest of the configuration, and not when the run starts
            _make(self.trackers)

    # -- state -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What each tracker must remember, such as the id of its run at a server."""
        remembered = {t.plugin_name: t.state_dict() for t in self._active} or self._restored
        return {"trackers": remembered, "step": 0 if self._ctx is None else self._ctx.step}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Keep it for the trackers, which are made when the run starts. One that is no longer wanted is passed over.

        In the middle of a run it is the run that goes back: the trackers are told, and remember what they do.
        """
        if self._active:
            self._each("go back", self._ctx, lambda tracker: tracker.rewind(saved["step"]))
        else:
            self._restored = dict(saved["trackers"])

    # -- events ----------------------------------------------------------------------------------------------------------

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Start the trackers and give them the configuration."""
        self._ctx, self._active, self._failed = ctx, [], set()
        if not ctx.is_main:
            return
        for tracker in _with_jsonl(_make(_default_trackers() if self.trackers is None else self.trackers)):
            if remembered := self._restored.get(tracker.plugin_name):
                tracker.load_state_dict(remembered)
            tracker.start(ctx)
            self._active.append(tracker)
        config = {key: value for key, value in ctx.config.to_dict(secrets=False).items() if value is not None}
        self._each("record the configuration", ctx, lambda tracker: tracker.config(config, ctx.step))

    @hook(trylast=True)
    def on_log(self, ctx: CallbackContext) -> None:
        """Hand over the values of the log, after the other callbacks had their chance to add some."""
        self._each("log", ctx, lambda tracker: tracker.log(dict(ctx.metrics), ctx.step))
        for kind, name, value in ctx.shown:
            self._each(f"record the {kind} {printable(name)!r}", ctx, partial(_show, kind, name, value, ctx.step))

    @hook(trylast=True)
    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        """Hand over the values of the evaluation."""
        self._each("log", ctx, lambda tracker: tracker.log(dict(ctx.eval_metrics), ctx.step))

    @hook(trylast=True)
    def on_run_end(self, ctx: CallbackContext) -> None:
        """Close the trackers."""
        self._each("close", ctx, lambda tracker: tracker.close())
        self._restored = {t.plugin_name: t.state_dict() for t in self._active}
        self._active = []

    def _each(self, action: str, ctx: CallbackContext, call: Callable[[Tracker], None]) -> None:
        for tracker in self._active:
            try:
                call(tracker)
            except Exception as error:
                self._say(tracker, action, ctx.step, error)

    def _say(self, tracker: Tracker, action: str, step: int, error: Exception) -> None:
        """The first failure of each tracker, in one line; what is tried again would otherwise be said a thousand times."""
        if tracker.plugin_name in self._failed:
            return
        self._failed.add(tracker.plugin_name)
        _said.warning(
            "%s (%s) failed to %s at step %d: %s: %s. Training goes on. It is tried again; further failures are not told.",
            *(tracker.plugin_name, tracker.origin, action, step, type(error).__name__, printable(str(error))),
        )


def _show(kind: str, name: str, value: Any, step: int, tracker: Tracker) -> None:
    getattr(tracker, kind)(name, value, step)


def _with_jsonl(trackers: list[Tracker]) -> list[Tracker]:
    """Reports read `metrics.jsonl`, so it is always written."""
    if not trackers or any(isinstance(tracker, JsonlTracker) for tracker in trackers):
        return trackers
    return [*_make(["jsonl"]), *trackers]


def _default_trackers() -> list[str]:
    return ["jsonl", *(["tensorboard"] if registry.is_installed("tracker", "tensorboard") else [])]


def _make(specs: list[Any]) -> list[Tracker]:
    """Make the trackers, reporting what is wrong with all of them at once.

    Raises:
        ConfigError: for every unknown name, unknown option, wrong value and tracker that is there twice, with its place in the list.
    """
    made: list[Any] = []
    problems: list[Problem] = []
    tables = [{"use": spec} if isinstance(spec, str) else spec for spec in specs]
    for index, spec in enumerate(specs):
        if tables[index] in tables[:index]:  # each value would be written twice
            name = tables[index].get("use") if isinstance(tables[index], Mapping) else type(spec).__name__
            problems.append(Problem(f"trackers[{index}]", f"{name!r} is there twice, with the same options: leave one out"))
            continue
        try:
            made.append(make_component("tracker", spec, f"trackers[{index}]"))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return made
