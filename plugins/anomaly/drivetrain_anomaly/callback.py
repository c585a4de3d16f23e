"""The callback: what is done about an anomaly, and when."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import attrs
import torch
from torch import Tensor, nn

from drivetrain import Callback, ConfigError, Problem, at_hand, component, hook, map_tensors, option, state
from drivetrain_anomaly.detect import (
    NO_LIMIT,
    Detector,
    Scalar,
    Unread,
    column,
    judge_at_hand,
    judge_for,
    known,
    norms_of,
    worst,
)
from drivetrain_anomaly.record import Anomaly, AnomalyError, append, samples_of

if TYPE_CHECKING:
    from drivetrain import CallbackContext

Policy = Literal["raise", "skip", "rollback", "ignore"]
_said = logging.getLogger("drivetrain.anomaly")
_MOST_UNREAD = 1024
_NEVER = float("inf")


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
    gradients that overflow are the scale's business, which leaves the update out and does not count the step; so it does when the loss
    is not finite, which is an anomaly. A state that is saved between a bad window and the next logging step holds the snapshot as
    well, so a run that goes on from it ends with the same bits; with sharded weights it does not, and that window stays skipped.

    Each anomaly is a line of RUN_DIR/events.jsonl with step, loss, gradient norm, tensor and sample indices, and a warning.

    Cost: on a CPU a comparison, elsewhere three operations on one number a step, with the gradient norm that `max_grad_norm` needs
    anyway (without a limit it is computed), and some 30 more every `renew_every` steps, when means and limits are renewed. On a device
    a fused optimizer leaves a bad update out by itself. Before any other, the host reads one value a step; with a loss scale only if
    spikes are to be kept out.
    `loss_factor` with several processes costs an all-reduce of one number a step.

    Where weights are updated during backward (drivetrain-in-backward) the loss alone is judged, and what it tells comes after the
    update: `skip` is refused, the other policies do as ever.
    """

    without_gradients: ClassVar[bool] = True

    nonfinite: Policy = option(default="raise", help="what to do about NaN and infinity: raise, skip, rollback or ignore")
    spike: Policy = option(default="ignore", help="what to do about spikes")
    norm_factor: float | None = option(
        default=10.0, above=1, help="a gradient norm above this many means is a spike; false for none"
    )
    loss_factor: float | None = option(default=None, above=1, help="a loss above this many means is a spike; false for none")
    warmup: int = option(default=50, at_least=1, help="good steps before anything is called a spike")
    decay: float = option(default=0.98, at_least=0, below=1, help="of the exponential means")
    renew_every: int = option(
        default=32, at_least=1, help="steps from one renewal of the means and of the limits by them to the next"
    )
    snapshot_every: int = option(default=100, at_least=1, help="steps between two snapshots for rollback")
    max_rollbacks: int = option(default=10, at_least=1, help="so many in a run; one more ends it")

    left_out: list[tuple[int, int]] = state(factory=list)  # (epoch, window), for good

    _detector: Any = attrs.field(default=None, init=False, repr=False)
    _unread: list[Unread] = attrs.field(factory=list, init=False, repr=False)
    _restored: Any = attrs.field(default=None, init=False, repr=False)
    _snapshot: Any = attrs.field(default=None, init=False, repr=False)
    _snapshot_due: float = attrs.field(default=_NEVER, init=False, repr=False)  # 0 when one is
    _snapshot_step: int = attrs.field(default=0, init=False, repr=False)
    _parameters: list[nn.Parameter] = attrs.field(factory=list, init=False, repr=False)
    _names: list[str] = attrs.field(factory=list, init=False, repr=False)
    _sharded: bool = attrs.field(default=False, init=False, repr=False)
    _scaled: bool = attrs.field(default=False, init=False, repr=False)
    _shares_loss: bool = attrs.field(default=False, init=False, repr=False)
    _loss_counts: bool = attrs.field(
        default=True, init=False, repr=False
    )  # in the judgement of a step: it is that of all ranks
    _judge: Any = attrs.field(default=None, init=False, repr=False)  # tells whether to veto; None when nothing ever is
    _guard: Any = attrs.field(default=None, init=False, repr=False)  # the limits above which it does
    _judge_at_hand: Any = attrs.field(default=None, init=False, repr=False)  # the same two for numbers
    _guard_at_hand: list[Any] = attrs.field(factory=list, init=False, repr=False)
    _ctx: Any = attrs.field(default=None, init=False, repr=False)
    # Kind, text and step of what was found before the run went back. It is told in the first log from that step on, wherever the run
    # went back to: an interrupted run has its snapshots elsewhere, and is to have the same log.
    _to_tell: list[tuple[str, str, int]] = attrs.field(factory=list, init=False, repr=False)

    # -- state -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The means, and the judgements that no logging step has read yet."""
        if self._restored is not None:
            return dict(self._restored)
        state = self._outcomes()
        state["detector"] = None if self._detector is None else self._detector.state_dict()
        self._share_losses()
        state["unread"] = [_saved(row) for row in self._unread]
        if self._owes_a_rollback():
            state["snapshot"] = {"step": self._snapshot_step, "state": self._snapshot}
        return state

    def _outcomes(self) -> dict[str, Any]:
        """What a run that goes back must not forget."""
        return {"left_out": [list(place) for place in self.left_out], "to_tell": [list(entry) for entry in self._to_tell]}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Keep it until the device is known, or take it over at once."""
        self._restored = saved
        if self._detector is not None:
            self._take_over()

    def _take_over(self) -> None:
        saved, self._restored = self._restored, None
        self.left_out = [(epoch, window) for epoch, window in saved["left_out"]]
        self._to_tell = [(kind, text, step) for kind, text, step in saved.get("to_tell", [])]
        self._unread = [_taken_back(row, self._detector.seen.device) for row in saved["unread"]]
        if saved["detector"] is not None:
            self._detector.load_state_dict(saved["detector"])
        self._set_guard()
        if kept := saved.get("snapshot"):
            self._snapshot, self._snapshot_step = kept["state"], kept["step"]

    def _owes_a_rollback(self) -> bool:
        """Whether an unread step is to be undone at the next log, over an interruption too. Waits for the device.

        Not with sharded weights: each process has its own part of the snapshot, and only rank 0's state is saved.
        """
        if self._snapshot is None or not self._unread or self._sharded:
            return False
        owed = {kind for kind in ("spike", "nonfinite") if self._policy_of(kind) == "rollback"}
        numbers = self._numbers()
        if self._scaled and not self._loss_counts and "nonfinite" in owed:  # it may be the loss of another rank
            return any(not math.isfinite(norm) for _, norm, *_ in numbers)
        return any(found and found[0] in owed for found in map(self._judged, numbers))

    def _share_losses(self) -> None:
        """Let the unread rows have the mean loss, for a state is rank 0's alone. A collective, on all ranks alike."""
        if self._unread and self._ctx is not None and self._ctx.strategy.world_size > 1 and not self._shares_loss:
            losses = self._mean_losses(self._ctx, self._unread)
            self._unread = [row._replace(loss=known(loss)) for row, loss in zip(self._unread, losses, strict=True)]

    @staticmethod
    def _mean_losses(ctx: CallbackContext, rows: list[Unread]) -> Tensor:
        """Over all ranks, [rows]. A collective."""
        shares = column([row.loss for row in rows]).to(ctx.device)
        return ctx.strategy.sum(shares) / ctx.strategy.world_size

    # -- events ----------------------------------------------------------------------------------------------------------

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Settle what each step needs.

        Raises:
            ConfigError: for what cannot be done when weights are updated during backward.
        """
        if ctx.updates_in_backward and (problems := list(self._without_gradients())):
            raise ConfigError(problems)
        names = {id(p): name for name, p in ctx.model.named_parameters()}
        self._parameters = [p for group in ctx.optimizer.param_groups for p in group["params"]]
        self._names = [names.get(id(p), "?").removeprefix("module.").replace("_orig_mod.", "") for p in self._parameters]
        self._ctx, self._scaled = ctx, ctx.precision.scales and ctx.precision.dtype == torch.float16
        self._shares_loss = ctx.strategy.world_size > 1 and self.loss_factor is not None
        self._sharded = any(hasattr(p, "to_local") for p in self._parameters)
        if self._detector is None:
            self._detector = Detector.on(ctx.device, self.loss_factor, self.norm_factor, self.warmup, self.decay)
        if self._restored is not None:
            self._take_over()
        self._set_guard()
        self._loss_counts = self.loss_factor is not None or ctx.strategy.world_size == 1
        vetoed = {"spikes": self.spike != "ignore", "nonfinite": self.nonfinite != "ignore" and not self._scaled}
        if ctx.updates_in_backward:  # too late for a veto
            vetoed = dict.fromkeys(vetoed, False)
        self._judge = judge_for(ctx.device, self._loss_counts, self.loss_factor is not None, **vetoed)
        self._judge_at_hand = judge_at_hand(self._loss_counts, self.loss_factor is not None, **vetoed)
        ctx.left_out |= set(self.left_out)
        self._snapshot_due = 0 if self._rolls_back and not self._owes_a_rollback() else _NEVER

    @hook(tryfirst=True, not_before="_snapshot_due")
    def on_step_start(self, ctx: CallbackContext) -> None:
        """Make a snapshot when one is due: the first when the data is open, the others when a log has found nothing."""
        self._snapshot_due = _NEVER
        self._snapshot, self._snapshot_step = _copied(ctx.state_dict(own=True)), ctx.step

    @hook(tryfirst=True)
    def on_clipped(self, ctx: CallbackContext) -> None:
        """Judge the step, and veto its update, without a word to the host."""
        detector, loss, norm = self._detector, ctx.loss_tensor, ctx.grad_norm
        most_loss, most_norm = detector.known_limits
        its_loss: Scalar | None = None
        its_norm: Scalar | None = None
        if ctx.strategy.world_size == 1 and loss is not None and norm is not None:
            its_loss, its_norm = at_hand(loss), at_hand(norm)
        if its_loss is None or its_norm is None or not (-NO_LIMIT <= its_loss <= most_loss and its_norm <= most_norm):
            its_loss, its_norm = self._examine(ctx)
        detector.fresh += (its_loss if self._loss_counts else its_norm, its_norm)
        if (ctx.step + 1) % self.renew_every == 0:
            detector.renew()
            self._set_guard()
            if len(self._unread) > _MOST_UNREAD:  # logging is rare in this run
                self._unread = self._worth_keeping()

    def _examine(self, ctx: CallbackContext) -> tuple[Scalar, Scalar]:
        """Loss and norm of a step that may not be as the others, judged and remembered."""
        loss, norm, norms = ctx.loss_tensor, ctx.grad_norm, ctx.strategy.norms
        assert loss is not None
        if ctx.updates_in_backward:
            norm = torch.zeros_like(loss)
        elif norm is None:  # nothing else needed it
            norms = self._own_norms()
            norm = torch.linalg.vector_norm(norms)
        if self._shares_loss:
            loss = ctx.strategy.sum(loss.float()) / ctx.strategy.world_size
        its_loss, its_norm = known(loss), known(norm)
        here = isinstance(its_loss, float) and isinstance(its_norm, float)
        if not here:
            its_loss, its_norm = loss.float(), norm.float()
        if self._judge is not None and not here:
            ctx.veto = self._judge(its_loss, its_norm, self._guard)
        elif self._judge is not None and self._judge_at_hand(its_loss, its_norm, self._guard_at_hand):
            ctx.veto = True
        limits = self._detector.known_limits
        if not here or ctx.strategy.world_size > 1 or self._may_tell((its_loss, its_norm, *limits)):
            names = None if norms is None or norms.shape[0] == len(self._parameters) else self._names_with_gradient()
            self._unread.append(Unread(ctx.step + 1, ctx.epoch, ctx.step_in_epoch, names, its_loss, its_norm, norms, limits))
        return its_loss, its_norm

    @hook(tryfirst=True)
    def on_log(self, ctx: CallbackContext) -> None:
        """Hear what was found since the last log, and act on it."""
        found = self._read(ctx, together=True)
        told = [entry for entry in self._to_tell if self._is_time(ctx, entry[2])]
        kinds = [*(anomaly.kind for anomaly in found), *(kind for kind, _, _ in told)]
        ctx.metrics |= {f"anomaly/{kind}": float(kinds.count(kind)) for kind in ("spike", "nonfinite") if kind in kinds}
        for _, text, _ in told:  # what trackers had of it they have taken back
            ctx.show("text", "anomaly", text)
        back = [a for a in found if self._policy(a) == "rollback" and a.step > self._snapshot_step]
        if back:
            self._to_tell += [(anomaly.kind, f"{anomaly}: went back", anomaly.step) for anomaly in back]
        else:
            self._to_tell = [entry for entry in self._to_tell if entry not in told]
        for anomaly in found:
            self._tell(ctx, anomaly, back)
        if fatal := next((a for a in found if self._policy(a) == "raise"), None):
            raise AnomalyError(f"{fatal}. Its update was {'left out' if fatal.left_out else 'made'}; {_samples(fatal)}.")
        if back:
            self._go_back(ctx, back)
        elif self._rolls_back and ctx.step >= self._snapshot_step + self.snapshot_every:
            self._snapshot_due = 0

    def _is_time(self, ctx: CallbackContext, step: int) -> bool:
        """Whether the run has come to `step`, or to its end, which may be earlier now by the windows that are left out."""
        near = ctx.run_unit == "st" and ctx.step + len(self.left_out) >= ctx.run_length
        return ctx.step >= step or near or ctx.at_end

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

    def _without_gradients(self) -> Iterator[Problem]:
        why = "with optimizer_in_backward, which has made the update when a step is judged"
        for name in ("nonfinite", "spike"):
            if getattr(self, name) == "skip":
                yield Problem(f"callbacks.anomaly.{name}", f"cannot be skip {why}; possible: raise, rollback, ignore")
        if self.spike != "ignore" and self.loss_factor is None:
            yield Problem("callbacks.anomaly.loss_factor", f"is needed to find spikes {why}: there is no gradient norm")

    def _policy(self, anomaly: Anomaly) -> Policy:
        return self._policy_of(anomaly.kind)

    def _policy_of(self, kind: str) -> Policy:
        return self.spike if kind == "spike" else self.nonfinite

    def _set_guard(self) -> None:
        limits = self._detector.limits if self.spike != "ignore" else torch.full_like(self._detector.limits, NO_LIMIT)
        self._guard = limits if self.loss_factor is not None else limits[1]
        self._guard_at_hand = self._detector.known_limits if self.spike != "ignore" else [NO_LIMIT, NO_LIMIT]

    def _own_norms(self) -> Tensor:
        grads = [p.grad for p in self._parameters if p.grad is not None]
        return norms_of(grads) if grads else torch.zeros(1, device=self._detector.seen.device)

    def _names_with_gradient(self) -> list[str]:
        return [name for name, p in zip(self._names, self._parameters, strict=True) if p.grad is not None]

    def _numbers(self) -> list[tuple[float, float, float, float]]:
        """Of each unread step: loss, gradient norm and their limits, in one transfer. Waits for the device."""
        if not self._unread:
            return []
        rows: list[Any] = [(row.loss, row.norm, *row.limits) for row in self._unread]
        if isinstance(rows[0][0], float):
            return rows
        return [tuple(row) for row in column([value for row in rows for value in row]).view(-1, 4).tolist()]

    def _judged(self, numbers: tuple[float, float, float, float]) -> tuple[str, bool] | None:
        """What kind of anomaly a step was, and whether it is the loss that says so; None for a good one."""
        loss, norm, loss_limit, norm_limit = numbers
        if not math.isfinite(loss):
            return "nonfinite", True
        if not math.isfinite(norm):
            return None if self._scaled else ("nonfinite", False)
        if norm > norm_limit:
            return "spike", False
        return ("spike", True) if self.loss_factor is not None and loss > loss_limit else None

    def _may_tell(self, numbers: tuple[float, float, float, float]) -> bool:
        """Whether a step may have been an anomaly, as far as this process knows."""
        return self._judged(numbers) is not None or not math.isfinite(numbers[1])

    def _worth_keeping(self) -> list[Unread]:
        """The rows that may tell of something; waits for the device, once in a thousand steps without a log."""
        return [row for row, numbers in zip(self._unread, self._numbers(), strict=True) if self._may_tell(numbers)]

    def _read(self, ctx: CallbackContext, together: bool) -> list[Anomaly]:
        """What was found since the last reading, in one transfer; all ranks together have the loss of all."""
        numbers, unread, self._unread = self._numbers(), self._unread, []
        if together and ctx.strategy.world_size > 1 and not self._shares_loss and self._is_suspicious(ctx, numbers):
            losses = self._mean_losses(ctx, unread).tolist()
            numbers = [(loss, *rest) for loss, (_, *rest) in zip(losses, numbers, strict=True)]
        found = [(row, n, verdict) for row, n in zip(unread, numbers, strict=True) if (verdict := self._judged(n))]
        if together and self._sharded:  # each process has the norms of its parts, and all are to name the same gradient
            found = [(self._with_whole_norms(ctx, row), n, verdict) for row, n, verdict in found]
        return [self._anomaly(ctx, row, n, *verdict) for row, n, verdict in found]

    def _with_whole_norms(self, ctx: CallbackContext, row: Unread) -> Unread:
        return row if row.norms is None else row._replace(norms=ctx.strategy.sum(row.norms.float().square()).sqrt())

    def _is_suspicious(self, ctx: CallbackContext, numbers: list[Any]) -> bool:
        """Whether the losses of the other ranks are worth asking for; all ranks say the same."""
        bad = any(not norm <= limit for _, norm, _, limit in numbers)
        return bool(numbers) and (bad or not math.isfinite(ctx.metrics.get("train/loss", 0.0)))

    def _anomaly(self, ctx: CallbackContext, row: Unread, numbers: Any, kind: str, of_loss: bool) -> Anomaly:
        loss, norm, _, limit = numbers
        tensor = "loss" if of_loss else self._gradient_to_blame(row)
        samples = samples_of(ctx, row.epoch, row.window)
        seen = not norm <= limit or (of_loss and self._loss_counts and not (self._scaled and kind == "nonfinite"))
        by_scale = self._scaled and not math.isfinite(norm)
        left_out = by_scale or (seen and self._policy_of(kind) != "ignore" and not ctx.updates_in_backward)
        return Anomaly(kind, row.step, row.epoch, row.window, loss, norm, tensor, samples, left_out)

    def _gradient_to_blame(self, row: Unread) -> str:
        if row.norms is None:
            return "the gradients"
        return f"gradient of {(row.names or self._names)[worst(row.norms.tolist())]}"

    def _tell(self, ctx: CallbackContext, anomaly: Anomaly, back: list[Anomaly]) -> None:
        policy = self._policy(anomaly)
        did = "left out" if anomaly.left_out else "nothing"
        if anomaly in back:
            did = f"went back to step {self._snapshot_step}"
        if ctx.is_main:
            append(ctx.run_dir, anomaly, policy, did)
            if anomaly not in back:
                ctx.show("text", "anomaly", f"{anomaly}: {did}")
            _said.warning("%s. %s: %s.", anomaly, policy, did)

    # -- going back ------------------------------------------------------------------------------------------------------

    def _go_back(self, ctx: CallbackContext, bad: list[Anomaly]) -> None:
        self.left_out += [(a.epoch, a.window) for a in bad]
        ctx.left_out |= set(self.left_out)
        if len(self.left_out) > self.max_rollbacks:
            raise AnomalyError(
                f"{bad[0]}. It is one more than max_rollbacks = {self.max_rollbacks} windows; {_samples(bad[0])}."
            )
        saved = _copied(self._snapshot)  # what takes it over may keep its tensors
        saved["components"][self.plugin_name] |= self._outcomes()
        ctx.go_back(saved)


def _saved(row: Unread) -> dict[str, Any]:
    """A row whose values are tensors, as every release has saved it."""
    loss, norm = (column([value])[0] for value in (row.loss, row.norm))
    return {**row._asdict(), "loss": loss, "norm": norm, "limits": column(row.limits)}


def _taken_back(saved: Mapping[str, Any], device: torch.device) -> Unread:
    """What `_saved` gave, on the device."""
    row: dict[str, Any] = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in saved.items()}
    limits = [known(limit) for limit in row["limits"]]
    return Unread(**row)._replace(loss=known(row["loss"]), norm=known(row["norm"]), limits=limits)


def _samples(anomaly: Anomaly) -> str:
    return "its samples are those of a stream" if anomaly.samples is None else f"its samples were {anomaly.samples}"


def _copied(value: Any) -> Any:
    """A state tree whose tensors are copies in host memory."""
    return map_tensors(value, lambda tensor: tensor.detach().to("cpu", copy=True))
