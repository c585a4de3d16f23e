"""The training loop. It reads like the pseudocode in `hookspecs`; everything it calls was chosen before it starts.

    for each epoch:
        for each window of microbatches:
            gradients:  forward → loss → backward, for each microbatch
            update:     clip → optimizer → zero the gradients
            agenda:     log, evaluate, the components' own periods, when due

Nothing here waits for the device on an ordinary step.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from drivetrain.agenda import Agenda
from drivetrain.ahead import sent_ahead
from drivetrain.calling import LossFunction, ModelCall, StepFunction
from drivetrain.context import CallbackContext
from drivetrain.data import Source, Window
from drivetrain.errors import DataError, ModelError, RunError
from drivetrain.hooks import Events
from drivetrain.loss import Loss, checked, samples_in, tokens_in
from drivetrain.output import Step
from drivetrain.rng import random_state, set_random_state
from drivetrain.scalars import at_hand
from drivetrain.shrinking import divided, is_out_of_memory, release

_TINY = 1e-20  # keeps a step without any weight (every target masked) at zero gradient instead of 0/0
_MOST_SKIPS = 100
_MOST_LOSSES = 1024  # kept apart
_SPLIT = 4096  # tokens travel as two numbers, whose sums fp32 holds exactly
_NOTHING = nullcontext()
_NO_TOKENS = (
    "max_duration counts tokens, and the batches have none: they need `input_ids`, or an integer input of two dimensions. "
    "Give max_duration in steps ('1000st'), samples ('1e6sp') or epochs ('3ep')."
)


class Loop:
    """One run's loop over its prepared parts."""

    def __init__(
        self,
        ctx: CallbackContext,
        events: Events,
        agenda: Agenda,
        source: Source,
        call: ModelCall,
        schedule: Callable[[float], float] | None,
        max_grad_norm: float | None,
        transfer: Callable[[Any], Any] | None,
        wrap: Callable[[Callable[[Window], Tensor | None]], Callable[[Window], Tensor | None]] | None = None,
    ) -> None:
        self.ctx, self.events, self.agenda, self.source, self.call = ctx, events, agenda, source, call
        self.schedule, self.max_grad_norm, self.transfer = schedule, max_grad_norm, transfer
        self._gradients = self.gradients if wrap is None else wrap(self.gradients)
        self.losses: list[Tensor] = []  # one scalar on the device for each step since the last log
        self._folded = 0  # more steps than one whose sum the first of them is
        self.on_resume: Callable[[], None] | None = None  # puts random states back once the data is open
        self.parameters: Sequence[nn.Parameter] = [p for group in ctx.optimizer.param_groups for p in group["params"]]
        self._autocast: AbstractContextManager[Any] | None = ctx.precision.forward()
        self._no_sync: AbstractContextManager[Any] | None = ctx.strategy.no_sync(ctx.model)
        self._scale = ctx.precision.scale if ctx.precision.scales else None
        self._consecutive_skips = 0
        self.is_whole = False  # whether the state is that after a step, not of one in the middle
        self._tokens: Tensor | None = None  # of all ranks in this step, when they have travelled with its weight
        self._tokens_matter = ctx.run_unit == "tok" and ctx.strategy.data_ranks > 1
        for group in ctx.optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))

    def steps(self) -> Iterator[Step]:
        """Train, yielding each step when everything due after it has been done."""
        ctx, on, settled = self.ctx, self.events, False
        while not self.over():
            if on.epoch_start is not None:
                on.epoch_start(ctx)
            start, complete = (ctx.epoch, ctx.step_in_epoch), True
            for window in self._windows():
                if not self.step(window):
                    self._after_step(False)
                else:
                    if not settled:
                        ctx.strategy.settled()
                        settled = True
                        if ctx.run_unit == "tok" and ctx.tokens == 0:  # or it would never end
                            raise DataError(_NO_TOKENS)
                    if on.step_end is not None:
                        on.step_end(ctx)
                    assert ctx.loss_tensor is not None
                    done = Step(ctx.step, ctx.epoch, ctx.loss_tensor)
                    self._after_step(True)
                    yield done
                if self.over() or self.on_resume is not None:  # the end, or a way back, for which the data is opened anew
                    complete = self.on_resume is None and ctx.step_in_epoch == ctx.steps_per_epoch
                    break
            if complete:
                self._end_epoch(start)

    def _after_step(self, counted: bool) -> None:
        """Whatever is due; a stop or a time that only one rank knows of brings all together first, after the same step."""
        self.is_whole = True
        if not counted:
            self.agenda.look_ahead()
        met = self.ctx.strategy.meet(self.ctx.stop_wanted is not None or self.agenda.is_late())
        if met or self.agenda.is_due() or (counted and self.reached_end()):
            self._run_agenda(met)

    def _run_agenda(self, met: bool) -> None:
        began, ctx = time.perf_counter(), self.ctx
        if met:
            self._agree()
        self.agenda.run(met, self.reached_end)
        wanted, interrupted = self._agree()
        if wanted and not self.reached_end():
            ctx.stop_reason = ctx.stop_wanted or "another rank asked to stop"  # from here on `Trainer.stop` changes nothing
            ctx.interrupted = interrupted
        ctx.paused += time.perf_counter() - began

    def _agree(self) -> tuple[bool, bool]:
        """Let all ranks know what time it is and how many tokens rank 0 has counted; whether one of them wants to stop, and whether
        because it was interrupted."""
        ctx = self.ctx
        if ctx.strategy.world_size == 1:
            return False, False
        # in pairs of numbers that fp32 holds exactly, or to a microsecond
        clock = [*divmod(ctx.elapsed, 1.0), *divmod(ctx.tokens, 1 << 20)] if ctx.strategy.rank == 0 else [0.0] * 4
        mine = [float(ctx.stop_wanted is not None), float(ctx.interrupted), *map(float, clock)]
        wanted, interrupted, *clock = ctx.strategy.sum(torch.tensor(mine, device=ctx.device)).tolist()
        ctx.agreed_seconds, ctx.tokens = clock[0] + clock[1], int(clock[2]) * (1 << 20) + int(clock[3])
        return bool(wanted), bool(interrupted)

    def over(self) -> bool:
        """Whether the run has reached its end or somebody stopped it."""
        ctx = self.ctx
        if ctx.stop_reason is None and self.reached_end():
            ctx.stop_reason, ctx.at_end = f"max_duration {ctx.config.max_duration} reached", True
        if ctx.stop_reason is None and ctx.strategy.world_size == 1:
            ctx.stop_reason = ctx.stop_wanted
        return ctx.stop_reason is not None

    def reached_end(self) -> bool:
        """Whether `max_duration` is over."""
        ctx = self.ctx
        if ctx.config.max_duration.unit == "ep" and ctx.steps_per_epoch is not None:  # passes count, with their skipped steps
            return ctx.epoch * ctx.steps_per_epoch + ctx.step_in_epoch >= ctx.run_length
        return ctx.position >= ctx.run_length

    def step(self, window: Window) -> bool:
        """One optimizer update from a window of microbatches; False when it was skipped because gradients overflowed."""
        ctx, on, self.is_whole = self.ctx, self.events, False
        self.window, ctx.window, ctx.microbatches = window, window.batches, len(window.batches)
        ctx._loss_value = None
        tokens = sum(map(tokens_in, window.batches))
        if on.step_start is not None:
            on.step_start(ctx)
        if self.schedule is not None:  # of the position before this step, whatever it is counted in
            self._set_learning_rate(self.schedule(ctx.position))
        try:
            factor = self._gradients(window)
        except (RuntimeError, MemoryError) as error:
            factor = self._gradients_of_smaller(error)
        applied = self.update(factor)
        ctx.step_in_epoch += 1
        ctx.samples += window.total
        ctx.tokens += self._over_ranks(tokens)
        if applied:
            ctx.step += 1
            self._consecutive_skips = 0
            self._remember_loss()
        else:
            self._count_skip()
        return applied

    def _over_ranks(self, tokens: int) -> int:
        """Tokens of all ranks: exactly where the run's length or schedule depends on them, otherwise assuming equal ranks."""
        strategy = self.ctx.strategy
        if not self._tokens_matter:
            return tokens * strategy.data_ranks
        if self._tokens is None:  # no weights that they could have travelled with
            self._tokens = strategy.sum(torch.tensor([float(n) for n in divmod(tokens, _SPLIT)], device=self.ctx.device))
        thousands, rest = map(int, self._tokens.tolist())
        self._tokens = None
        return (thousands * _SPLIT + rest) * strategy.data_ranks // strategy.world_size

    def _sum(self, weight: Tensor, window: Window) -> Tensor:
        """A step's weight over all ranks, and with it, where the run is measured in tokens, their number."""
        if not self._tokens_matter:
            return self.ctx.strategy.sum(weight)
        tokens = divmod(sum(map(tokens_in, window.batches)), _SPLIT)
        found = self.ctx.strategy.sum(torch.stack([weight.float(), *weight.new_tensor(tokens, dtype=torch.float32)]))
        self._tokens = found[1:]
        return found[0]

    def gradients(self, window: Window) -> Tensor | None:
        """Forward and backward of every microbatch; sets `ctx.loss_tensor`, whose mean over ranks is the step's loss.

        Returns what the gradients (a mean over ranks) are still to be multiplied by to be those of sum(total) / sum(weight)
        over the step's microbatches and ranks; None for 1.
        """
        ctx = self.ctx
        if len(window.batches) > 1 or ctx.strategy.world_size > 1:
            return self._accumulate(window)
        loss = self.forward(window.batches[0], 0)
        mean = loss if isinstance(loss, Tensor) else loss.total / _positive(loss.weight)
        self.backward(mean)
        ctx.loss_tensor = mean.detach()
        return None

    def _gradients_of_smaller(self, error: BaseException) -> Tensor | None:
        """Try the step anew with halves of its microbatches, as often as memory runs out; later steps keep that size.

        Several ranks cannot do so: the others may be in a reduction of this attempt already.
        """
        ctx = self.ctx
        while is_out_of_memory(error) and ctx.strategy.world_size == 1:
            smaller = divided(self.window, 2)
            if smaller is None:
                break
            release(error, ctx.device)
            for parameter in self.parameters:
                parameter.grad = None
            ctx.microbatch_parts *= 2
            self.window, ctx.window, ctx.microbatches = smaller, smaller.batches, len(smaller.batches)
            warnings.warn(_smaller(ctx, smaller), stacklevel=2)
            try:
                return self.gradients(smaller)
            except (RuntimeError, MemoryError) as again:
                error = again
        if is_out_of_memory(error):
            error.add_note(_no_memory(ctx))
        raise error

    def _accumulate(self, window: Window) -> Tensor | None:
        """Mean losses are weighted by their samples, known ahead. The weights of `Loss`es are known only when all microbatches of
        all ranks have run: until then gradients are in units that every rank knows, and in the range of a mean's."""
        ctx, last, ranks = self.ctx, len(window.batches) - 1, self.ctx.strategy.world_size
        share = window.total / ctx.strategy.data_ranks
        unit: float | Tensor | None = None
        totals, weights = [], []
        for index, (batch, count) in enumerate(zip(window.batches, window.counts, strict=True)):
            with self._reducing(index == last):
                loss = self.forward(batch, index)
                if isinstance(loss, Loss) != (unit is not None) and index > 0:
                    raise ModelError(
                        "some microbatches of a step gave Loss(total, weight) and others a mean; give one of the two."
                    )
                if isinstance(loss, Tensor):
                    scaled = loss if count == share else loss / (share / count) if count else loss * 0.0
                else:
                    if unit is None:
                        unit = _at_least_one(loss.weight) if ranks == 1 else share
                    counted = loss if count else Loss(loss.total * 0.0, loss.weight * 0.0)
                    scaled = counted.total / unit
                    weights.append(_constant(counted.weight))
                totals.append(scaled.detach())
                self.backward(scaled)
        total = totals[0] if len(totals) == 1 else torch.stack(totals).sum()
        if unit is None:
            ctx.loss_tensor = total
            return None
        first = torch.as_tensor(weights[0], device=total.device, dtype=torch.float32)
        weight = torch.as_tensor(sum(weights[1:], start=first))
        factor = torch.as_tensor(unit * ranks / self._sum(weight, window).clamp(min=_TINY), device=total.device)
        ctx.loss_tensor = total * factor
        return factor

    def _reducing(self, last: bool) -> AbstractContextManager[Any]:
        """The context of one microbatch's forward and backward: on several ranks only a step's last one reduces gradients."""
        return _NOTHING if last or self._no_sync is None else self._no_sync

    def forward(self, batch: Any, index: int) -> Tensor | Loss:
        """One microbatch to its loss."""
        ctx, on = self.ctx, self.events
        ctx.microbatch = index
        ctx.batch = batch if self.transfer is None else self.transfer(batch)
        if on.batch is not None:
            on.batch(ctx)
        if self._autocast is None:
            loss = self._forward()
        else:
            with self._autocast:
                loss = self._forward()
        if on.loss is not None:
            ctx.microbatch_loss = loss
            on.loss(ctx)
            loss = ctx.microbatch_loss
        return loss

    def _forward(self) -> Tensor | Loss:
        ctx, on_forward = self.ctx, self.events.forward
        outputs = self.call.forward(ctx.model, ctx.batch)
        if on_forward is not None:
            ctx.outputs = outputs
            on_forward(ctx)
            outputs = ctx.outputs
        return self.call.loss(outputs, ctx.batch)

    def backward(self, loss: Tensor) -> None:
        """Add the microbatch's gradients up."""
        if self._scale is not None:
            loss = self._scale(loss)
        if not loss.requires_grad:
            raise ModelError(_no_gradient(self.parameters))
        loss.backward()
        ctx = self.ctx
        if self.events.backward is not None:
            self.events.backward(ctx)
        ctx.outputs = ctx.microbatch_loss = None  # or logits would live until the next forward

    def gradients_of(self, loss: LossFunction | None, step: StepFunction | None = None) -> tuple[list[Tensor | None], Tensor]:
        """See `CallbackContext.gradients_of`."""
        ctx, kept, random = self.ctx, [p.grad for p in self.parameters], random_state(self.ctx.device)
        for parameter in self.parameters:
            parameter.grad = None
        weight, last = torch.zeros((), device=ctx.device), len(self.window.batches) - 1
        try:
            for index, (batch, count) in enumerate(zip(self.window.batches, self.window.counts, strict=True)):
                with self._reducing(index == last):
                    found = self._auxiliary_loss(batch, count, loss, step)
                    if count:
                        weight = weight + torch.as_tensor(found.weight, device=ctx.device).detach()
                    (found.total if count else found.total * 0.0).backward()
            ctx.strategy.reduce_gradients(self.parameters)
            weight = ctx.strategy.sum(weight) * (ctx.strategy.data_ranks / ctx.strategy.world_size)
            factor = ctx.strategy.data_ranks / weight.clamp(min=_TINY)
            # new tensors: a strategy may write the next gradients into the memory of these
            return [None if p.grad is None else p.grad * factor for p in self.parameters], weight
        finally:
            for parameter, gradient in zip(self.parameters, kept, strict=True):
                parameter.grad = gradient
            set_random_state(random, ctx.device)

    def _auxiliary_loss(self, batch: Any, count: int, loss: LossFunction | None, step: StepFunction | None) -> Loss:
        moved = batch if self.transfer is None else self.transfer(batch)
        with self.ctx.precision.forward() or nullcontext():
            if step is not None:
                found = checked(step(self.ctx.model, moved), "the function given to gradients_of")
            else:
                outputs = self.call.forward(self.ctx.model, moved)
                found = self.call.loss(outputs, moved) if loss is None else loss(outputs, moved)
        found = found if isinstance(found, Loss) else Loss(found * count, count)
        if not found.total.requires_grad:
            raise ModelError(_no_gradient(self.parameters))
        return found

    def update(self, factor: Tensor | None) -> bool:
        """Clip, step the optimizer and drop the gradients; False when the step was skipped."""
        ctx, on, strategy, precision = self.ctx, self.events, self.ctx.strategy, self.ctx.precision
        strategy.reduce_gradients(self.parameters)
        if self._scale is not None:
            precision.unscale(ctx.optimizer)
        if on.gradients is not None:
            strategy.clip(self.parameters, None, factor)
            factor = None
            on.gradients(ctx)
        if self.max_grad_norm is not None or factor is not None:
            ctx.grad_norm = strategy.clip(self.parameters, self.max_grad_norm, factor)
        if on.clipped is not None:
            on.clipped(ctx)
        if ctx.veto is not None:
            applied = self._step_unless(ctx.veto)
        elif self._scale is None:
            ctx.optimizer.step()
            applied = True
        else:
            applied = precision.step(ctx.optimizer)
        if applied and on.optimizer_step is not None:
            on.optimizer_step(ctx)
        for parameter in self.parameters:
            parameter.grad = None
        return applied

    def _step_unless(self, veto: Tensor | bool) -> bool:
        """Step the optimizer unless `veto` is not 0; a vetoed step counts and changes nothing.

        What is at hand decides at once. Of a value on a device a fused optimizer sees to it there; before any other, and with a loss
        scale, the host reads it and waits.
        """
        ctx, optimizer, precision = self.ctx, self.ctx.optimizer, self.ctx.precision
        ctx.veto = None
        if isinstance(veto, Tensor) and (known := at_hand(veto)) is not None:
            veto = bool(known)
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        first = not optimizer.state  # makes a state, which a veto would leave unfilled
        if isinstance(veto, Tensor) and fused and not first and self._scale is None:
            found = (veto if veto.dtype == torch.bool else veto != 0).float()
            optimizer.grad_scale, optimizer.found_inf = None, found  # type: ignore[attr-defined]
            try:
                optimizer.step()
            finally:
                del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
            return True
        if veto.item() if isinstance(veto, Tensor) else veto:
            precision.skip(optimizer)
            return True
        return precision.step(optimizer)

    def break_off(self) -> None:
        """Drop what a step that failed has left, or somebody before the first one: the next step must not find it."""
        ctx, self._tokens = self.ctx, None
        for parameter in self.parameters:
            parameter.grad = None
        ctx.veto = ctx.outputs = ctx.microbatch_loss = ctx._back_to = None
        ctx.precision.break_off(ctx.optimizer)

    def _set_learning_rate(self, factor: float) -> None:
        for group in self.ctx.optimizer.param_groups:
            value = group["initial_lr"] * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    def _windows(self) -> Iterator[Window]:
        """The windows of this epoch from where the run stands, with the time spent waiting for them."""
        ctx, clock = self.ctx, time.perf_counter
        began = clock()
        found = self.source.open(ctx.epoch, ctx.step_in_epoch)
        if self.on_resume is not None:
            self.on_resume()
            self.on_resume = None
        if ctx.device.type == "cuda":
            found = sent_ahead(found, ctx.device)
        while True:
            window = next(found, None)
            ctx.data_wait += clock() - began
            if window is None:
                return
            if ctx.microbatch_parts > 1:
                window = divided(window, ctx.microbatch_parts) or window
            if ctx.left_out and (ctx.epoch, ctx.step_in_epoch) in ctx.left_out:
                ctx.step_in_epoch += 1
                ctx.skipped_steps += 1
                self.agenda.look_ahead()
            else:
                yield window
            began = clock()

    def _end_epoch(self, start: tuple[int, int]) -> None:
        ctx = self.ctx
        if ctx.step_in_epoch == 0:
            raise DataError(no_batch(ctx.epoch))
        if self.events.epoch_end is not None:
            self.events.epoch_end(ctx)
        ctx.epoch, ctx.step_in_epoch = start[0] + 1, 0
        self.agenda.look_ahead()
        # Epochs of unknown length, or whose last window was left out, end here, not at a step known ahead.
        if self.agenda.is_due() or (ctx.steps_per_epoch is None and self.reached_end()):
            self._run_agenda(False)

    def _remember_loss(self) -> None:
        assert self.ctx.loss_tensor is not None
        self.losses.append(self.ctx.loss_tensor)
        if len(self.losses) >= _MOST_LOSSES:  # logging is rare in this run: keep a sum instead of every value
            self._folded += len(self.losses) - 1
            self.losses = [self._gathered().sum()]

    def _gathered(self) -> Tensor:
        return torch.stack([loss.float() for loss in self.losses])

    def take_loss(self) -> Tensor:
        """This process's mean loss since the last log, on the device; from here on the next one is gathered."""
        mean = self._gathered().sum() / (len(self.losses) + self._folded)
        self.losses, self._folded = [], 0
        return mean

    def unlogged(self) -> dict[str, Any]:
        """What this process has gathered for the next log, and the overflows in a row; see `Trainer.state_dict`."""
        ctx, losses = self.ctx, self._gathered() if self.losses else None
        place = ctx.device if ctx.strategy.world_size == 1 else torch.device("cpu")  # to be gathered
        numbers = {"folded": self._folded, "consecutive_skips": self._consecutive_skips}
        values = {name: _moved(v, place) if isinstance(v, Tensor) else float(v) for name, v in ctx._pending.items()}
        return numbers | {"losses": _moved(losses, place), "grad_norm": _moved(ctx.grad_norm, place), "values": values}

    def load_unlogged(self, saved: Mapping[str, Any]) -> None:
        """Take back what `unlogged` gave."""
        ctx, place = self.ctx, self.ctx.device
        losses = _moved(saved["losses"], place)
        self.losses = [] if losses is None else list(losses.unbind())
        ctx.loss_tensor, ctx._loss_value = self.losses[-1] if self.losses else None, None
        ctx.grad_norm, self._folded = _moved(saved["grad_norm"], place), saved["folded"]
        ctx._pending = {name: _moved(v, place) for name, v in saved["values"].items()}
        self._consecutive_skips = saved["consecutive_skips"]

    def _count_skip(self) -> None:
        self.ctx.skipped_steps += 1
        self._consecutive_skips += 1
        if self._consecutive_skips >= _MOST_SKIPS:
            raise RunError(
                f"{_MOST_SKIPS} steps in a row had infinite or NaN gradients, at step {self.ctx.step}. "
                "Lower the learning rate, or train in bf16 or fp32."
            )


