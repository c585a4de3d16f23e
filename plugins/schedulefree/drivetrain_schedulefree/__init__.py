"""Schedule-free AdamW and SGD for Drivetrain: the weights are averaged, so that the learning rate needs no decay."""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar

import attrs
import torch

from drivetrain import CallbackContext, OptimizerComponent, component, hook, option
from drivetrain_schedulefree.optimizers import ScheduleFree, ScheduleFreeAdamW, ScheduleFreeSGD

__all__ = [
    "ScheduleFree",
    "ScheduleFreeAdamW",
    "ScheduleFreeAdamWComponent",
    "ScheduleFreeComponent",
    "ScheduleFreeSGD",
    "ScheduleFreeSGDComponent",
]


def _interpolates(_: Any, __: Any, betas: Any) -> None:
    if isinstance(betas, (list, tuple)) and betas and betas[0] == 0:
        raise ValueError(f"the first must be above 0, got {betas[0]!r}")


@component
class ScheduleFreeComponent(OptimizerComponent):
    """Base of both: which point the model's weights are at.

    They are y, where gradients are taken, while training: a checkpoint made then holds y as the model and z as the optimizer's
    state, and goes on exactly. Evaluation sees x, the average, and so does whoever restores a state to export it; the run leaves x
    in the model when it ends. A state taken there holds y as well, in the optimizer's part.
    """

    default_scheduler: ClassVar[str | dict[str, Any]] = {"use": "constant", "warmup": "5%"}

    _switched: bool = attrs.field(default=False, init=False, repr=False)  # for an evaluation
    _last_lr: float = attrs.field(default=0.0, init=False, repr=False)

    @hook(trylast=True)
    def on_restore(self, ctx: CallbackContext) -> None:
        """To x, after the state has been loaded: `Trainer.restore` is for evaluation and export. Training goes back, bit by bit."""
        _schedule_free(ctx).eval()

    @hook(tryfirst=True)
    def on_run_start(self, ctx: CallbackContext) -> None:
        """To y: an earlier sitting, or the state it was restored from, may have ended at x."""
        _schedule_free(ctx).train()
        self._last_lr = 0.0

    @hook(tryfirst=True)
    def on_evaluate_start(self, ctx: CallbackContext) -> None:
        """To x, before other listeners look at the weights."""
        self._switched = not _schedule_free(ctx).averaged
        _schedule_free(ctx).eval()

    @hook(trylast=True)
    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        """Back to y, bit by bit, if that is where evaluation found them."""
        if self._switched:
            _schedule_free(ctx).train()

    def on_optimizer_step(self, ctx: CallbackContext) -> None:
        """Warn, once, of a learning rate that falls."""
        if ctx.lr < self._last_lr:
            warnings.warn(
                f"{self.plugin_name}: the learning rate falls at step {ctx.step + 1}. The averaging takes the place of a decaying "
                "schedule: set scheduler = 'constant' (with a warm-up).",
                stacklevel=2,
            )
            self._last_lr = -math.inf
        elif self._last_lr >= 0:
            self._last_lr = ctx.lr

    @hook(tryfirst=True)
    def on_run_end(self, ctx: CallbackContext) -> None:
        """To x, which is the result, before others save or export it."""
        _schedule_free(ctx).eval()


@component
class ScheduleFreeAdamWComponent(ScheduleFreeComponent):
    """Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682, algorithm 1).

    z ← z − η(g(y)/(√v̂ + ε) + λy), x ← (1−c)x + c·z, y ← (1−β1)z + β1·x, with v̂ as in AdamW and c = η²/Ση². Gradients are taken at
    y; evaluation sees x, and the run ends there. Needs a constant rate with a warm-up, 1 to 10 times AdamW's;
    where the configuration names no scheduler it gets that. Running statistics of batch norm belong to y.
    """

    lr: float = option(default=2.5e-3, at_least=0, help="learning rate; the schedule multiplies it")
    weight_decay: float = option(default=0.01, at_least=0, help="decay of the weights it applies to, see `decay`")
    betas: tuple[float, float] = option(
        default=(0.9, 0.999),
        at_least=0,
        below=1,
        validator=_interpolates,
        help="interpolation between z and x (0.95 to 0.98 for long runs), averaging of squares",
    )
    eps: float = option(default=1e-8, at_least=0, help="added to the denominator")

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """`ScheduleFreeAdamW` over the parameters of `ctx.model`."""
        return ScheduleFreeAdamW(self.parameter_groups(ctx.model), self.lr, self.betas, self.eps, self.weight_decay)


@component
class ScheduleFreeSGDComponent(ScheduleFreeComponent):
    """Schedule-free SGD (Defazio et al. 2024, arXiv:2405.15682, equations 5 to 7).

    z ← z − η(g(y) + λy), x ← (1−c)x + c·z, y ← (1−β)z + βx, with c = η²/Ση². Gradients are taken at y; evaluation sees x, and the run
    ends there. Needs a constant rate with a warm-up, 10 to 50 times that of SGD with momentum; where the configuration names no scheduler
    it gets that.
    """

    lr: float = option(default=1.0, at_least=0, help="learning rate; the schedule multiplies it")
    weight_decay: float = option(default=0.0, at_least=0, help="decay of the weights it applies to, see `decay`")
    momentum: float = option(default=0.9, above=0, below=1, help="interpolation between z and x")

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """`ScheduleFreeSGD` over the parameters of `ctx.model`."""
        return ScheduleFreeSGD(self.parameter_groups(ctx.model), self.lr, self.momentum, self.weight_decay)


def _schedule_free(ctx: CallbackContext) -> ScheduleFree:
    assert isinstance(ctx.optimizer, ScheduleFree), "the component's events come after its make_optimizer"
    return ctx.optimizer
