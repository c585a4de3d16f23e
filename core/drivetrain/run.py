"""One run: how its parts are chosen and put together, and what its periodic actions do."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from drivetrain.agenda import Agenda
from drivetrain.agreement import agree, agree_on_parts
from drivetrain.calling import ModelCall
from drivetrain.catalogue import STANDARD_CALLBACKS
from drivetrain.cluster import detect
from drivetrain.compiling import Recompilations
from drivetrain.components import Component, adopt, component, make_component
from drivetrain.config import TrainingConfig
from drivetrain.context import CallbackContext
from drivetrain.data import Source, Split, StreamSource, make_source
from drivetrain.devices import DeviceManager, divide_cores
from drivetrain.duration import Duration
from drivetrain.errors import ConfigError, DataError, DrivetrainError, ModelError, PluginError, Problem
from drivetrain.evaluation import evaluate
from drivetrain.fitting import choose_strategy
from drivetrain.given import Given
from drivetrain.hooks import Events, RunPluginManager, bind, note_of
from drivetrain.loop import Loop
from drivetrain.optim import follow_parameters
from drivetrain.peers import Peer, announce_failures
from drivetrain.precision import Precision
from drivetrain.prepare import build, prepare
from drivetrain.registry import is_installed
from drivetrain.rehearsal import rehearsal
from drivetrain.shrinking import is_out_of_memory
from drivetrain.strategy import Strategy


class Run:
    """The parts of one run. Making it raises for everything that is wrong with them, before any training."""

    def __init__(self, given: Given, ctx: CallbackContext) -> None:
        self.given, self.ctx = given, ctx
        ctx.run = self
        ctx.config = self.config = _with_specs(given)
        ctx.resume = self.config.resume
        if (place := detect()).world_size > 1:
            announce_failures(Peer.here(place.rank))
        self.device_asked = self.config.device if given.device is None else given.device
        self.devices = DeviceManager(str(self.device_asked), place.local_rank)
        divide_cores(place.local_world_size)
        ctx.device = self.devices.device
        self.components = self._components()
        self.pm = RunPluginManager(self.components)
        ctx.strategy = given.strategy or self.pm.choose("make_strategy", ctx) or Strategy()
        ctx.strategy.setup(ctx.device)
        if self.chosen_because:
            ctx.strategy.reason += f"; {ctx.strategy.name}, since {self.chosen_because}"
        agree(ctx, self.components)
        ctx.model = build(given.model, self.pm, ctx)
        ctx.precision = given.precision or self.pm.choose("make_precision", ctx) or Precision()
        self.transfer = None if self.devices.type == "cpu" else self.devices.to
        self.num_workers = self.config.dataloader.num_workers
        self.source = self._train_source()
        self.eval_source = self._eval_source()
        ctx.eval_batches = 0 if self.eval_source is None else self.eval_source.steps_per_epoch
        _set_length(ctx, self.source)
        agree_on_parts(ctx, None if self.source.sample_order is None else len(self.train_data))
        before = dict(ctx.model.named_parameters())
        self.model = prepare(self.pm, ctx)
        self.recompilations = Recompilations() if self.config.compile else None
        ctx.optimizer = self._optimizer(before)
        ctx.precision.attach(ctx.optimizer)
        self._check_scheduler()
        self.metrics = given.compute_metrics or self.pm.choose("make_metrics", ctx)
        self.call = ModelCall(given.loss or self.pm.choose("make_loss", ctx), given.step)
        self.pm.wrap_listeners(ctx)
        self.events = Events(self.pm)
        self.agenda = Agenda(ctx)
        self.losses: list[tuple[int, float]] = []
        self.evaluated_at = -1
        self.loop = Loop(
            ctx,
            self.events,
            self.agenda,
            self.source,
            self.call,
            self._schedule(),
            self.config.max_grad_norm or None,
            self.transfer,
            self.pm.choose("make_gradients_wrapper", ctx),
        )
        self._fill_agenda()

    # -- choosing ----------------------------------------------------------------------------------------------------------

    def _components(self) -> list[Component]:
        """The run's components in the order of their calls: single ones, standard callbacks, the configuration's, the caller's."""
        made = self.config.components(self._replaced())
        self.single = made.single
        self.chosen_because = self._choose_strategy()
        own = [_callback(thing, index) for index, thing in enumerate(self.given.callbacks)]
        standard = []
        if self.config.standard_callbacks:
            taken = {type(c) for c in [*made.callbacks, *own]}
            found = [make_component("callback", name) for name in STANDARD_CALLBACKS if is_installed("callback", name)]
            standard = [c for c in found if type(c) not in taken]
        single = [c for key, c in made.single.items() if key != "eval_data"]
        if isinstance(self.given.scheduler, (LRScheduler, ReduceLROnPlateau)):
            own.append(adopt(_TorchScheduler(scheduler=self.given.scheduler), "scheduler:torch", "torch"))
        return [*single, *standard, *made.callbacks, *own]

    def _choose_strategy(self) -> str:
        """With "auto" and several processes, take the strategy that the model's size asks for; returns why."""
        chosen = self.single.get("distributed")
        if self.config.distributed != "auto" or chosen is None or chosen.plugin_name not in ("strategy:ddp", "strategy:mpi"):
            return ""
        maker, optimizer = self.single.get("model"), self.single.get("optimizer")
        name, why = choose_strategy(
            self.given.model,
            partial(getattr(maker, "make_model", lambda _: None), self.ctx),
            self.devices.total_memory,
            state_8bit=optimizer is not None and optimizer.plugin_name.endswith("8bit"),
            adapters=getattr(self.single.get("training_mode"), "adapters", False),
        )
        if name != "ddp":  # which stands for whatever keeps the whole model on each process
            self.single["distributed"] = make_component("strategy", name, "distributed")
        return why

    def _replaced(self) -> set[str]:
        """The keys of the configuration whose place a ready object takes."""
        given = self.given
        ready_optimizer = isinstance(given.optimizer, torch.optim.Optimizer)
        objects = {
            "model": given.model,
            "data": given.train_dataset,
            "eval_data": given.eval_dataset,
            "precision": given.precision,
            "distributed": given.strategy,
            "optimizer": given.optimizer if ready_optimizer else None,
            "scheduler": given.scheduler if callable(given.scheduler) or hasattr(given.scheduler, "step") else None,
        }
        replaced = {key for key, value in objects.items() if value is not None}
        if ready_optimizer and self.config.scheduler is None:
            replaced.add("scheduler")  # a ready optimizer keeps its own learning rate unless a schedule is asked for
        return replaced

    def choices(self) -> Iterator[tuple[str, Any, str]]:
        """See `Trainer.choices`."""
        ctx, config, configured = self.ctx, self.config, "as configured"
        found = "no accelerator that torch can use" if self.devices.type == "cpu" else f"torch finds {self.devices.name}"
        yield "device", str(ctx.device), found if self.device_asked == "auto" else configured
        yield "distributed", ctx.strategy.name, ctx.strategy.reason
        yield "precision", ctx.precision.name, ctx.precision.reason
        if (optimizer := self.single.get("optimizer")) is not None:
            name = optimizer.plugin_name.partition(":")[2]
            yield "optimizer", name, getattr(optimizer, "reason", "")
            if config.scheduler is None and (scheduler := self.single.get("scheduler")) is not None:
                yield "scheduler", scheduler.plugin_name.partition(":")[2], f"goes with {name}"
        pinned = "batches go to a CUDA GPU" if self.devices.type == "cuda" else "no CUDA GPU"
        yield "dataloader.pin_memory", self._pins_memory, pinned if config.dataloader.pin_memory is None else configured
        if config.global_batch_size is not None:
            count = _accumulation(config, ctx.strategy)
            yield "gradient_accumulation_steps", count, "global_batch_size over per_device_batch_size and processes"

    def _train_source(self) -> Source:
        data = self.given.train_dataset
        if data is None and (maker := self.single.get("data")) is not None:
            data = self._dataset("data", maker)
        if data is None:
            raise ConfigError([Problem("data", "is missing: pass Trainer(..., train_dataset=...), or name a data set")])
        self.train_data = data
        return self._source(data, self.config.per_device_batch_size, _accumulation(self.config, self.ctx.strategy), "train")

    def _eval_source(self) -> Source | None:
        data = self.given.eval_dataset
        if data is None and (maker := self.single.get("eval_data")) is not None:
            data = self._dataset("eval_data", maker)
        if data is None and self.given.train_dataset is None:
            data = _under("data", self.single.get("data"), lambda: self.pm.choose("make_eval_dataset", self.ctx))
        return None if data is None else self.eval_source_of(data)

    def _dataset(self, key: str, maker: Any) -> Any:
        try:
            return _under(key, maker, lambda: maker.make_dataset(self.ctx))
        except Exception as error:
            error.add_note(note_of("make_dataset", maker))
            raise

    @property
    def _pins_memory(self) -> bool:
        asked = self.config.dataloader.pin_memory
        return self.devices.type == "cuda" if asked is None else asked

    def eval_source_of(self, data: Any) -> Source:
        """A source for evaluation: in order, nothing left out, one microbatch at a time."""
        return self._source(data, self.config.per_device_eval_batch_size or self.config.per_device_batch_size, 1, "eval")

    def _source(self, data: Any, batch_size: int, accumulation: int, which: str, num_workers: int | None = None) -> Source:
        loader = copy.copy(self.config.dataloader)
        if which == "eval":
            loader.shuffle = loader.drop_last = False
        else:
            loader.num_workers = self.num_workers if num_workers is None else num_workers
        collate = self.given.data_collator or self.pm.choose("make_collator", self.ctx)
        try:
            return make_source(
                data,
                Split(batch_size, accumulation, self.ctx.strategy.data_rank, self.ctx.strategy.data_ranks),
                seed=self.config.seed,
                loader=loader,
                collate=collate,
                pin=self._pins_memory,
            )
        except DataError as error:
            raise DataError(f"{which} data: {error}") from None

    def _optimizer(self, before: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        given = self.given.optimizer
        if isinstance(given, torch.optim.Optimizer):
            ours = set(before.values())
            if not any(parameter in ours for group in given.param_groups for parameter in group["params"]):
                raise ModelError("the optimizer has no parameter of this model: make it of the model that Trainer is given.")
            follow_parameters(given, before, self.ctx.model)
        made = given if isinstance(given, torch.optim.Optimizer) else self.pm.choose("make_optimizer", self.ctx)
        if made is None:
            raise ConfigError(
                [
                    Problem(
                        "optimizer",
                        "is missing: pass Trainer(..., optimizer=...), or pip install drivetrain-optimizers for adamw",
                    )
                ]
            )
        if not isinstance(made, torch.optim.Optimizer):
            raise PluginError(f"{self.single['optimizer']} made {made!r}, which is no torch.optim.Optimizer")
        return made

    def _check_scheduler(self) -> None:
        """Raise for a torch scheduler that would change nothing."""
        given = self.given.scheduler
        if isinstance(given, (LRScheduler, ReduceLROnPlateau)) and given.optimizer is not self.ctx.optimizer:
            raise DrivetrainError("the scheduler changes another optimizer: make it of the one given as optimizer=...")
        if isinstance(given, ReduceLROnPlateau) and (self.eval_source is None or self.config.eval_interval is None):
            message = "ReduceLROnPlateau looks at eval/loss: give Trainer an eval_dataset, and an eval_interval"
            raise ConfigError([Problem("eval_interval", message)])

    def _schedule(self) -> Callable[[float], float] | None:
        given = self.given.scheduler
        if isinstance(given, (LRScheduler, ReduceLROnPlateau)):
            return None
        if callable(given) and not isinstance(given, Component):
            return given  # type: ignore[no-any-return]
        return self.pm.choose("make_schedule", self.ctx)  # type: ignore[no-any-return]

    # -- trying out --------------------------------------------------------------------------------------------------------

    @contextmanager
    def rehearsal(self, batch_size: int | None = None, num_workers: int | None = None) -> Iterator[Callable[[], Tensor]]:
        """See `CallbackContext.rehearsal`."""
        same = batch_size is None and num_workers is None
        source = self.source if same else self._resized(batch_size, num_workers)
        try:
            with rehearsal(self.ctx, self.loop, source) as step:
                yield step
        finally:
            if not same:
                source.close()

    def resize(self, batch_size: int | None = None, num_workers: int | None = None) -> None:
        """See `CallbackContext.resize`."""
        source = self._resized(batch_size, num_workers)
        if num_workers is not None:
            self.num_workers = num_workers
        self.source.close()
        self.source = self.loop.source = source

    def _resized(self, batch_size: int | None, num_workers: int | None) -> Source:
        size = batch_size or self.source.split.batch_size
        share = self.config.per_device_batch_size * _accumulation(self.config, self.ctx.strategy)
        if isinstance(self.source, StreamSource) or share % size:
            why = "ready batches and streams are read as they are" if share % size == 0 else f"{share} is no multiple of it"
            raise ConfigError([Problem("per_device_batch_size", f"cannot become {size}: {why}")])
        return self._source(self.train_data, size, share // size, "train", num_workers)

    # -- periodic actions --------------------------------------------------------------------------------------------------

    def _fill_agenda(self) -> None:
        # Where the run ends, before the saves that are due there: a checkpoint of the end holds what came of it.
        self.agenda.add(self.config.log_interval, self.log, at_end=True)
        if self.config.eval_interval is not None and self.eval_source is not None:
            self.agenda.add(self.config.eval_interval, self.evaluate_as_planned, at_end=True)
        for _, thing in self.pm.listeners("on_every"):
            every = getattr(thing, "every", None)
            if every is None:  # the component chose not to be called
                continue
            notify = bind(self.pm, "on_every", only=thing)
            assert notify is not None
            self.agenda.add(_period(every, thing), partial(notify, self.ctx))

    def log(self) -> None:
        """Read what has gathered since the last log from the device, in one go, and tell the listeners."""
        ctx, pending = self.ctx, self.ctx._pending
        if self.recompilations is not None:
            self.recompilations.warn()
        if not self.loop.losses and not pending:
            return
        values: dict[str, Any] = {}
        if self.loop.losses:
            values = {"train/loss": self.loop.take_loss(), "train/lr": ctx.lr}
        if ctx.grad_norm is not None:
            values["train/grad_norm"] = ctx.grad_norm
        if "train/loss" in values and ctx.strategy.world_size > 1:
            values["train/loss"] = ctx.strategy.sum(values["train/loss"]) / ctx.strategy.world_size
        ctx.metrics = read(values | pending)
        ctx._pending = {}
        if "train/loss" in ctx.metrics:
            self.losses.append((ctx.step, ctx.metrics["train/loss"]))
        if self.events.log is not None:
            self.events.log(ctx)
        ctx.last_logged, ctx.shown = ctx.metrics, []
        if ctx._back_to is not None:
            self._go_back(ctx._back_to)

    def _go_back(self, saved: Mapping[str, Any]) -> None:
        """Go on from an earlier state, unless somebody has stopped the run; the loop opens the data anew."""
        ctx, seconds, resumed = self.ctx, self.ctx.seconds, self.ctx.resumed
        ctx._back_to = None
        if ctx.stop_reason is not None and not ctx.at_end:
            return
        ctx.load_state_dict(saved)
        ctx.seconds, ctx.resumed = seconds, resumed  # the time is spent
        assert self.loop.on_resume is not None
        self.loop.on_resume()  # for whatever else is due now; the loop does it once more when the data is open
        self.losses = [(step, loss) for step, loss in self.losses if step <= ctx.step]
        if self.losses and self.losses[-1][0] == ctx.step:  # saved just before a log that has been made since
            self.loop.losses = []
        ctx.stop_reason, ctx.at_end = None, False
        self.agenda.replan()

    def evaluate(self, source: Source | None = None) -> dict[str, float]:
        """Evaluate now and tell the listeners."""
        chosen = source or self.eval_source
        if chosen is None:
            raise DataError("there is nothing to evaluate on: pass Trainer(..., eval_dataset=...) or evaluate(dataset).")
        try:
            return evaluate(self.ctx, self.events, chosen, self.call, self.metrics, self.transfer)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                size = self.config.per_device_eval_batch_size or self.config.per_device_batch_size
                error.add_note(f"Out of memory in the evaluation: set per_device_eval_batch_size to less than {size}.")
            raise

    def evaluate_as_planned(self) -> None:
        """Evaluate on the run's evaluation data, if there is some."""
        if self.eval_source is None:
            return
        self.evaluate()
        if isinstance(self.given.scheduler, ReduceLROnPlateau):
            self.given.scheduler.step(self.ctx.eval_metrics["eval/loss"])
        self.evaluated_at = self.ctx.step  # when it is complete: one that was interrupted is made up for

    def finish(self) -> bool:
        """At a regular end: log and evaluate what is left over, by a stop or by an earlier process that was interrupted in it.

        False when that made the run go back.
        """
        self.log()
        if self.ctx.stop_reason is None:
            return False
        wanted = self.config.eval_interval is not None and self.eval_source is not None
        if wanted and self.evaluated_at != self.ctx.step and self.ctx.step > 0:
            self.evaluate_as_planned()
        return True

    def close(self) -> None:
        """End what a sitting has started: worker processes and the strategy's connections."""
        for source in (self.source, self.eval_source):
            if source is not None:
                source.close()
        self.ctx.strategy.teardown()

    def position_of(self, length: Duration | str | float) -> float:
        """A length of training in the run's unit; see `CallbackContext.position_of`."""
        ctx = self.ctx
        if not isinstance(length, (Duration, str)):
            return float(length) * ctx.run_length if length else 0.0
        wanted = Duration.parse(length)
        if wanted.unit == "%":
            return ctx.run_length * wanted.value / 100
        if wanted.unit == ctx.run_unit:
            return wanted.value
        if wanted.unit == "ep" and ctx.run_unit == "st" and ctx.steps_per_epoch:
            return wanted.value * ctx.steps_per_epoch
        if wanted.unit == "sp" and ctx.run_unit == "st" and self.source.samples_per_step:
            return wanted.value / self.source.samples_per_step
        unit = Duration(1, ctx.run_unit).unit_name
        raise ConfigError(
            [
                Problem(
                    "max_duration",
                    f"the run is measured in {unit}, so {wanted} cannot be placed in it; give {unit} or a percentage",
                )
            ]
        )


@component
class _TorchScheduler(Component):
    """A ready torch scheduler: stepped after each optimizer step. A plateau scheduler is, by the run, after each planned evaluation: one
    that somebody asks for, perhaps on other data, changes nothing of the training."""

    scheduler: Any

    def on_step_end(self, ctx: CallbackContext) -> None:
        if not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return dict(self.scheduler.state_dict())

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.scheduler.load_state_dict(dict(saved))


def read(values: Mapping[str, Any]) -> dict[str, float]:
    """Values as floats in the same order; all tensors of a device are read from it in one transfer."""
    places: dict[torch.device, dict[str, Tensor]] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            places.setdefault(value.device, {})[name] = value.detach().float().reshape(())
    host: dict[str, float] = {}
    for tensors in places.values():
        host |= zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True)
    return {name: host[name] if name in host else float(value) for name, value in values.items()}


def _with_specs(given: Given) -> TrainingConfig:
    """The configuration with the components that were given by name as arguments."""
    config = copy.copy(given.args)
    for key, value in (("optimizer", given.optimizer), ("scheduler", given.scheduler)):
        if isinstance(value, (str, Mapping, Component)):
            setattr(config, key, value)
    config.check()
    return config


def _under(key: str, thing: Component | None, make: Callable[[], Any]) -> Any:
    """What a component makes; problems that it finds with its options then get the place of the component."""
    try:
        return make()
    except ConfigError as error:
        place = key if thing is None else f"{key}.{thing.plugin_name.partition(':')[2]}"
        raise ConfigError([problem.under(place) for problem in error.problems]) from error


def _callback(thing: Any, index: int) -> Component:
    if isinstance(thing, type):
        raise PluginError(f"callbacks[{index}] is the class {thing.__name__}; give an instance: {thing.__name__}()")
    return make_component("callback", thing, f"callbacks[{index}]")


def _accumulation(config: TrainingConfig, strategy: Strategy) -> int:
    """Microbatches in one step of this process."""
    if config.global_batch_size is None:
        return config.gradient_accumulation_steps
    per_round = config.per_device_batch_size * strategy.data_ranks
    if config.global_batch_size % per_round:
        raise ConfigError(
            [
                Problem(
                    "global_batch_size",
                    f"{config.global_batch_size} is no multiple of per_device_batch_size × processes = "
                    f"{config.per_device_batch_size} × {strategy.data_ranks} = {per_round}",
                )
            ]
        )
    return config.global_batch_size // per_round


def _set_length(ctx: CallbackContext, source: Source) -> None:
    """Express `max_duration` in steps when they can be known ahead, else in its own unit."""
    wanted = ctx.config.max_duration
    ctx.steps_per_epoch = source.steps_per_epoch
    ctx.run_unit, ctx.run_length = wanted.unit, wanted.value
    if wanted.unit == "ep" and source.steps_per_epoch is None and wanted.value % 1:
        message = f"{wanted} has a part of an epoch, and how long one is this data does not say: give whole epochs, or steps"
        raise ConfigError([Problem("max_duration", message)])
    if wanted.unit == "ep" and source.steps_per_epoch is not None:
        ctx.run_unit, ctx.run_length = "st", math.ceil(wanted.value * source.steps_per_epoch - 1e-9)


def _period(every: Any, thing: Component) -> Duration:
    try:
        return Duration.parse(every)
    except ValueError as error:
        raise ConfigError([Problem(f"{thing.plugin_name}.every", str(error))]) from None
