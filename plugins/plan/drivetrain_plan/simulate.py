"""One training step of a run in a world that is not there: the run's own trainer, with the run's own preparation."""

from __future__ import annotations

import copy
import gc
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from attrs import define, field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from drivetrain import (
    Callback,
    CallbackContext,
    Component,
    Precision,
    Trainer,
    TrainingConfig,
    component,
    is_installed,
    make_component,
)
from drivetrain import state as kept
from drivetrain_plan.recorder import ACTIVATIONS, TEMPORARY, UNREDUCED, Collective, Operation, Recorder
from drivetrain_plan.world import meeting, of_memory, real, simulated

PARAMETERS, GRADIENTS, STATE, BUFFERS, BATCH = "parameters", "gradients", "optimizer state", "buffers", "batch"
_STEPS = 2  # where the optimizer's state cannot be made ahead, the first does it; the second is like all others
_MOST_MICROBATCHES = 2  # the last one reduces gradients, all before it are alike
_LOOKED_AT = 64  # samples of which the longest stands for all
_OFFLOADED = (PARAMETERS, GRADIENTS, STATE)  # what FSDP's `cpu_offload` keeps in host memory


class Change(NamedTuple):
    """Memory taken (or given back) at one moment of the step."""

    kind: str
    phase: str
    size: int  # bytes; negative when given back


@define
class Simulation:
    """What one rank of a run holds and does in a step.

    Attributes:
        at_peak: bytes by kind at the moment of the peak.
        largest: the most bytes of each kind at any moment of the step.
        host: bytes by kind that are kept in host memory (FSDP's `cpu_offload`), the most at any moment; not in `at_peak`.
        trace: every change of the device's memory in the step, in order; first what was there at its beginning.
        operations, collectives: how often in a step of `microbatches` microbatches.
        held: bytes that the first forward of a step leaves for its backward, gathered parameters and the batch included.
        whole: bytes of the whole model and optimizer state as a checkpoint holds them.
        samples, eval_samples: in the data sets; None when they do not say, or there is nothing to evaluate on.
        reason: why this strategy, as the engine says it.
        tokens, samples_per_microbatch: of one microbatch of one rank; tokens are 0 when batches have none.
        problems: what could not be simulated.
    """

    ranks: int
    data_ranks: int = 1
    strategy: str = "single"
    precision: str = "fp32"
    parameters: int = 0
    trainable: int = 0
    at_peak: dict[str, int] = field(factory=dict)
    largest: dict[str, int] = field(factory=dict)
    host: dict[str, int] = field(factory=dict)
    trace: list[Change] = field(factory=list, repr=False)
    operations: Counter[Operation] = field(factory=Counter)
    collectives: Counter[Collective] = field(factory=Counter)
    microbatches: int = 1
    accumulation: int = 1
    held: int = 0
    whole: int = 0
    samples: int | None = None
    eval_samples: int | None = None
    reason: str = ""
    samples_per_microbatch: int = 0
    tokens: int = 0
    complete: bool = True
    problems: list[str] = field(factory=list)
    seconds: float = 0.0

    @property
    def peak(self) -> int:
        """Bytes of this rank at the peak."""
        return sum(self.at_peak.values())


