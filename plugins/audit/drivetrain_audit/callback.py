"""The callback: listens from the first hook of each step to its last, and tells at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import Callback, Component, DrivetrainError, component, hook, option
from drivetrain_audit import watch
from drivetrain_audit.findings import Finding, Findings, table
from drivetrain_audit.place import place_of

if TYPE_CHECKING:
    from drivetrain import CallbackContext

Listener = Callable[[Any], None]
_OF_A_STEP = (
    "on_step_start",
    "on_batch",
    "on_forward",
    "on_loss",
    "on_backward",
    "on_gradients",
    "on_clipped",
    "on_optimizer_step",
    "on_step_end",
)
_COLLECTIVES = ("sum", "gather", "barrier")
_OF_THE_TRAINING = ("model", "drivetrain")  # whose collectives are the training itself


@component
class AuditCallback(Callback):
    """Name each plugin and line that made an ordinary step wait for the device, write a file or call a collective.

    An ordinary step is one that does not log, evaluate or save; the first one of a sitting, which sets much up, is left out. Hooks of
    the step are looked at, the model, the loss, the optimizer, the precision and the strategy; not the data, and not `on_log`,
    `on_evaluate_*` and `on_every`, which are the places for such things. A table is printed at the end.

    On CUDA the waits are those that torch's sync debug mode knows, and explicit ones. On a CPU nothing waits, so every reading of a
    tensor's values by Python counts, and every operation that needs them (a boolean index, `nonzero`): on a GPU it would wait. Collectives
    are those of torch.distributed and the strategy's own, with one process too. The strategy's and the model's own ones are the
    training, and no finding. Code in C that writes to an open file is not seen.

    For a run that is to be examined: each step gets slower. Without it nothing is changed and nothing costs.
    """

    fail: bool = option(default=False, help="end the run with an error when there are findings")
    show: bool = option(default=True, help="print the table when the run ends")

    _ctx: Any = attrs.field(default=None, init=False, repr=False)
    _parts: dict[int, str] = attrs.field(factory=dict, init=False, repr=False)
    _findings: Findings = attrs.field(factory=Findings, init=False, repr=False)
    _in_step: Any = attrs.field(default=None, init=False, repr=False)  # an ExitStack from a step's begin to its end
    _begun: int = attrs.field(default=-1, init=False, repr=False)  # the first step of the sitting

    @property
    def findings(self) -> list[Finding]:
        """What was found so far."""
        return self._findings.found()

    def make_listener_wrapper(self, ctx: CallbackContext) -> Callable[[Listener, str, Component], Listener]:
        """Know whose hook runs."""
        self._ctx = ctx
        return self._watched

    def _watched(self, call: Listener, event: str, thing: Component) -> Listener:
        if thing is self or event not in _OF_A_STEP:
            return call
        audit_ctx = self._ctx

        def watched(ctx: Any) -> None:
            _ = audit_ctx, thing, event  # for `place_of`, which reads them from here
            with watch.file_calls():
                call(ctx)

        return watched

    # -- events ----------------------------------------------------------------------------------------------------------

    @hook(tryfirst=True)
    def on_run_start(self, ctx: CallbackContext) -> None:
        """Begin to listen."""
        kinds = {"optimizer": ctx.optimizer, "precision": ctx.precision, "strategy": ctx.strategy}
        named = {name.partition(":")[0]: name for name in ctx.trainer.plugins()}
        self._parts = {id(part): named.get(kind, kind) for kind, part in kinds.items()}
        self._findings, self._begun = Findings(), ctx.step + 1
        watch.listen(self._tell)
        for name in _COLLECTIVES:
            setattr(ctx.strategy, name, _told(getattr(ctx.strategy, name), name))

    @hook(tryfirst=True)
    def on_step_start(self, ctx: CallbackContext) -> None:
        """Look at this step's operations, in this thread."""
        if ctx.step + 1 > self._begun:
            self._findings.begin(ctx.step + 1)
        if self._in_step is None:  # still open after a step that was skipped
            self._in_step = ExitStack()
            self._in_step.enter_context(watch.Operations(reads=ctx.device.type != "cuda"))
            self._in_step.enter_context(watch.cuda_sync_warnings(ctx.device))

    @hook(trylast=True)
    def on_step_end(self, ctx: CallbackContext) -> None:
        """No longer: the caller may have the next word."""
        self._look_away()

    @hook(tryfirst=True)
    def on_log(self, ctx: CallbackContext) -> None:
        """This was no ordinary step."""
        self._findings.busy(ctx.step)

    @hook(tryfirst=True)
    def on_evaluate_start(self, ctx: CallbackContext) -> None:
        """This was no ordinary step."""
        self._look_away()
        self._findings.busy(ctx.step)

    @hook(tryfirst=True)
    def on_checkpoint_saved(self, ctx: CallbackContext) -> None:
        """This was no ordinary step."""
        self._findings.busy(ctx.step)

    @hook(tryfirst=True)
    def on_exception(self, ctx: CallbackContext) -> None:
        """Leave what a step that failed has left open."""
        self._look_away()

    @hook(trylast=True)
    def on_run_end(self, ctx: CallbackContext) -> None:
        """Stop listening and tell.

        Raises:
            DrivetrainError: with `fail`, when there are findings.
        """
        self._look_away()
        watch.leave(self._tell)
        for name in _COLLECTIVES:
            vars(ctx.strategy).pop(name, None)
        self._findings.settle()
        found = self.findings
        if self.show and ctx.is_main:
            print("\n".join(table(found, self._findings.ordinary)), file=sys.stderr)
        if self.fail and found and ctx.exception is None:
            listed = "".join(f"\n  {finding}" for finding in found)
            raise DrivetrainError(f"the audit has {len(found)} finding{'s' * (len(found) > 1)}:{listed}")

    def _look_away(self) -> None:
        in_step, self._in_step = self._in_step, None
        if in_step is not None:
            in_step.close()

    def _tell(self, kind: str, what: str, tensor: Any) -> None:
        """Count what was seen, if it is this run's."""
        ctx = self._ctx
        if tensor is not None and ctx.device.type != "cpu" and tensor.device.type == "cpu":
            return  # it is on the host already
        place = place_of(sys._getframe(1), ctx, self._parts, _HOOKS)
        if place is None or (kind == watch.COLLECTIVE and place.event is None and self._is_training(place.plugin)):
            return
        self._findings.add(ctx.step + (place.event != "on_step_end"), place, kind, what)

    def _is_training(self, plugin: str) -> bool:
        return plugin in _OF_THE_TRAINING or plugin in self._parts.values()


def _told(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    def told(*args: Any, **kwargs: Any) -> Any:
        watch.said(watch.COLLECTIVE, f"strategy.{name}()")
        with watch.once():
            return method(*args, **kwargs)

    return told


_HOOKS = next(c for c in AuditCallback._watched.__code__.co_consts if getattr(c, "co_name", "") == "watched")
