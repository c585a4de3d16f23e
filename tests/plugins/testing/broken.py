"""Plugins that each break one promise; the kit must say which. `Sound…` is what they would be without the mistake."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from drivetrain import (
    Callback,
    CallbackContext,
    Component,
    OptimizerComponent,
    Precision,
    Strategy,
    Tracker,
    component,
    option,
    state,
)
from drivetrain.cluster import Cluster
from drivetrain_testing import GlooStrategy, tiny_data, tiny_model


@component
class Sound(Callback):
    """Counts steps."""

    every: str = option(default="1000st", help="a period")
    steps: int = state(default=0)

    def on_step_end(self, ctx: CallbackContext) -> None:
        self.steps += 1


# -- options


@component
class NoHelp(Callback):
    """An option nobody explains."""

    bare: int = option(default=1)


@component
class Doubles(Callback):
    """What is written is not what was given."""

    size: int = attrs.field(default=1, converter=lambda value: value * 2, metadata={"help": "a size"})


def _assert_positive(_: Any, __: Any, value: float) -> None:
    assert value > 0


@component
class Asserts(Callback):
    """Its validator raises what nobody translates."""

    size: float = option(default=1.0, help="a size", validator=_assert_positive)


@component
class Silent(Callback):
    pass


Silent.__doc__ = None


@component
class Misspelt(Callback):
    """A hook that no loop calls."""

    def on_step_ended(self, ctx: CallbackContext) -> None: ...


# -- runs


@component
class Fails(Callback):
    """Cannot run at all."""

    def on_step_end(self, ctx: CallbackContext) -> None:
        raise ValueError("out of order")


@component
class KeepsSet(Callback):
    """State that no file can hold."""

    seen: set[int] = state(factory=set)

    def on_step_end(self, ctx: CallbackContext) -> None:
        self.seen.add(ctx.step)


@component
class ForgetsCount(Callback):
    """State that starts afresh with each sitting."""

    steps: int = state(default=0)

    def on_run_start(self, ctx: CallbackContext) -> None:
        self.steps = 0

    def on_step_end(self, ctx: CallbackContext) -> None:
        self.steps += 1


@component
class Disturbs(Callback):
    """Draws from the training's random numbers."""

    def on_step_start(self, ctx: CallbackContext) -> None:
        torch.rand(3)


@component
class DisturbsPython(Callback):
    """Draws from Python's generator, which no weight depends on here."""

    def on_step_start(self, ctx: CallbackContext) -> None:
        random.random()


@component
class SharesList(Callback):
    """A list in the class."""

    seen: ClassVar[list[int]] = []

    def on_step_end(self, ctx: CallbackContext) -> None:
        self.seen.append(ctx.step)


@component
class MainOnly(Callback):
    """Rank 0 waits for a rank that is not coming."""

    def on_run_end(self, ctx: CallbackContext) -> None:
        if ctx.is_main:
            ctx.strategy.barrier()


@component
class Swallows(Callback):
    """Nobody hears what goes wrong in it."""

    def on_step_end(self, ctx: CallbackContext) -> None:
        with suppress(Exception):
            ctx.log({"train/x": 1.0})


@component
class Replaces(Callback):
    """Says something else in place of what went wrong."""

    def on_step_end(self, ctx: CallbackContext) -> None:
        try:
            ctx.log({"train/x": 1.0})
        except Exception:
            error = RuntimeError("sorry")
        else:
            return
        raise error


@component
class FallsApart(Callback):
    """Takes for granted that the run has logged when it ends."""

    def on_run_end(self, ctx: CallbackContext) -> None:
        self.last = ctx.eval_metrics["eval/loss"]


# -- steps


@component
class Reads(Callback):
    """Reads the loss in every step."""

    def on_step_end(self, ctx: CallbackContext) -> None:
        assert ctx.loss == ctx.loss


