"""The callback: what is done about an anomaly, and when."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from torch import Tensor, nn

from drivetrain import Callback, ModelError, component, hook, option, state
from drivetrain_anomaly.detect import LARGE_GRADIENT, LARGE_LOSS, NONFINITE_GRADIENT, NONFINITE_LOSS, Detector, norms_of, worst
from drivetrain_anomaly.record import Anomaly, append, samples_of

if TYPE_CHECKING:
    from drivetrain import CallbackContext

Policy = Literal["raise", "skip", "rollback", "ignore"]
_said = logging.getLogger("drivetrain.anomaly")
_MOST_UNREAD = 1024
_KINDS = {LARGE_GRADIENT: "spike", LARGE_LOSS: "spike", NONFINITE_GRADIENT: "nonfinite", NONFINITE_LOSS: "nonfinite"}

# A step that no logging step has read yet: its number, epoch and window, the names of its gradients (None: all), and on the
# device the judgement, the loss, the gradient norm and the index of the gradient to blame
Unread = tuple[int, int, int, list[str] | None, Tensor]


def _more_than(least: float) -> Any:
    def check(instance: Any, attribute: Any, value: float | None) -> None:
        if value is not None and not value > least:
            raise ValueError(f"must be more than {least:g}, got {value}")

    return check


def _decay(instance: Any, attribute: Any, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"must be at least 0 and below 1, got {value}")


@component
class AnomalyCallback(Callback):
    """Find NaN, infinity and spikes in loss and gradients, keep them out of the weights, and say what they were.

    Every step is judged on the device. Unless the policy is `ignore`, the update of a bad step changes neither weights nor
    optimizer, at once; what happens then waits for the next logging step, at which all ranks read the same:

    - `raise` ends the run with an error that names the step and the tensor.
    - `skip` goes on; the step counts, and its loss stays in the log.
    - `rollback` puts the whole run back to a snapshot in host memory, made at a logging step before, and trains from there without
      the bad window: exactly as a run that never saw it.
    - `ignore` only tells.

    A spike is a gradient norm, or a loss, above a factor times its exponential mean over the good steps. With a loss scale (fp16)
    gradients that overflow are the scale's business; a loss that is not finite is an anomaly. A state that is saved between a bad window
    and the next logging step holds the snapshot as well, so a run that goes on from it ends with the same bits; with sharded weights it
    does not, and that window stays skipped.

    Each anomaly is a line of RUN_DIR/events.jsonl with step, loss, gradient norm, tensor and sample indices, and a warning. Cost: one more
    reading of the gradients by the device. A fused optimizer leaves a bad update out on the device; before any other, the host
    reads one value a step, as with fp16. `loss_factor` with several processes costs an all-reduce of one number a step.
    """

    nonfinite: Policy = option(default="raise", help="what to do about NaN and infinity: raise, skip, rollback or ignore")
    spike: Policy = option(default="ignore", help="what to do about spikes")
    norm_factor: float | None = option(
        default=10.0, validator=_more_than(1), help="a gradient norm above this many means is a spike; null for none"
    )
    loss_factor: float | None = option(
        default=None, validator=_more_than(1), help="a loss above this many means is a spike; null for none"
    )
    warmup: int = option(default=50, validator=_more_than(0), help="good steps before anything is called a spike")
    decay: float = option(default=0.98, validator=_decay, help="of the exponential means")
    snapshot_every: int = option(default=100, validator=_more_than(0), help="steps between two snapshots for rollback")
    max_rollbacks: int = option(default=10, validator=_more_than(0), help="so many in a run; one more ends it")

    left_out: list[tuple[int, int]] = state(factory=list)  # (epoch, window), for good

    _detector: Any = attrs.field(default=None, init=False, repr=False)
    _unread: list[Unread] = attrs.field(factory=list, init=False, repr=False)
    _restored: Any = attrs.field(default=None, init=False, repr=False)
    _snapshot: Any = attrs.field(default=None, init=False, repr=False)
    _snapshot_is_due: bool = attrs.field(default=False, init=False, repr=False)
    _snapshot_step: int = attrs.field(default=0, init=False, repr=False)
    _parameters: list[nn.Parameter] = attrs.field(factory=list, init=False, repr=False)
    _names: list[str] = attrs.field(factory=list, init=False, repr=False)
    _sharded: bool = attrs.field(default=False, init=False, repr=False)
    _scaled: bool = attrs.field(default=False, init=False, repr=False)
    _shares_loss: bool = attrs.field(default=False, init=False, repr=False)

    # -- state -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The means, and the judgements that no logging step has read yet."""
        if self._restored is not None:
            return dict(self._restored)
        means = None if self._detector is None else {"means": self._detector.means, "seen": self._detector.seen}
        state: dict[str, Any] = {"left_out": [list(place) for place in self.left_out], "means": means}
        state["unread"] = [[*row] for row in self._unread]
        if self._owes_a_rollback():
            state["snapshot"] = {"step": self._snapshot_step, "state": self._snapshot}
        return state

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Keep it until the device is known, or take it over at once."""
        self._restored = saved
        if self._detector is not None:
            self._take_over()

    def _take_over(self) -> None:
        saved, self._restored = self._restored, None
        self.left_out = [(epoch, window) for epoch, window in saved["left_out"]]
        device = self._detector.seen.device
        self._unread = [(*place, row.to(device)) for *place, row in saved["unread"]]
        if saved["means"] is not None:
            self._detector.means = saved["means"]["means"].to(device, copy=True)
            self._detector.seen = saved["means"]["seen"].to(device, copy=True)
        if kept := saved.get("snapshot"):
            self._snapshot, self._snapshot_step = kept["state"], kept["step"]

    def _owes_a_rollback(self) -> bool:
        """Whether an unread step is to be undone at the next log, over an interruption too. Waits for the device.

        Not with sharded weights: each process has its own part of the snapshot, and only rank 0's state is saved.
        """
        if self._snapshot is None or not self._unread or self._sharded:
            return False
        verdicts = torch.stack([row[0] for *_, row in self._unread]).tolist()
        return any(verdict and self._policy_of(_KINDS[int(verdict)]) == "rollback" for verdict in verdicts)

    # -- events ----------------------------------------------------------------------------------------------------------

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Settle what each step needs."""
        names = {id(p): name for name, p in ctx.model.named_parameters()}
        self._parameters = [p for group in ctx.optimizer.param_groups for p in group["params"]]
        self._names = [names.get(id(p), "?").removeprefix("module.").replace("_orig_mod.", "") for p in self._parameters]
        self._scaled = ctx.precision.scales and ctx.precision.dtype == torch.float16
        self._shares_loss = ctx.strategy.world_size > 1 and (self.loss_factor is not None or self._scaled)
        self._sharded = any(hasattr(p, "to_local") for p in self._parameters)
        if self._detector is None:
            self._detector = Detector.on(ctx.device, self.loss_factor, self.norm_factor, self.warmup, self.decay)
        if self._restored is not None:
            self._take_over()
        ctx.left_out |= set(self.left_out)
        self._snapshot_is_due = self._rolls_back and not self._owes_a_rollback()

    @hook(tryfirst=True)
    def on_step_start(self, ctx: CallbackContext) -> None:
        """Make a snapshot when one is due: the first when the data is open, the others when a log has found nothing."""
        if self._snapshot_is_due:
            self._snapshot_is_due = False
            self._snapshot, self._snapshot_step = _copied(ctx.state_dict(own=True)), ctx.step

    @hook(tryfirst=True)
    def on_gradients(self, ctx: CallbackContext) -> None:
        """Judge the step, and veto its update, without a word to the host."""
        assert ctx.loss_tensor is not None
        grads = [p.grad for p in self._parameters if p.grad is not None]
        names = None if len(grads) == len(self._parameters) else self._names_with_gradient()
        norms, loss, ranks = norms_of(grads), ctx.loss_tensor.detach().float(), ctx.strategy.world_size
        norm = torch.linalg.vector_norm(norms)
        shown = loss
        if self._shares_loss:
            loss = shown = ctx.strategy.sum(loss) / ranks
        elif ranks > 1:  # one rank's share must not decide; a NaN in it is in the gradients of all
            loss = torch.zeros_like(loss)
        verdict = self._detector.judge(loss, norm, self._scaled)
        row = torch.stack((verdict, shown, norm, worst(norms).float()))
        self._unread.append((ctx.step + 1, ctx.epoch, ctx.step_in_epoch, names, row))
        if self.nonfinite != "ignore" or self.spike != "ignore":
            ctx.veto = self._vetoed(verdict)
        if len(self._unread) > _MOST_UNREAD:  # logging is rare in this run
            self._unread = self._worth_keeping()

    @hook(tryfirst=True)
    def on_log(self, ctx: CallbackContext) -> None:
        """Hear what was found since the last log, and act on it."""
        found = self._read(ctx, together=True)
        for kind in ("spike", "nonfinite"):
            if count := sum(anomaly.kind == kind for anomaly in found):
                ctx.metrics[f"anomaly/{kind}"] = float(count)
        back = [a for a in found if self._policy(a) == "rollback" and a.step > self._snapshot_step]
        for anomaly in found:
            self._tell(ctx, anomaly, back)
        if fatal := next((a for a in found if self._policy(a) == "raise"), None):
            raise ModelError(f"{fatal}. Its update was left out; {_samples(fatal)}.")
        if back:
            self._go_back(ctx, back)
        elif self._rolls_back and ctx.step >= self._snapshot_step + self.snapshot_every:
            self._snapshot_is_due = True

    @hook(tryfirst=True)
    def on_preempt(self, ctx: CallbackContext) -> None:
        """Tell of what no logging step has read, before the state is saved. What is to be undone is when the run goes on."""
        if self._owes_a_rollback():
            _said.warning("a bad step since the last log: when the run goes on, it goes back to step %d.", self._snapshot_step)
        else:
            self._tell_all(ctx)

    def on_run_end(self, ctx: CallbackContext) -> None:
        """The same when the run failed."""
        if ctx.exception is not None or not self._owes_a_rollback():
            self._tell_all(ctx)
            self._snapshot = None

    def _tell_all(self, ctx: CallbackContext) -> None:
        for anomaly in self._read(ctx, together=False):  # other ranks may be gone
            self._tell(ctx, anomaly, [])

    # -- finding ---------------------------------------------------------------------------------------------------------

    @property
    def _rolls_back(self) -> bool:
        return "rollback" in (self.nonfinite, self.spike)

    def _policy(self, anomaly: Anomaly) -> Policy:
        return self._policy_of(anomaly.kind)

    def _policy_of(self, kind: str) -> Policy:
        return self.spike if kind == "spike" else self.nonfinite

    def _vetoed(self, verdict: Tensor) -> Tensor:
        if "ignore" not in (self.nonfinite, self.spike):
            return verdict
        is_nonfinite = verdict >= NONFINITE_GRADIENT
        return ((verdict > 0) & (~is_nonfinite if self.nonfinite == "ignore" else is_nonfinite)).float()

    def _names_with_gradient(self) -> list[str]:
        return [name for name, p in zip(self._names, self._parameters, strict=True) if p.grad is not None]

    def _worth_keeping(self) -> list[Unread]:
        """The rows that tell of something; waits for the device, once in a thousand steps without a log."""
        flags = torch.stack([row[0] for *_, row in self._unread]).tolist()
        return [unread for unread, flag in zip(self._unread, flags, strict=True) if flag]

    def _read(self, ctx: CallbackContext, together: bool) -> list[Anomaly]:
        """What was found since the last reading, in one transfer; all ranks together have the loss of all."""
        unread, self._unread = self._unread, []
        rows = torch.stack([row for *_, row in unread]).tolist() if unread else []
        bad = [(place, values) for place, values in zip(unread, rows, strict=True) if values[0]]
        if bad and together and ctx.strategy.world_size > 1 and not self._shares_loss:
            losses = ctx.strategy.sum(torch.tensor([values[1] for _, values in bad], device=ctx.device))
            for (_, values), loss in zip(bad, losses.tolist(), strict=True):
                values[1] = loss / ctx.strategy.world_size
        return [self._anomaly(ctx, place, values) for place, values in bad]

    def _anomaly(self, ctx: CallbackContext, place: Unread, values: list[float]) -> Anomaly:
        step, epoch, window, names, _ = place
        verdict, loss, norm, index = values
        if verdict == NONFINITE_GRADIENT and not math.isfinite(loss):
            verdict = NONFINITE_LOSS  # another rank's
        of_loss = verdict in (LARGE_LOSS, NONFINITE_LOSS)
        tensor = "loss" if of_loss else f"gradient of {(names or self._names)[int(index)]}"
        return Anomaly(_KINDS[int(verdict)], step, epoch, window, loss, norm, tensor, samples_of(ctx, epoch, window))

    def _tell(self, ctx: CallbackContext, anomaly: Anomaly, back: list[Anomaly]) -> None:
        policy = self._policy(anomaly)
        did = "nothing" if policy == "ignore" else "left out"
        if anomaly in back:
            did = f"went back to step {self._snapshot_step}"
        if ctx.is_main:
            append(ctx.run_dir, anomaly, policy, did)
            _said.warning("%s. %s: %s.", anomaly, policy, did)

    # -- going back ------------------------------------------------------------------------------------------------------

    def _go_back(self, ctx: CallbackContext, bad: list[Anomaly]) -> None:
        self.left_out += [(a.epoch, a.window) for a in bad]
        ctx.left_out |= set(self.left_out)
        if len(self.left_out) > self.max_rollbacks:
            raise ModelError(f"{bad[0]}. It is one more than max_rollbacks = {self.max_rollbacks} windows; {_samples(bad[0])}.")
        saved = _copied(self._snapshot)  # what takes it over may keep its tensors
        saved["components"][self.plugin_name]["left_out"] = [list(place) for place in self.left_out]
        ctx.go_back(saved)


def _samples(anomaly: Anomaly) -> str:
    return "its samples are those of a stream" if anomaly.samples is None else f"its samples were {anomaly.samples}"


def _copied(value: Any) -> Any:
    """A state tree whose tensors are copies in host memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value