def _moved(value: Any, place: torch.device) -> Any:
    return value.detach().to(place) if isinstance(value, Tensor) else value


def _smaller(ctx: CallbackContext, window: Window) -> str:
    sizes = sorted({samples_in(batch) for batch in window.batches}, reverse=True)
    size = " or ".join(map(str, sizes))
    return (
        f"step {ctx.step + 1} ran out of memory and goes on in {len(window.batches)} microbatches of {size} samples, and so do those "
        f"after it: the same samples and loss. To begin so: per_device_batch_size = {sizes[0]}, with the accumulation that makes up "
        "for it (layers that look at a whole microbatch, such as batch norm, see fewer samples)."
    )


def _no_memory(ctx: CallbackContext) -> str:
    size = ctx.config.per_device_batch_size
    if ctx.strategy.world_size > 1 and size > 1:
        return (
            f"Rank {ctx.strategy.rank} ran out of memory. Lower per_device_batch_size from {size} to {max(1, size // 2)} and double "
            "gradient_accumulation_steps, or give global_batch_size: the steps stay the same."
        )
    return (
        "Out of memory in what cannot be divided: activation_checkpointing, 16-bit precision or distributed = 'fsdp' need less."
    )


def _constant(weight: Tensor | float) -> Tensor | float:
    """A weight says how much a loss counts: no gradient goes through it, with accumulation or without."""
    return weight.detach() if isinstance(weight, Tensor) else weight


def _positive(weight: Tensor | float) -> Tensor | float:
    if not isinstance(weight, Tensor):
        return max(weight, _TINY)
    weight = weight.detach()
    return (weight.float() if weight.dtype == torch.float16 else weight).clamp(min=_TINY)  # which is 0 in fp16


def _at_least_one(weight: Tensor | float) -> Tensor | float:
    return weight.detach().clamp(min=1.0) if isinstance(weight, Tensor) else max(weight, 1.0)


def no_batch(epoch: int) -> str:
    """What to say of an epoch in which nothing came."""
    if epoch == 0:
        return (
            "train data: the stream gave no batch, so nothing can be trained on. Look at where its samples come from; "
            "dataloader.drop_last leaves out a last batch that is not full."
        )
    return (
        f"the data gave no batch in epoch {epoch}. An iterator that can be read only once cannot serve a second epoch: give a "
        "data set, or an iterable that starts anew, or a max_duration within one pass."
    )


def _no_gradient(parameters: Sequence[nn.Parameter]) -> str:
    if not any(p.requires_grad for p in parameters):
        return "no parameter of the optimizer requires a gradient; unfreeze some."
    return (
        "the loss does not depend on any trainable parameter (it has no gradient); was it computed under no_grad or detached?"
    )