@component
class Moves(Callback):
    """Copies the loss to the host in every step."""

    def on_step_end(self, ctx: CallbackContext) -> None:
        assert ctx.loss_tensor is not None
        ctx.log({"train/copy": ctx.loss_tensor.to("cpu")})


@component
class KeepsOnDevice(Callback):
    """Sound: what it moves goes where it is already."""

    def on_run_start(self, ctx: CallbackContext) -> None:
        self.device = next(ctx.model.parameters()).device

    def on_step_end(self, ctx: CallbackContext) -> None:
        assert ctx.loss_tensor is not None
        moved = [ctx.loss_tensor.to(self.device), ctx.loss_tensor.to(ctx.device), ctx.loss_tensor.to(ctx.loss_tensor.device)]
        ctx.log({"train/copy": torch.stack(moved).mean().to("cpu", non_blocking=True)})


@component
class Writes(Callback):
    """Writes a line in every step."""

    def on_step_end(self, ctx: CallbackContext) -> None:
        with open(os.devnull, "w") as file:
            file.write("step")


@component
class Collects(Callback):
    """Sums over ranks in every step."""

    def on_step_end(self, ctx: CallbackContext) -> None:
        ctx.log({"train/sum": ctx.strategy.sum(torch.ones(()))})


@component
class Reduces(Callback):
    """Does so without the strategy, where there is a process group."""

    def on_step_end(self, ctx: CallbackContext) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(torch.ones(()))


@component
class GathersWeights(Callback):
    """Asks for all weights in every step, whose parts lie on other ranks."""

    def on_step_end(self, ctx: CallbackContext) -> None:
        ctx.strategy.model_state(ctx.model)


@component
class Busy(Callback):
    """A loop of Python in every step."""

    def on_step_end(self, ctx: CallbackContext) -> None:
        for _ in range(500):
            len(str(ctx.step))


# -- optimizers


class Sgd(torch.optim.Optimizer):
    """Plain SGD with a decay; subclasses break it."""

    refuses_sparse = True

    def __init__(self, params: Any, lr: float = 0.05, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.refuses_sparse and any(p.grad.is_sparse for p, _ in held):
            raise RuntimeError("sparse gradients cannot be used")
        for p, group in held:
            self.update(p, p.grad, group)
        return loss

    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(grad, alpha=-group["lr"])


@component
class SoundOptimizer(OptimizerComponent):
    """SGD."""

    lr: float = option(default=0.05, help="learning rate")
    made: ClassVar[type[torch.optim.Optimizer]] = Sgd

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        return self.made(self.parameter_groups(ctx.model))  # type: ignore[arg-type]


class _Ascends(Sgd):
    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        super().update(p, -grad if not grad.is_sparse else grad, group)


class _Hidden(Sgd):
    """A momentum that no state_dict holds."""

    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        kept = self.__dict__.setdefault("kept", {})
        kept[p] = kept.get(p, torch.zeros_like(p)) * 0.9 + grad
        super().update(p, kept[p], group)


class _ByRank(Sgd):
    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        super().update(p, grad * (1 + rank), group)


class _OwnRate(Sgd):
    """Looks at the defaults instead of the group."""

    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        super().update(p, grad, self.defaults)


class _SqueezesGradient(Sgd):
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure is not None else None  # without gradients
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, torch.zeros_like(p) + p.grad, group)  # whether there is one or not
        return loss


class _DecaysIdle(Sgd):
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            torch._foreach_mul_(group["params"], 1 - 0.01 * group["lr"])
        return super().step(closure)


class _NoClosure(Sgd):
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return super().step()


class _LateRefusal(Sgd):
    """Finds the sparse gradient when the layers before it have moved."""

    refuses_sparse = False

    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if grad.is_sparse:
            raise RuntimeError("sparse gradients cannot be used")
        super().update(p, grad, group)