@component
class Watcher(Callback):
    """Tells the recorder which phase of the step it is, and what memory is for."""

    recorder: Any = kept(default=None)
    base: int = kept(default=0)
    held: int | None = kept(default=None)

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Everything is prepared."""
        self._parameters = [p for group in ctx.optimizer.param_groups for p in group["params"]]
        self.recorder.tag(list(ctx.model.parameters()), PARAMETERS)
        self.recorder.tag(list(ctx.model.buffers()), BUFFERS)
        self.recorder.tag([dict(entries) for entries in ctx.optimizer.state.values()], STATE)

    def on_step_start(self, ctx: CallbackContext) -> None:
        """A new step: forget the one before."""
        self.recorder.clear()
        self.base, self.held = sum(change for _, change, _ in self.recorder.events), None

    def on_batch(self, ctx: CallbackContext) -> None:
        """What comes from a data set has memory; the model gets tensors without."""
        ctx.batch = pytree.tree_map(lambda x: torch.empty_like(x) if isinstance(x, Tensor) else x, _plain(ctx.batch))
        self.recorder.tag(ctx.batch, BATCH)
        self.recorder.phase = f"forward {ctx.microbatch}"

    def on_loss(self, ctx: CallbackContext) -> None:
        """What forward made and is still there waits for backward."""
        for storage in self.recorder.alive(self.recorder.phase):
            storage.kind = ACTIVATIONS
        if self.held is None:
            self.held = sum(change for _, change, _ in self.recorder.events) - self.base
        self.recorder.phase = f"backward {ctx.microbatch}"

    def on_backward(self, ctx: CallbackContext) -> None:
        """Gradients are there, or what is kept of them until the last microbatch."""
        self.recorder.tag([p.grad for p in self._parameters], GRADIENTS, again=True)
        for storage in self.recorder.alive(self.recorder.phase):
            storage.kind = UNREDUCED
        self.recorder.phase = "update"

    def on_step_end(self, ctx: CallbackContext) -> None:
        """The optimizer has its state."""
        self.recorder.tag([dict(entries) for entries in ctx.optimizer.state.values()], STATE)
        self.recorder.phase = "between"


def simulate(
    config: TrainingConfig,
    ranks: int = 1,
    per_node: int = 8,
    memory: float | None = None,
    seen: dict[str, Any] | None = None,
    **given: Any,
) -> Simulation:
    """Simulate one step of one of `ranks` processes.

    Args:
        config: of the run; its callbacks take no part.
        per_node: processes on one machine.
        memory: bytes of each process's device, by which the engine chooses a strategy with `distributed = "auto"`; None for a CPU.
        seen: what was read of the configuration's data, for further simulations with the same data; filled by the first.
        given: what `Trainer` was or would be given besides: model, train_dataset, loss, step, optimizer, …

    Raises:
        DrivetrainError: when the run cannot be put together. What fails later is in the result's `problems`.
    """
    began = time.monotonic()
    with simulated(ranks, per_node) as recorder, ExitStack() as stack:
        watcher = Watcher()
        watcher.recorder = recorder
        bare, accumulation = _bare(config, ranks, {} if seen is None else seen)
        stack.enter_context(of_memory(memory))
        stack.enter_context(meeting(_strategies(bare)))
        stack.enter_context(_no_collection())
        if isinstance(given.get("model"), nn.Module):
            given["model"] = without_memory(given["model"])
        if (known := given.get("train_dataset")) is not None and hasattr(known, "__getitem__"):
            given["train_dataset"] = _Samples(known, _needed(bare, ranks))
        evaluated = given.pop("eval_dataset", None)
        trainer = Trainer(args=bare, callbacks=[watcher], **given)
        found = _described(trainer, ranks, accumulation)
        samples = given.get("train_dataset", getattr(bare.data, "planned", None))
        found.samples = samples.size if isinstance(samples, _Samples) else None
        found.eval_samples = _length(evaluated) if evaluated is not None else getattr(bare.data, "evaluated", None)
        try:
            _steps(trainer, found)
        except Exception as error:
            found.complete = False
            found.problems.append(_explained(error, recorder.phase))
            _states_alone(trainer, recorder)
            found.samples_per_microbatch = found.samples_per_microbatch or config.per_device_batch_size
        _remembered(found, recorder, trainer)
        found.held = watcher.held or 0
        for place, count in recorder.reads.items():
            times = "once" if count == 1 else f"{count} times"
            found.problems.append(
                f"values are read at {place} ({times}); there are none, and 0 was taken: other branches may run"
            )
    found.seconds = time.monotonic() - began
    return found


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's cyclic garbage collection, whose moments are nobody's: the same step gives the same trace."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def without_memory(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are fake; inside a simulated world."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


# -- the run, as it would be ---------------------------------------------------------------------------------------------------


def _bare(config: TrainingConfig, ranks: int, seen: dict[str, Any]) -> tuple[TrainingConfig, int]:
    """The configuration with nothing that writes, waits or compiles, and how many microbatches its steps have."""
    bare = copy.copy(config)
    bare.standard_callbacks, bare.callbacks, bare.compile = False, [], False
    bare.device, bare.resume, bare.run_name, bare.eval_interval, bare.eval_data = "cpu", "never", None, None, None
    bare.dataloader = copy.copy(config.dataloader)
    bare.dataloader.num_workers, bare.dataloader.pin_memory = 0, False
    bare.distributed = _at_once(bare.distributed)
    data_ranks = ranks
    if bare.distributed != "auto" and (spec := bare.strategy_spec()) is not None:
        tensor = getattr(make_component("strategy", spec, "distributed"), "tensor_parallel", None)
        data_ranks = ranks // max(1, getattr(tensor, "size", 1))
    bare.model = _unread(bare.model)
    if bare.data is not None and not isinstance(bare.data, Component):
        bare.data = make_component("dataset", bare.data, "data")
    evaluated = None if config.eval_data is None else make_component("dataset", config.eval_data, "eval_data")
    accumulation = config.gradient_accumulation_steps
    if config.global_batch_size is not None:
        per_round = config.per_device_batch_size * data_ranks
        if config.global_batch_size % per_round == 0:  # else the trainer says what is wrong
            accumulation = config.global_batch_size // per_round
            bare.global_batch_size = per_round * min(accumulation, _MOST_MICROBATCHES)
    else:
        bare.gradient_accumulation_steps = min(accumulation, _MOST_MICROBATCHES)
    if bare.data is not None:
        _keep_values(bare.data, _needed(bare, ranks), evaluated if config.eval_interval is not None else False, seen)
    return bare, accumulation


def _needed(bare: TrainingConfig, ranks: int) -> int:
    """Samples for the steps to simulate."""
    in_a_step = bare.global_batch_size or bare.per_device_batch_size * ranks * bare.gradient_accumulation_steps
    return in_a_step * (_STEPS + 1)


def _at_once(spec: Any) -> Any:
    """A strategy's table without `defer_init`: nothing has memory anyway."""
    return {k: v for k, v in spec.items() if k != "defer_init"} if isinstance(spec, Mapping) else spec


