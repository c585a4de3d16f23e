"""`Trainer`: the public face of one run."""

from __future__ import annotations

import atexit
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drivetrain.calling import LossFunction, StepFunction
from drivetrain.config import TrainingConfig
from drivetrain.context import CallbackContext
from drivetrain.errors import ConfigError, DrivetrainError, PluginError, Problem
from drivetrain.evaluation import Metrics
from drivetrain.given import Given
from drivetrain.hooks import Event
from drivetrain.manifest import Change, compare, describe
from drivetrain.output import Step, TrainOutput
from drivetrain.precision import Precision
from drivetrain.registry import load, naming
from drivetrain.rng import Turn, in_turns, mix, random_state, seed_all, set_random_state
from drivetrain.run import Run
from drivetrain.strategy import Strategy

_PARTS = ("progress", "model", "optimizer", "precision", "components", "rng", "unlogged", "manifest")
_KERNELS = ("fused", "foreach", "capturable")  # options of torch's optimizers that only say how they compute
_COUNTERS = ("step", "epoch", "step_in_epoch", "samples", "tokens", "skipped_steps", "microbatch_parts")


class Trainer:
    """Train a model.

    Args:
        model: any `nn.Module`; None builds the one that the configuration names.
        args: the configuration; None for the defaults.
        train_dataset: a map-style data set, an iterable of samples, or a DataLoader, whose batches are taken as they are.
        eval_dataset: the same for evaluation.
        callbacks: callback objects, after those of the configuration.
        loss: `loss(outputs, targets)` for batches that are pairs, `loss(outputs, batch)` otherwise; not needed when the model
            returns its loss (a scalar tensor, `Loss`, `["loss"]` or `.loss`).
        optimizer: a ready torch optimizer, or what the configuration's `optimizer` takes.
        scheduler: a torch scheduler (ReduceLROnPlateau follows the evaluations of `eval_interval`), a function from the position to the
            learning rate's factor, or what `scheduler` takes.
        step: `step(model, batch) -> loss` in place of all that, for batches of any form.
        data_collator: joins a list of samples to a batch.
        compute_metrics: `metrics(outputs, batch)` that returns means or `Loss(total, weight)` by name, averaged over the
            evaluation as it goes; or a mapping of names to objects with `update`, `compute` and `reset` (torchmetrics).
        precision: a ready `Precision` in place of the configuration's.
        strategy: a ready `Strategy` in place of the configuration's.
        device: a torch device or its name in place of the configuration's.

    Raises:
        DrivetrainError: for everything that is wrong with the configuration, the data or the parts, before any training.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        callbacks: Iterable[Any] = (),
        loss: LossFunction | None = None,
        optimizer: Any = None,
        scheduler: Any = None,
        step: StepFunction | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        compute_metrics: Metrics = None,
        precision: Precision | None = None,
        strategy: Strategy | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        given = Given(
            model=model,
            args=TrainingConfig() if args is None else args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            loss=loss,
            step=step,
            optimizer=optimizer,
            scheduler=scheduler,
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            precision=precision,
            strategy=strategy,
            device=device,
        )
        self._run_dir: Path | None = None
        self._started: float | None = None
        self._rng: Mapping[str, Any] | None = None  # of the end of the last sitting in this process
        self._saved_rng: list[Mapping[str, Any]] = []  # of all that share no data, as it was loaded
        self._description: dict[str, Any] | None = None
        self._restored = False
        self.resume_changes: list[Change] = []  # what differs from the run as it was saved, once a state has been restored
        self._interrupt: KeyboardInterrupt | None = None
        self.ctx = CallbackContext(self)
        with _judged(self.ctx), naming(given.args.plugins):
            self._run = Run(given, self.ctx)
        self._turn = Turn(self.ctx.device)

    # -- training ----------------------------------------------------------------------------------------------------------

    def train(self, resume: str | Path | None = None) -> TrainOutput:
        """Train to the end.

        Ctrl-C ends the run in good order, and the output says so; without a signal handler of the program's that calls `stop`, it
        may come in the middle of a step, whose state is no state to save. A second one is raised.

        Args:
            resume: "auto", "never" or a path, in place of the configuration's `resume`.
        """
        try:
            for _ in self.steps(resume):
                pass
        except KeyboardInterrupt as error:
            if error is not self._interrupt:
                raise
        return self.output

    def steps(self, resume: str | Path | None = None) -> Iterator[Step]:
        """Train, giving each finished step to the caller's own loop. Leaving that loop ends the run in good order, and so does
        Ctrl-C, which is raised then.

        Several trainers of one process may be at it at the same time, in threads or in turn: each step is one run's alone, so that
        all end as if they were the only one. Data that one of them waits for must not come from another's step. Code outside of
        runs that draws from the global generators meanwhile (a new model's weights) draws from the numbers of the run that has them.
        """
        steps = in_turns(self._turn, self._sitting(resume))
        close = partial(_close, weakref.ref(steps))  # a loop that was left lives as long as the caller keeps its iterator
        atexit.register(close)
        weakref.finalize(steps, atexit.unregister, close).atexit = False
        return steps

    def _sitting(self, resume: str | Path | None) -> Generator[Step, None, None]:
        ctx, run = self.ctx, self._run
        if self._started is not None:
            raise DrivetrainError("this trainer is training already; finish or leave the other loop first.")
        ctx.resume = ctx.resume if resume is None else str(resume)
        # Only in a second sitting in this process: before the first one a stop may have been asked for already.
        if self._rng is not None:
            ctx.stop_reason, ctx.stop_wanted, ctx.exception, ctx.interrupted, ctx.at_end = None, None, None, False, False
        callers_rng = random_state(ctx.device)
        self._started = time.monotonic()
        try:
            self._start()
            yield from run.loop.steps()
            while not self._stopped_early:
                if run.finish():
                    break
                yield from run.loop.steps()
            if self._stopped_early and run.events.preempt is not None:
                run.events.preempt(ctx)
        except GeneratorExit:
            self.stop("the caller left the loop")
            ctx.stop_reason = ctx.stop_wanted
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and ctx.strategy.world_size == 1:  # else the others are in other lines
                self._interrupted(error)
                raise
            cause = ctx.strategy.judge(error)
            self._failed(cause)
            if cause is error:
                raise
            raise cause from error
        finally:
            self._end(callers_rng)

    def evaluate(self, dataset: Any = None) -> dict[str, float]:
        """Evaluate on the evaluation data, or on `dataset`: every sample once, means weighted exactly.

        Returns:
            "eval/loss" and "eval/NAME" for each metric.
        """
        run = self._run
        source = run.eval_source if dataset is None else run.eval_source_of(dataset)
        try:
            return run.evaluate(source)
        finally:
            # The worker processes of the run's own data serve its next evaluation, until the sitting ends.
            if source is not None and (dataset is not None or self._started is None):
                source.close()

    def restore(self, resume: str | Path | None = None) -> int:
        """Load the state that `resume` names without training, to evaluate or export what a run has learned.

        Args:
            resume: "auto" or a path, in place of the configuration's `resume`.

        Returns:
            The step at which that state was saved; 0 when there was none.
        """
        self.ctx.resume = self.ctx.resume if resume is None else str(resume)
        self._restore()
        return self.ctx.step

    def stop(self, reason: str) -> None:
        """Interrupt the run after the current step. May be called from a signal handler or another thread."""
        if self.ctx.stop_reason is None:  # what all have agreed upon stays
            self.ctx.interrupted = True
        self.ctx.stop(reason)

    # -- results and parts -------------------------------------------------------------------------------------------------

    @property
    def output(self) -> TrainOutput:
        """What the run has given so far."""
        ctx = self.ctx
        return TrainOutput(
            steps=ctx.step,
            losses=list(self._run.losses),
            metrics={**ctx.last_logged, **ctx.eval_metrics},
            stop_reason=ctx.stop_reason or "not finished",
            completed=ctx.stop_reason is not None and not self._stopped_early and ctx.exception is None,
            seconds=self.elapsed,
            run_dir=self._run_dir,
            checkpoint=ctx.checkpoint_path,
        )

    @property
    def _stopped_early(self) -> bool:
        """Whether an interruption ended the run; one that comes when the end has been reached changes nothing."""
        ctx = self.ctx
        return ctx.interrupted and ctx.stop_reason is not None and not ctx.at_end

    @property
    def config(self) -> TrainingConfig:
        """The run's configuration."""
        return self.ctx.config

    @property
    def model(self) -> nn.Module:
        """The prepared model, without the strategy's wrapper."""
        return self._run.model

    @property
    def elapsed(self) -> float:
        """Seconds of training, all sittings together."""
        return self.ctx.seconds + (0.0 if self._started is None else time.monotonic() - self._started)

    @property
    def has_run_dir(self) -> bool:
        """Whether the run's directory exists, without making it."""
        return self._run_dir is not None or (self.config.run_name is not None and self._named_dir().is_dir())

    @property
    def run_dir(self) -> Path:
        """The run's directory, made now if it does not exist. Without a `run_name` each run gets a new one."""
        if self._run_dir is None:
            if self.config.run_name is None:
                self.config.run_name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
            path = self._named_dir()
            with self._blaming_output_dir():
                path.mkdir(parents=True, exist_ok=True)
            self._run_dir = path
        return self._run_dir

    def _named_dir(self) -> Path:
        return self.config.output_dir / str(self.config.run_name)

    @contextmanager
    def _blaming_output_dir(self) -> Iterator[None]:
        """Name the key and the remedy when the run's directory, or a file in it, cannot be made."""
        try:
            yield
        except OSError as error:
            path = self._named_dir()
            run_dir, file = Path(os.path.abspath(path)), Path(os.path.abspath(os.fsdecode(error.filename or "/")))
            if error.filename is None or not (file.is_relative_to(run_dir) or run_dir.is_relative_to(file)):
                raise
            what = f"written to ({file.name})" if file.is_relative_to(run_dir) and file != run_dir else "made"
            message = f"the run directory {path} cannot be {what}: {error.strerror}. Choose another output_dir."
            raise ConfigError([Problem("output_dir", message)]) from error

    def plan(self, ranks: int | None = None, device: str = "auto", **options: Any) -> Any:
        """Memory, time and cost of this run on `ranks` devices, without running it: a `drivetrain_plan.Plan`.

        Args:
            ranks: processes, one for each device; by default one, or with `sweep=True` all that can be tried.
            device: the name of a device's profile ("h100"), or a TOML file.
            options: `price`, of a device for an hour; `sweep=True` for a `drivetrain_plan.Sweep` of other ways to run it.

        Raises:
            PluginError: when drivetrain-plan is not installed.
        """
        command: Any = load("command", "plan")
        return command.plan(self, ranks=ranks, device=device, **options)

    def choices(self) -> list[tuple[str, Any, str]]:
        """What was left to the engine ("auto", or no value): the key, what this machine and model made of it, and why."""
        return list(self._run.choices())

    def plugins(self) -> list[str]:
        """The names of the run's components, in the order of their calls."""
        return [thing.plugin_name for thing in self._run.components]

    def listeners(self) -> dict[str, list[str]]:
        """For each event that somebody listens to, who does, in the order of the calls."""
        from drivetrain.hookspecs import EVENTS

        found = {event: [thing.plugin_name for _, thing in self._run.pm.listeners(event)] for event in EVENTS}
        return {event: names for event, names in found.items() if names}

    # -- state -------------------------------------------------------------------------------------------------------------

    def state_dict(self, *, own: bool = False) -> dict[str, Any]:
        """Everything the run needs to go on exactly: a tree of dicts, lists, tuples, numbers, texts and tensors.

        The tensors are the live ones: copy them before the next step, or write them out at once.

        Args:
            own: of sharded weights and their optimizer's state, this process's part instead of the whole on rank 0.
        """
        ctx, strategy = self.ctx, self.ctx.strategy
        each = strategy.gather((self._random(), self._run.loop.unlogged()))
        each = each[
            :: strategy.world_size // strategy.data_ranks
        ]  # those that share data share their random numbers and losses
        if own:
            model, optimizer = strategy.own_state(ctx.model, ctx.optimizer)
        else:
            model, optimizer = strategy.model_state(ctx.model), strategy.optimizer_state(ctx.model, ctx.optimizer)
        return {
            "progress": {name: getattr(ctx, name) for name in _COUNTERS} | self._results(),
            "model": model,
            "optimizer": optimizer,
            "precision": ctx.precision.state_dict(),
            "components": {thing.plugin_name: state for thing in self._run.components if (state := thing.state_dict())},
            "rng": [random for random, _ in each],
            "unlogged": [unlogged for _, unlogged in each],
            "manifest": self.manifest,
        }

    def _results(self) -> dict[str, Any]:
        values = {"logged": self.ctx.last_logged, "eval": self.ctx.eval_metrics}
        plain = {what: {name: float(value) for name, value in table.items()} for what, table in values.items()}
        return {"seconds": self.elapsed, "evaluated_at": self._run.evaluated_at, "metrics": plain}

    @property
    def manifest(self) -> dict[str, Any]:
        """What this run is made of, as plain data; see `drivetrain.manifest`."""
        if self._description is None:
            self._description = describe(self.ctx)
        return self._description

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, to the same model, optimizer and components.

        Raises:
            DrivetrainError: when a part is missing or does not fit, or when the run is no longer what it was and
                `resume_changed` does not allow that; nothing is skipped silently.
        """
        ctx, run = self.ctx, self._run
        if missing := set(_PARTS) - set(saved):
            raise DrivetrainError(f"the saved state lacks {', '.join(sorted(missing))}; it was not made by Trainer.state_dict.")
        changes = compare(saved["manifest"], self.manifest)
        self._judge(changes)
        self.resume_changes = changes
        chosen_keys = set(ctx.optimizer.defaults) - {"params"}  # other entries of a group are the optimizer's running values
        options = [{k: v for k, v in group.items() if k in chosen_keys} for group in ctx.optimizer.param_groups]
        self._load_components(saved["components"])
        try:
            ctx.strategy.load_model_state(ctx.model, saved["model"])
        except (RuntimeError, KeyError) as error:
            raise DrivetrainError(f"the saved weights do not fit the model: {error}") from error
        try:
            with ctx.optimizer.register_load_state_dict_pre_hook(_keep_kernels):
                ctx.strategy.load_optimizer_state(ctx.model, ctx.optimizer, saved["optimizer"])
        except (ValueError, KeyError) as error:
            raise DrivetrainError(f"the saved optimizer state does not fit {type(ctx.optimizer).__name__}: {error}") from error
        if any(change.key.startswith("optimizer") and change.verdict == "refuse" for change in changes):
            for group, chosen in zip(ctx.optimizer.param_groups, options, strict=True):
                group.update(chosen)  # allowed by `_judge`: the options that this run asks for, not the saved ones
        ctx.precision.load_state_dict(saved["precision"])
        self._load_progress(saved["progress"])
        if len(saved["unlogged"]) == ctx.strategy.data_ranks:  # else their means are of other samples: the next log begins anew
            run.loop.load_unlogged(saved["unlogged"][ctx.strategy.data_rank])
        # Opening the data draws random numbers; the model's must go on from where they were when the state was saved.
        self._saved_rng = saved["rng"]
        run.loop.on_resume = self._restore_rng
        self._restored = ctx.resumed = True

    def _load_progress(self, saved: Mapping[str, Any]) -> None:
        ctx, metrics = self.ctx, saved["metrics"]
        for name in _COUNTERS:
            setattr(ctx, name, saved[name])
        if ctx.strategy.world_size > 1:  # ranks whose microbatches are of unequal sizes could get unequal numbers of parts
            ctx.microbatch_parts = 1
        ctx.seconds, ctx.agreed_seconds = saved["seconds"] - (self.elapsed - ctx.seconds), saved["seconds"]
        ctx.last_logged, ctx.eval_metrics = dict(metrics["logged"]), dict(metrics["eval"])
        self._run.evaluated_at = saved["evaluated_at"]

    def _judge(self, changes: list[Change]) -> None:
        """Refuse what would not fit the run's beginning, unless it is wanted; warn of what may matter."""
        refused = [change for change in changes if change.verdict == "refuse"]
        if refused and self.config.resume_changed == "refuse":
            listed = "".join(f"\n  {change}" for change in refused)
            raise DrivetrainError(
                f"the run was begun otherwise than it would go on:{listed}\nPut that back, or give another run_name for a new "
                'run, or say that the change is wanted: resume_changed = "allow" (resume_changed=allow on the command line).'
            )
        said = [change for change in changes if change.verdict != "safe"]
        if said and self.ctx.is_main:
            listed = "".join(f"\n  {change}" for change in said)
            warnings.warn(f"the run goes on with changes:{listed}", stacklevel=2)

    def _random(self) -> Mapping[str, Any]:
        """The random state that this run goes on with, whoever has the generators now."""
        ctx, saved = self.ctx, self._saved_rng
        if self._run.loop.on_resume is not None and len(saved) == ctx.strategy.data_ranks:  # loaded, and not put back yet
            return saved[ctx.strategy.data_rank]
        if self._started is None:
            return random_state(ctx.device) if self._rng is None else self._rng
        with self._turn:
            return random_state(ctx.device)

    def _restore_rng(self) -> None:
        """Put back this rank's random state; for another number of ranks there is none, and each gets a new one."""
        rank, ranks, saved = self.ctx.strategy.data_rank, self.ctx.strategy.data_ranks, self._saved_rng
        if len(saved) == ranks:
            set_random_state(saved[rank], self.ctx.device)
            return
        seed_all(mix(self.config.seed, rank, self.ctx.step), self.ctx.device)
        warnings.warn(
            f"the state was saved by {len(saved)} processes and goes on with {ranks}: same samples in the same steps, but "
            "new random numbers for dropout and the like.",
            stacklevel=2,
        )

    def _load_components(self, saved: Mapping[str, Any]) -> None:
        present = {thing.plugin_name: thing for thing in self._run.components}
        expected = {name for name, thing in present.items() if thing.state_dict()}
        for name in sorted(set(saved) - expected):
            warnings.warn(f"{name} had state when the run was saved and takes no part now; its state is dropped.", stacklevel=2)
        for name in sorted(expected - set(saved)):
            warnings.warn(f"{name} took no part when the run was saved; it starts afresh.", stacklevel=2)
        for name, state in saved.items():
            if name not in expected:
                continue
            try:
                present[name].load_state_dict(state)
            except Exception as error:
                error.add_note(f"raised in load_state_dict of {name} ({present[name].origin})")
                raise

    # -- start and end -----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        ctx, run = self.ctx, self._run
        run.loop.is_whole = False
        run.loop.break_off()
        if self._rng is not None:  # a second sitting in this process
            set_random_state(self._rng, ctx.device)
        else:
            seed_all(mix(ctx.config.seed, ctx.strategy.data_rank), ctx.device)
            self._restore()
        if not ctx.model.training:
            ctx.model.train()
        if run.events.run_start is not None:
            with self._blaming_output_dir():
                run.events.run_start(ctx)
        run.agenda.replan()
        if ctx.config.eval_at_start and ctx.config.eval_interval is not None and ctx.step == 0:
            run.evaluate_as_planned()

    def _restore(self) -> None:
        ctx = self.ctx
        _ = self.manifest  # of the parts as they were put together: a schedule changes an optimizer's options
        if self._run.events.restore is not None:
            self._run.events.restore(ctx)
        if not self._restored and ctx.resume not in ("auto", "never"):
            raise PluginError(
                f"resume names {ctx.resume!r}, but no active plugin restored it. Add the checkpoint callback "
                "(pip install drivetrain-checkpoint)."
            )

    def _interrupted(self, error: KeyboardInterrupt) -> None:
        """Ctrl-C, at any line. Between two steps what there is can be saved; in the middle of one it is half of the next state."""
        ctx, run = self.ctx, self._run
        self._interrupt = error
        self.stop("interrupted by Ctrl-C")
        if ctx.stop_reason is None or ctx.at_end:  # at the end it has come into the last log or evaluation
            ctx.stop_reason = "interrupted by Ctrl-C"
        ctx.interrupted, ctx.at_end = True, False
        if not run.loop.is_whole:
            self._break_off(error)
        elif run.events.preempt is not None:
            run.events.preempt(ctx)

    def _failed(self, error: BaseException) -> None:
        self.ctx.stop_reason = f"{type(error).__name__}: {error}"
        self._break_off(error)

    def _break_off(self, error: BaseException) -> None:
        """Drop the step and tell the listeners; what they raise is noted on the original error, which stays the one reported."""
        self.ctx.exception = error
        _quietly(lambda _: self._run.loop.break_off(), self.ctx, error)
        _quietly(self._run.events.exception, self.ctx, error)

    def _end(self, callers_rng: Mapping[str, Any]) -> None:
        ctx, run = self.ctx, self._run
        try:
            if ctx.exception is not None:
                _quietly(run.events.run_end, ctx, ctx.exception)
            elif run.events.run_end is not None:
                with _judged(ctx):
                    run.events.run_end(ctx)
        finally:
            self._rng = random_state(ctx.device)
            ctx.seconds, self._started = self.elapsed, None
            if not sys.is_finalizing():  # a loop left unfinished at the end of the process
                set_random_state(callers_rng, ctx.device)
            run.close()

    def __repr__(self) -> str:
        return f"Trainer({type(self.model).__name__}, step={self.ctx.step}, device={self.ctx.device})"


def _close(steps: weakref.ref[Generator[Step, None, None]]) -> None:
    """End a run whose loop was left, while the interpreter is whole."""
    if (running := steps()) is not None:
        running.close()


def _keep_kernels(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """A saved optimizer's state with this one's choice of kernels: what was right on that machine may be wrong on this one.

    Put in before it is loaded, since torch keeps the count of steps where they need it.
    """
    groups = [dict(group) for group in saved["param_groups"]]
    for group, mine in zip(groups, optimizer.param_groups, strict=False):  # torch says it if their number is another
        group |= {name: mine[name] for name in _KERNELS if name in group and name in mine}
    return {**saved, "param_groups": groups}


@contextmanager
def _judged(ctx: CallbackContext) -> Iterator[None]:
    """Let the strategy say which process is at fault; before there is one, processes know nothing of each other."""
    try:
        yield
    except Exception as error:
        strategy: Strategy | None = getattr(ctx, "strategy", None)
        cause = error if strategy is None else strategy.judge(error)
        if cause is error:
            raise
        raise cause from error


def _quietly(event: Event | None, ctx: CallbackContext, original: BaseException) -> None:
    if event is None:
        return
    try:
        event(ctx)
    except Exception as error:
        notes = "; ".join(getattr(error, "__notes__", ()))
        original.add_note(f"after that, {type(error).__name__}: {error} ({notes})")