class _ObscureRefusal(Sgd):
    refuses_sparse = False

    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if grad.is_sparse:
            raise ValueError("no")
        super().update(p, grad, group)


class _IgnoresSparse(Sgd):
    refuses_sparse = False

    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if not grad.is_sparse:
            super().update(p, grad, group)


class _Widens(Sgd):
    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        super().update(p, grad, group)
        p.data = p.data.float()


class _ReadsLoss(Sgd):
    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if not grad.is_sparse and grad.norm().item() > 1e9:
            return
        super().update(p, grad, group)


def _broken(made: type[torch.optim.Optimizer]) -> type[SoundOptimizer]:
    """A component around a broken optimizer, at this module's top so that it can go to other processes."""
    name = made.__name__.lstrip("_")
    fields = {"made": made, "__module__": __name__, "__qualname__": name, "__doc__": made.__doc__ or name}
    return component(type(name, (SoundOptimizer,), {**fields, "__annotations__": {}}))


Ascends, Hidden, ByRank, OwnRate = map(_broken, (_Ascends, _Hidden, _ByRank, _OwnRate))
SqueezesGradient, DecaysIdle, NoClosure = map(_broken, (_SqueezesGradient, _DecaysIdle, _NoClosure))
LateRefusal, ObscureRefusal, IgnoresSparse = map(_broken, (_LateRefusal, _ObscureRefusal, _IgnoresSparse))
Widens, ReadsLoss = map(_broken, (_Widens, _ReadsLoss))


@component
class HoldsFrozen(SoundOptimizer):
    """Takes every parameter there is."""

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        return Sgd(list(ctx.model.parameters()))


# -- schedules, precisions, strategies


class _Schedule(Component):
    kind: ClassVar[str] = "scheduler"


@component
class Counts(_Schedule):
    """Falls with each question."""

    def make_schedule(self, ctx: CallbackContext) -> Callable[[float], float]:
        asked = iter(range(1, 10**6))
        return lambda position: 1 / next(asked)


@component
class Divides(_Schedule):
    """Divides by the length of the rest."""

    def make_schedule(self, ctx: CallbackContext) -> Callable[[float], float]:
        return lambda position: 1 - position / (ctx.run_length - 1)


class _Precision(Component):
    kind: ClassVar[str] = "precision"
    made: ClassVar[type[Precision]] = Precision

    def make_precision(self, ctx: CallbackContext) -> Precision:
        return self.made()


class _OnceContext(Precision):
    def forward(self) -> AbstractContextManager[Any] | None:
        @contextmanager
        def once() -> Iterator[None]:
            yield

        return once()


class _Thaws(Precision):
    def cast(self, model: nn.Module) -> nn.Module:
        return model.requires_grad_(True)


class _NeverSkips(Precision):
    scales = True

    def scale(self, loss: Tensor) -> Tensor:
        return loss * 8.0

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad /= 8.0


@component
class OnceContext(_Precision):
    """A context that opens once."""

    made = _OnceContext


@component
class Thaws(_Precision):
    """Makes everything trainable."""

    made = _Thaws


@component
class NeverSkips(_Precision):
    """Steps on whatever it is given."""

    made = _NeverSkips


class _StrategyBase(Component):
    kind: ClassVar[str] = "strategy"
    made: ClassVar[type[Strategy]] = GlooStrategy

    def make_strategy(self, ctx: CallbackContext) -> Strategy:
        return self.made()


class _Alone(GlooStrategy):
    def sum(self, value: Tensor) -> Tensor:
        return value


class _Prefixed(GlooStrategy):
    def model_state(self, model: nn.Module) -> dict[str, Any]:
        return {f"module.{name}": value for name, value in model.state_dict().items()}


class _EvenShares(GlooStrategy):
    def sum(self, value: Tensor) -> Tensor:
        return value * self.world_size


class _OwnFormat(GlooStrategy):
    def optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {"shard": optimizer.state_dict()}

    def load_optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
        optimizer.load_state_dict(saved["shard"])