def _unread(spec: Any) -> Any:
    """A model's table that does not ask for weights to be read from files, where its component has such an option."""
    if spec is None or isinstance(spec, Component):
        return spec
    made = make_component("model", spec, "model")
    if hasattr(made, "from_scratch"):
        made.from_scratch = True
    return made


def _strategies(bare: TrainingConfig) -> set[type]:
    """The classes of the strategies that the run may take."""
    spec = bare.strategy_spec()
    if spec is None or bare.distributed != "auto":
        return set() if spec is None else {type(make_component("strategy", spec, "distributed"))}
    names = [name for name in ("ddp", "fsdp", "mpi") if is_installed("strategy", name)]
    return {type(make_component("strategy", name, "distributed")) for name in names}


def _keep_values(data: Any, needed: int, evaluated: Any, seen: dict[str, Any]) -> None:
    """Let a data component make and read its data with values, and nothing to evaluate; how much there would be is kept.

    Args:
        evaluated: the component of other data to evaluate on; None for what `data` holds out, False for none.
    """
    make, make_eval = data.make_dataset, getattr(data, "make_eval_dataset", lambda ctx: None)
    if evaluated is not None:
        make_eval = evaluated.make_dataset if evaluated else lambda ctx: None

    def make_dataset(ctx: CallbackContext) -> Any:
        if not seen:
            with real():
                found = make(ctx)
                seen["evaluated"] = _length(make_eval(ctx))
            seen["data"] = _Samples(found, needed) if hasattr(found, "__getitem__") else found
        data.evaluated, known = seen["evaluated"], seen["data"]
        data.planned = known.of(needed) if isinstance(known, _Samples) else known
        return data.planned

    data.make_dataset, data.make_eval_dataset = make_dataset, lambda ctx: None


def _length(data: Any) -> int | None:
    return len(data) if hasattr(data, "__len__") and hasattr(data, "__getitem__") else None


class _Samples:
    """A data set just large enough for the steps to simulate, whose samples are all like the longest of the first ones."""

    def __init__(self, data: Any, needed: int) -> None:
        self.size, self._needed = len(data), needed
        with real():
            first = [data[index] for index in range(min(self.size, _LOOKED_AT))]
        self._sample = max(first, key=_numbers, default=None)

    def of(self, needed: int) -> _Samples:
        """The same for another number of samples."""
        other = copy.copy(self)
        other._needed = needed
        return other

    def __len__(self) -> int:
        return self._needed if self.size else 0

    def __getitem__(self, index: int) -> Any:
        return self._sample

    def fetch(self, indices: list[int]) -> Any:
        """A whole batch; not asked for where the run has a collator."""
        with real():
            return default_collate([self._sample] * len(indices))


def _numbers(sample: Any) -> int:
    return sum(x.numel() if isinstance(x, Tensor) else 1 for x in pytree.tree_leaves(_plain(sample)))


def _plain(batch: Any) -> Any:
    """Mappings that pytree does not know (transformers' own) as plain ones."""
    return dict(batch) if isinstance(batch, Mapping) and type(batch) is not dict else batch


# -- the steps -----------------------------------------------------------------------------------------------------------------


def _steps(trainer: Trainer, found: Simulation) -> None:
    ctx, before = trainer.ctx, (0, 0)
    last = 1 if _primed(ctx) else _STEPS
    for step in trainer.steps():
        found.tokens, found.samples_per_microbatch = ctx.tokens - before[0], ctx.samples - before[1]
        before, found.microbatches = (ctx.tokens, ctx.samples), ctx.microbatches
        if step.number >= last:
            break
    per_microbatch = found.microbatches * found.data_ranks
    found.tokens //= per_microbatch
    found.samples_per_microbatch //= per_microbatch


