"""The callback: when to save, what to keep, where to go on."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

import attrs
from torch import Tensor, nn

from drivetrain import Callback, ConfigError, DrivetrainError, Duration, component, hook, option, state
from drivetrain_checkpoint.background import InFlight, Work, at_once, in_background
from drivetrain_checkpoint.errors import CheckpointError, CheckpointFailure
from drivetrain_checkpoint.files import Files
from drivetrain_checkpoint.find import find_checkpoints
from drivetrain_checkpoint.format import Tree, pack, pack_own
from drivetrain_checkpoint.lock import RunLock
from drivetrain_checkpoint.ranks import is_divided, on_every_rank, on_rank_0
from drivetrain_checkpoint.resume import Choice, choose
from drivetrain_checkpoint.staging import Staging
from drivetrain_checkpoint.store import Loaded, Store, load_checkpoint, probe

if TYPE_CHECKING:
    import torch

    from drivetrain import CallbackContext
    from drivetrain_checkpoint.together import StrategyLayout

SAVE_FILE = "SAVE"

# Events after a save and before the optimizer's step, in which an optimizer's component may change its state.
_NEVER = float("inf")
_BEFORE_THE_STEP = (
    "on_epoch_end",
    "on_epoch_start",
    "on_step_start",
    "on_batch",
    "on_forward",
    "on_loss",
    "on_backward",
    "on_gradients",
)


@component
class CheckpointCallback(Callback):
    """Save everything the run needs to go on exactly, and go on from it.

    A checkpoint is RUN_DIR/checkpoints/step-00000500: safetensors and JSON, no pickle, a manifest with the hash of every file.
    It appears whole or not at all. The configuration's `resume` says where a run goes on: "auto" takes the newest checkpoint
    that is whole and warns of those it rejects; "never" refuses a run directory that has checkpoints; a path names a run or one
    checkpoint, which must be whole. A file RUN_DIR/SAVE asks for a checkpoint at the next logging step, which removes the file.
    """

    changes_training: ClassVar[bool] = False  # within steps it waits for copies, and changes nothing
    without_gradients: ClassVar[bool] = True

    every: Duration = option(default=Duration(500, "st"), help="how often to save, such as '500st', '1ep' or '15min'")
    keep_last: int | None = option(default=3, at_least=1, help="how many of the newest to keep; false for all")
    best: str | None = option(default=None, help="also save and keep the best by this evaluation metric, such as eval/loss")
    best_mode: Literal["min", "max"] = option(default="min", help="whether a smaller or a greater value is better")
    save_at_end: bool = option(default=True, help="save when the run ends, unless it failed or has just been saved")
    asynchronous: bool = option(default=True, help="write in the background, from a copy of the state in host memory")
    on_error: Literal["raise", "warn"] = option(default="raise", help="what a disk that refuses does to the run")
    retries: int = option(default=3, at_least=0, help="how often to try again after a transient disk error")

    best_value: float | None = state(default=None)
    best_step: int | None = state(default=None)
    metric_seen: bool = state(default=False)
    started_from: str | None = state(default=None)  # a checkpoint or run elsewhere, at which this run began

    # neither options nor saved
    files: Files = attrs.field(factory=Files, init=False, repr=False)  # the seam to the disk
    rejected: set[Path] = attrs.field(factory=set, init=False, repr=False)  # damaged checkpoints found at the start
    _saved_at: tuple[int, int] | None = attrs.field(default=None, init=False, repr=False)
    _versions: int = attrs.field(default=0, init=False, repr=False)  # of the weights when they were saved
    _looks: float = attrs.field(default=0, init=False, repr=False)  # 0 while steps may have something for this to do
    _is_due: bool = attrs.field(default=False, init=False, repr=False)
    _best_before: tuple[float | None, int | None] = attrs.field(default=(None, None), init=False, repr=False)
    _running: bool = attrs.field(default=False, init=False, repr=False)
    _preempted: bool = attrs.field(default=False, init=False, repr=False)
    _in_flight: InFlight | None = attrs.field(default=None, init=False, repr=False)
    _staging: Staging = attrs.field(factory=Staging, init=False, repr=False)
    _planning: Any = attrs.field(default=None, init=False, repr=False)  # a `Planning`, when each rank writes its part
    _unprepared: list[Tensor] | None = attrs.field(default=None, init=False, repr=False)  # the state before the first step
    _changes_early: bool = attrs.field(default=False, init=False, repr=False)
    _store: Store | None = attrs.field(default=None, init=False, repr=False)
    _lock: RunLock | None = attrs.field(default=None, init=False, repr=False)
    _unlocked: bool = attrs.field(default=False, init=False, repr=False)

    # -- events ----------------------------------------------------------------------------------------------------------

    def on_restore(self, ctx: CallbackContext) -> None:
        """Go on from a checkpoint, if `resume` says so. Rank 0 decides from which, the others follow."""
        chosen: Choice | None = None

        def choose_one() -> tuple[Path, str | None, bool] | None:
            nonlocal chosen
            chosen = choose(ctx, self.rejected)
            return None if chosen is None else (chosen.loaded.path, chosen.origin, chosen.begins)

        found = on_rank_0(ctx, choose_one)
        if found is None:
            return
        path, origin, begins = found
        loaded = on_every_rank(ctx, lambda: load_checkpoint(path, verified=False) if chosen is None else chosen.loaded)
        self._take(ctx, loaded)
        if begins:
            self.started_from = origin
        elif origin is not None and self.started_from != origin:
            raise CheckpointError(
                f"{ctx.run_dir} has checkpoints of a run that did not begin at {origin}; give another run_name for a "
                "new run, or resume = 'auto' to go on with the one that is there"
            )

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Find out before the first step what the first save would: a disk that refuses, a state that cannot be stored."""
        self._running, self._preempted, self._is_due, self._looks = True, False, False, 0
        if self.best is not None and (ctx.eval_batches == 0 or ctx.config.eval_interval is None):
            lacks = "has no evaluation data" if ctx.eval_batches == 0 else "evaluates never, since eval_interval is false"
            raise DrivetrainError(f"checkpoint tells the best by {self.best}, but the run {lacks}.")
        tree = ctx.state_dict(own=is_divided(ctx))
        changing = [name for event in _BEFORE_THE_STEP for name in ctx.trainer.listeners().get(event, [])]
        self._changes_early = ctx.updates_in_backward or any(name.startswith("optimizer:") for name in changing)
        if is_divided(ctx):
            layout = _layout_of(ctx)
            on_every_rank(ctx, lambda: pack_own(tree, layout))
        self._unlocked = not on_rank_0(ctx, lambda: self._prepare(ctx, tree))
        writes = ctx.is_main or is_divided(ctx)
        self._unprepared = _tensors({**tree, "optimizer": None}) if self.asynchronous and writes and self._comes(ctx) else None

    @hook(tryfirst=True, not_before="_looks")
    def on_step_start(self, ctx: CallbackContext) -> None:
        """Save what an evaluation or a person asked for: nothing has changed since. See whether a save has ended."""
        if self._unlocked:
            self._unlocked = False
            if ctx.config.run_name is not None:  # a run without a name has its directory for itself
                on_rank_0(ctx, lambda: self._tolerating(lambda: self._take_lock(ctx)))
        if self._unprepared is not None and ctx.optimizer.state:  # which the first step has made
            self._staging.prepare([*self._unprepared, *_tensors([*ctx.optimizer.state.values()])])
            self._unprepared = None
        if self._is_due:
            self._save(ctx)
        if self._in_flight is not None:
            if self._changes_early:
                self._in_flight.let_change()
            if ctx.strategy.world_size == 1 and self._in_flight.has_ended:
                self._land(ctx)
        if self._in_flight is None and self._unprepared is None:
            self._looks = _NEVER

    @hook(tryfirst=True, not_before="_looks")
    def on_clipped(self, ctx: CallbackContext) -> None:
        """The optimizer is about to change what a copy may still be made of."""
        if self._in_flight is not None:
            self._in_flight.let_change()

    def on_log(self, ctx: CallbackContext) -> None:
        """Look for a request to save; with several ranks, all of them learn how a save in the background went."""
        flying = self._in_flight
        ended, asked = on_rank_0(ctx, lambda: (flying is not None and flying.has_ended, self._is_asked_for(ctx)))
        if flying is not None and flying.together is not None and not ended:
            ended = flying.together.has_failed(flying.future, ctx.strategy.gather)
        if ended:
            self._land(ctx)
        self._is_due = self._is_due or asked  # saved when the other listeners and the evaluation of this step are through
        self._looks = 0

    @hook(trylast=True)
    def on_every(self, ctx: CallbackContext) -> None:
        """Save: everything else that was due at this step has been done."""
        self._save(ctx)

    @hook(tryfirst=True)
    def on_evaluate_start(self, ctx: CallbackContext) -> None:
        """Others may put averages in the place of the weights now."""
        if self._in_flight is not None:
            self._in_flight.let_change()

    @hook(trylast=True)
    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        """See whether the metric is the best so far. Saving waits until the evaluation has put everything back as it was."""
        if self.best is None or not self._running:
            return
        value = on_rank_0(ctx, lambda: ctx.eval_metrics[self.best or ""] if self._has_metric(ctx) else None)
        if value is not None and self._is_better(value):
            self._best_before = self.best_value, self.best_step
            self.best_value, self.best_step, self._is_due, self._looks = value, ctx.step, True, 0

    def on_preempt(self, ctx: CallbackContext) -> None:
        """Remember to save at the end, whatever the options say: the run is to go on elsewhere."""
        self._preempted = True

    @hook(tryfirst=True)
    def on_run_end(self, ctx: CallbackContext) -> None:
        """Save the end, before other plugins tidy up. Not after an exception: the state may be that of half a step."""
        self._running = False
        try:
            if ctx.exception is not None:
                self._land_alone(ctx)
            else:
                self._finish(ctx)
        finally:
            self._staging = Staging()  # the buffers are as large as the state
            if self._lock is not None:
                self._lock.release()

    # -- saving ----------------------------------------------------------------------------------------------------------

    def _save(self, ctx: CallbackContext, last: bool = False) -> None:
        """Save, unless this very state has been. Rank 0 writes it, or every rank the parts that it has."""
        now = (ctx.step, ctx.skipped_steps)
        if now == self._saved_at and not self._is_due:
            return
        self._land(ctx)  # at most one at a time
        self._is_due, self._looks, self._saved_at, self._versions = False, 0, now, _versions(ctx.model)
        asynchronous = self.asynchronous and not last
        if is_divided(ctx):
            self._in_flight = self._start_together(ctx, asynchronous)
        else:
            tree, begun = ctx.state_dict(), InFlight(ctx.step)

            def start() -> None:
                nonlocal begun
                begun = self._start(ctx, tree, asynchronous)

            on_rank_0(ctx, start)
            self._in_flight = begun
        if not asynchronous:
            self._land(ctx)

    def _start(self, ctx: CallbackContext, tree: Tree, asynchronous: bool) -> InFlight:
        """Write in the background from a copy, or at once from the state itself. What the disk says is heard in `_land`."""
        packed, step = pack(tree), ctx.step
        work = Work(self._store_of(ctx), step, self.keep_last, self.best_step)
        try:
            self._take_lock(ctx)
        except CheckpointError as error:
            if not self._is_tolerated(error):
                raise
            return InFlight(step, None, at_once(partial(_raise, error)))
        if not asynchronous:
            return InFlight(step, None, at_once(partial(work.do, packed)))
        staged = self._staging.copy(packed, _stepped(ctx.optimizer))
        return InFlight(step, staged, in_background(partial(work.do_staged, staged)))

    def _start_together(self, ctx: CallbackContext, asynchronous: bool) -> InFlight:
        """The same on every rank, each with its part of the state. Rank 0 makes the directory."""
        from drivetrain_checkpoint.resharding import Planning
        from drivetrain_checkpoint.together import Together, share_of

        tree, layout, step, rank = ctx.state_dict(own=True), _layout_of(ctx), ctx.step, ctx.strategy.rank
        packed, parts = on_every_rank(ctx, lambda: pack_own(tree, layout))
        self._planning = self._planning or Planning()
        share = self._planning.share(parts, rank, ctx.strategy.gather)
        refused: list[CheckpointError] = []

        def begin() -> Path | None:
            try:
                self._take_lock(ctx)
                return self._store_of(ctx).begin(step)
            except CheckpointError as error:
                if not self._is_tolerated(error):
                    raise
                refused.append(error)
                return None

        directory = on_rank_0(ctx, begin)
        if directory is None:
            return InFlight(step, None, at_once(partial(_raise, refused[0])) if refused else Future())
        store = self._store_of(ctx) if ctx.is_main else Store(directory.parent.parent, self.files, retries=self.retries)
        together = Together(store, directory, step, rank, ctx.strategy.world_size)
        mine = share_of(packed, share, rank)
        work = Work(store, step, self.keep_last, self.best_step, together)
        if not asynchronous:  # in the background all the same: rank 0 waits for the others' parts, and must hear of failures
            return InFlight(step, None, in_background(partial(work.do, mine)), together)
        staged = self._staging.copy(mine, _stepped(ctx.optimizer))
        return InFlight(step, staged, in_background(partial(work.do_staged, staged)), together)

    def _land(self, ctx: CallbackContext) -> None:
        """Wait for the save in flight, and tell everybody; every rank comes here at the same time."""
        flying, self._in_flight = self._in_flight, None
        if flying is not None:
            flying.let_change()
            if flying.together is not None:
                flying.together.agree(flying.future, ctx.strategy.gather)
            self._announce(ctx, flying.step, on_rank_0(ctx, partial(self._judged, flying)))

    def _land_alone(self, ctx: CallbackContext) -> None:
        """The same after a failure, when the other ranks may be gone."""
        flying, self._in_flight = self._in_flight, None
        if flying is not None and ctx.is_main:
            flying.let_change()
            if flying.together is not None:
                flying.together.hurry()
            self._announce(ctx, flying.step, self._judged(flying))

    def _judged(self, flying: InFlight) -> Path | None:
        """The path of a save that has ended; None when it failed and the run is to go on."""
        try:
            saved = flying.future.result()
        except CheckpointError as error:
            if not self._is_tolerated(error):
                raise
            warnings.warn(f"checkpoint: {error} The run goes on without it.", stacklevel=2)
            return None
        if saved.complaint:
            warnings.warn(saved.complaint, stacklevel=2)
        return saved.path

    def _announce(self, ctx: CallbackContext, step: int, path: Path | None) -> None:
        if path is not None:
            ctx.checkpoint_saved(path)
            return
        self._saved_at = None
        if self.best_step == step:  # it is not on the disk; what was the best before is
            self.best_value, self.best_step = self._best_before

    def _finish(self, ctx: CallbackContext) -> None:
        """The end of a run that did not fail. A failed save in the background does not keep the last one from being made."""
        replaced = self._versions != _versions(ctx.model)  # by averages, say: what was saved at this step is not the result
        votes = ctx.strategy.gather((replaced, self._is_due or self._preempted or self.save_at_end))
        wanted = ctx.step > 0 and any(vote for _, vote in votes)
        self._is_due = self._is_due or any(vote for vote, _ in votes)
        try:
            self._land(ctx)
        finally:
            if wanted:
                self._save(ctx, last=True)

    def _comes(self, ctx: CallbackContext) -> bool:
        """Whether the period ends before the run does: a save at the end needs no memory for a copy."""
        try:
            return ctx.position_of(self.every) < ctx.run_length
        except ConfigError:  # another unit: nobody knows
            return True

    def _is_asked_for(self, ctx: CallbackContext) -> bool:
        """Whether somebody put the file SAVE into the run's directory; it is taken away."""
        asked = ctx.trainer.has_run_dir and (ctx.run_dir / SAVE_FILE).is_file()
        if asked:
            (ctx.run_dir / SAVE_FILE).unlink(missing_ok=True)
        return asked

    def _store_of(self, ctx: CallbackContext) -> Store:
        if self._store is None or self._store.run_dir != ctx.run_dir:
            self._store = Store(ctx.run_dir, self.files, self.rejected, self.retries)
        return self._store

    def _is_tolerated(self, error: CheckpointError) -> bool:
        return self.on_error == "warn" and isinstance(error.__cause__, OSError)

    def _tolerating(self, action: Callable[[], None]) -> None:
        """Do something before any save that a disk may refuse."""
        try:
            action()
        except CheckpointError as error:
            if not self._is_tolerated(error):
                raise
            warnings.warn(f"checkpoint: {error}", stacklevel=2)

    # -- the run's directory ---------------------------------------------------------------------------------------------

    def _prepare(self, ctx: CallbackContext, tree: Tree) -> bool:
        """Try what can be tried now; whether the run's directory is there and locked."""
        if not is_divided(ctx):
            pack(tree)
        is_there = ctx.trainer.has_run_dir
        if is_there:
            self._tolerating(lambda: self._take_lock(ctx))
        self._tolerating(lambda: probe(ctx.run_dir if is_there else ctx.config.output_dir, self.files))
        return is_there

    def _take_lock(self, ctx: CallbackContext) -> None:
        """From here on the run's directory is this process's, and what an earlier one left unfinished can go.

        Raises:
            CheckpointError: when another process has it, or had it after this one restored its state.
        """
        if self._lock is not None and self._lock.held:
            return
        self._lock = RunLock(ctx.run_dir)
        self._lock.acquire()
        newer = [c for c in find_checkpoints(ctx.run_dir) if c.step > ctx.step and c.path not in self.rejected]
        if newer:
            self._lock.release()
            raise CheckpointFailure(
                f"{ctx.run_dir} has come further meanwhile, to {newer[0].path.name}: another process was at work. Start again."
            )
        self._store_of(ctx).clean()

    def _best_paths(self, run_dir: Path) -> list[Path]:
        """The best checkpoint in a run's directory: one, or none when the best is elsewhere or gone."""
        return [] if self.best_step is None else [c.path for c in find_checkpoints(run_dir) if c.step == self.best_step][:1]

    def _has_metric(self, ctx: CallbackContext) -> bool:
        """Whether the evaluation gave the metric. One that was never there is a mistake; one that is missing once is not."""
        if self.best in ctx.eval_metrics:
            self.metric_seen = True
            return True
        known = ", ".join(sorted(ctx.eval_metrics)) or "none"
        if not self.metric_seen:
            near = difflib.get_close_matches(str(self.best), list(ctx.eval_metrics), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise CheckpointError(
                f"checkpoint: there is no metric {self.best!r} to tell the best by; the evaluation gives {known}.{hint} "
                "Set 'best' to one of them."
            )
        warnings.warn(f"checkpoint: the evaluation at step {ctx.step} gave no {self.best!r}, only {known}", stacklevel=2)
        return False

    def _is_better(self, value: float) -> bool:
        if math.isnan(value):
            return False
        if self.best_value is None:
            return True
        return value < self.best_value if self.best_mode == "min" else value > self.best_value

    # -- going on --------------------------------------------------------------------------------------------------------

    def _take(self, ctx: CallbackContext, loaded: Loaded) -> None:
        tree = on_every_rank(ctx, lambda: loaded.read(_layout_of(ctx)))
        try:
            ctx.load_state_dict(tree)
        except Exception as error:
            error.add_note(f"while going on from {loaded.path}; to start a new run instead, give another run_name")
            raise
        ctx.checkpoint_path = loaded.path
        self._saved_at, self._versions = (ctx.step, ctx.skipped_steps), _versions(ctx.model)
        if self.best_step is not None and self.started_from is None and not self._best_paths(loaded.path.parent.parent):
            warnings.warn(f"checkpoint: the best checkpoint, of step {self.best_step}, is gone", stacklevel=2)


def _layout_of(ctx: CallbackContext) -> StrategyLayout | None:
    """How the run's tensors are divided; None when every rank has the whole of them."""
    if not is_divided(ctx):
        return None
    from drivetrain_checkpoint.together import StrategyLayout  # needs torch's planners, which take long to import

    return StrategyLayout.of(ctx)


def _stepped(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """What an optimizer's step changes."""
    for group in optimizer.param_groups:
        yield from group["params"]
    for entry in optimizer.state.values():
        yield from (value for value in entry.values() if isinstance(value, Tensor))


def _tensors(tree: Tree) -> list[Tensor]:
    """All tensors of a tree; of divided ones, this rank's part."""
    if isinstance(tree, Tensor):
        return [tree.to_local() if hasattr(tree, "to_local") else tree]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _versions(model: nn.Module) -> int:
    """A number that changes whenever a weight is written to."""
    return sum(parameter._version for parameter in model.parameters())


def _raise(error: Exception) -> NoReturn:
    raise error