class _NoReduce(GlooStrategy):
    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def no_sync(self, model: nn.Module) -> None:
        return None

    def reduce_gradients(self, parameters: Any) -> None: ...


@component
class Alone(_StrategyBase):
    """Sums nothing."""

    made = _Alone


@component
class Prefixed(_StrategyBase):
    """Names that no other strategy knows."""

    made = _Prefixed


@component
class EvenShares(_StrategyBase):
    """Takes for granted that every rank has as much as this one."""

    made = _EvenShares


@component
class OwnFormat(_StrategyBase):
    """Saves what only it can load."""

    made = _OwnFormat


@component
class SoundStrategy(_StrategyBase):
    """Data parallelism."""


@component
class NoReduce(_StrategyBase):
    """Lets ranks drift apart."""

    made = _NoReduce


# -- trackers, modes, models, data


@component
class NeedsStart(Tracker):
    """Closes what was never opened."""

    def start(self, ctx: CallbackContext) -> None:
        self.file = open(Path(ctx.run_dir) / "log.txt", "a")  # noqa: SIM115

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.file.write(f"{step}\n")

    def close(self) -> None:
        self.file.close()


@component
class Idle(Component):
    """Leaves a trainable parameter that no output depends on."""

    kind: ClassVar[str] = "mode"

    def make_adapted_model(self, ctx: CallbackContext) -> nn.Module:
        model = ctx.model.requires_grad_(False)
        model.anchor = nn.Parameter(torch.zeros(1))
        model.register_forward_hook(lambda _, __, output: output + 0.0 * model.anchor)
        return model


@component
class Unseeded(Component):
    """Weights from the clock."""

    kind: ClassVar[str] = "model"

    def make_model(self, ctx: CallbackContext) -> nn.Module:
        return tiny_model(seed=random.SystemRandom().randrange(10**6))


@component
class Shuffled(Component):
    """Other samples each time."""

    kind: ClassVar[str] = "dataset"

    def make_dataset(self, ctx: CallbackContext) -> Any:
        return tiny_data(seed=random.SystemRandom().randrange(10**6))


# -- what is no component


class NoHelpCommand:
    """A command without a word."""

    help = ""

    def add_arguments(self, parser: Any) -> None: ...

    def run(self, arguments: Any) -> int:
        return 0


class PercentCommand:
    """A command whose --help cannot be printed."""

    help = "do half of it"

    def add_arguments(self, parser: Any) -> None:
        parser.add_argument("--share", help="such as 50% of it")

    def run(self, arguments: Any) -> int:
        return 0


class ArgumentlessCommand(NoHelpCommand):
    """A command that cannot be told anything."""

    help = "do it"

    def run(self) -> int:  # type: ignore[override]
        return 0


def always_there(environment: Mapping[str, str]) -> Cluster | None:
    """Sees its launcher everywhere."""
    return Cluster("always")


def counts_from_one(environment: Mapping[str, str]) -> Cluster | None:
    """Takes the last rank for one too many."""
    if "TOY_RANK" not in environment:
        return None
    return Cluster("toy", int(environment["TOY_RANK"]) + 1, 2, evidence=("TOY_RANK",))


def misspelt_preset(model_name: str) -> dict[str, Any]:
    """A key that does not exist."""
    return {"model_name": model_name, "learning_rate": 1.0}


class Unquoted:
    """A format that loses the types."""

    def dumps(self, table: Mapping[str, Any]) -> str:
        return "\n".join(f"{key}={value}" for key, value in table.items())

    def loads(self, text: str) -> dict[str, Any]:
        return dict(line.split("=", 1) for line in text.splitlines())  # type: ignore[arg-type,misc]


def named_device(local_rank: int) -> Any:
    """A name instead of a device."""
    return "cpu"


def one_word_check() -> Any:
    """A verdict without words."""
    return True