def _primed(ctx: CallbackContext) -> bool:
    """Make the optimizer's state by an update without gradients, so that the first step is like all others; whether that worked.

    Not where the precision has a part in updates.
    """
    if type(ctx.precision).step is not Precision.step:
        return False
    parameters = [p for group in ctx.optimizer.param_groups for p in group["params"]]
    try:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        ctx.optimizer.step()
    except Exception:  # the step itself will say what is wrong
        ctx.optimizer.state.clear()
        return False
    finally:
        for parameter in parameters:
            parameter.grad = None
    return True


def _states_alone(trainer: Trainer, recorder: Recorder) -> None:
    """Gradients and optimizer state without the step that failed: they depend on the parameters alone."""
    ctx = trainer.ctx
    recorder.phase = "update"
    recorder.clear()
    parameters = [p for group in ctx.optimizer.param_groups for p in group["params"]]
    recorder.tag(list(ctx.model.parameters()), PARAMETERS)
    recorder.tag(list(ctx.model.buffers()), BUFFERS)
    try:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        recorder.tag([p.grad for p in parameters], GRADIENTS, again=True)
        ctx.optimizer.step()
        recorder.tag([dict(entries) for entries in ctx.optimizer.state.values()], STATE)
    except Exception:  # said already why the step failed; what is known without it stays
        return


def _described(trainer: Trainer, ranks: int, accumulation: int) -> Simulation:
    ctx = trainer.ctx
    parameters = list(ctx.model.parameters())
    found = Simulation(ranks, ctx.strategy.data_ranks, ctx.strategy.name, ctx.precision.name, accumulation=accumulation)
    found.parameters = sum(_size_of(p) for p in parameters)
    found.trainable = sum(_size_of(p) for p in parameters if p.requires_grad)
    found.reason = ctx.strategy.reason
    return found


def _size_of(parameter: Any) -> int:
    """Elements; of a quantized parameter those that it stands for."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return int(torch.Size(shape).numel()) if shape is not None else int(parameter.numel())


def _remembered(found: Simulation, recorder: Recorder, trainer: Trainer) -> None:
    changes = [Change(storage.kind or TEMPORARY, phase, size) for storage, size, phase in recorder.events]
    ctx = trainer.ctx
    if getattr(getattr(ctx.strategy, "options", None), "cpu_offload", False):
        found.host = replay([change for change in changes if change.kind in _OFFLOADED])[1]
        changes = [change for change in changes if change.kind not in _OFFLOADED]
    found.trace = changes
    found.at_peak, found.largest = replay(changes)
    found.operations, found.collectives = recorder.operations, recorder.collectives
    state = [ctx.model.state_dict(keep_vars=True), [dict(entries) for entries in ctx.optimizer.state.values()]]
    found.whole = sum(t.numel() * t.element_size() for t in pytree.tree_leaves(state) if isinstance(t, (Tensor, DTensor)))


def replay(changes: list[Change]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by kind at the peak, and the most of each kind. By the kinds that are known at the end."""
    now: Counter[str] = Counter()
    total = peak = 0
    at_peak: dict[str, int] = {}
    largest: dict[str, int] = {}
    for kind, _, size in changes:
        now[kind] += size
        total += size
        largest[kind] = max(largest.get(kind, 0), now[kind])
        if total > peak:
            peak, at_peak = total, dict(now)
    return {kind: size for kind, size in at_peak.items() if size}, largest


# -- what went wrong -----------------------------------------------------------------------------------------------------------


def _explained(error: BaseException, phase: str) -> str:
    """Which part could not be simulated, and why."""
    where = _place(error)
    name, text = type(error).__name__, str(error).splitlines()[0] if str(error) else ""
    if name in ("DataDependentOutputException", "DynamicOutputShapeException"):
        why = f"{text} has a result that depends on values, which a simulation does not have"
    elif name == "UnsupportedOperatorException" or "fake" in text.lower() or "data is not allocated" in text:
        why = f"an operation has no fake implementation (torch.library.register_fake): {text[:200]}"
    else:
        why = f"{name}: {text[:200]}"
    return f"the {phase.split()[0]} could not be simulated{where}: {why}"


def _place(error: BaseException) -> str:
    """The innermost line of code that is neither torch's nor Drivetrain's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(p in f.filename for p in ("/torch/", "/drivetrain/", "/drivetrain_plan/", "<"))]
    return f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
