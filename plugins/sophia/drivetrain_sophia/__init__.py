"""Sophia for Drivetrain: steps divided by an estimate of the curvature, which is renewed every few steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor, nn

from drivetrain import CallbackContext, ConfigError, Loss, ModelError, OptimizerComponent, Problem, component, option, state
from drivetrain_sophia.gauss_newton import find_logits, next_labels, sampled_cross_entropy, shifts_labels
from drivetrain_sophia.hutchinson import by_differences, by_double_backward
from drivetrain_sophia.optimizer import Sophia

__all__ = [
    "Sophia",
    "SophiaComponent",
    "SophiaGComponent",
    "SophiaHComponent",
    "find_logits",
    "next_labels",
    "sampled_cross_entropy",
    "shifts_labels",
]


@component
class SophiaComponent(OptimizerComponent):
    """Base of both: Sophia's step, and when its curvature is renewed. A subclass implements `estimate`."""

    lr: float = option(default=6e-4, at_least=0, help="peak learning rate; the schedule multiplies it")
    weight_decay: float = option(
        default=0.1, at_least=0, help="decay of the weights it applies to, see `decay`; the paper has 0.2 for GPT-2"
    )
    betas: tuple[float, float] = option(
        default=(0.96, 0.99), at_least=0, below=1, help="averaging factors of gradient and curvature"
    )
    gamma: float = option(
        default=0.05, at_least=0, help="scale of the curvature: a greater one clips fewer weights; see train/sophia_win_rate"
    )
    eps: float = option(default=1e-12, at_least=0, help="the least that the averaged gradient is divided by")
    update_interval: int = option(default=10, at_least=1, help="steps from one estimate of the curvature to the next")

    estimated_at: int = state(default=-1)  # the step before which the curvature was last estimated

    @abstractmethod
    def estimate(self, ctx: CallbackContext) -> list[Tensor | None]:
        """The diagonal of the Hessian on this step's data, for each parameter in the order of the optimizer's groups."""

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """`Sophia` over the parameters of `ctx.model`."""
        groups = self.parameter_groups(ctx.model)
        return Sophia(groups, self.lr, self.betas, self.gamma, self.eps, self.weight_decay)

    def on_step_start(self, ctx: CallbackContext) -> None:
        """Renew the curvature where the gradient will be taken: at these weights, before steps 0, k, 2k, … (algorithm 3, line 6).

        A step that is begun twice, after its gradients overflowed or a resume, has been estimated for.
        """
        if ctx.step % self.update_interval == 0 and ctx.step != self.estimated_at:
            _sophia(ctx).update_hessian(self.estimate(ctx))
            self.estimated_at = ctx.step

    def on_optimizer_step(self, ctx: CallbackContext) -> None:
        """Report the share of weights that were not clipped, in the steps with a new curvature."""
        if ctx.step % self.update_interval == 0:
            ctx.log({"train/sophia_win_rate": _sophia(ctx).win_rate()})

    def generator(self, ctx: CallbackContext, rank: int) -> torch.Generator:
        """Random numbers of this step and rank alone, apart from the training's, so that there is no state to save."""
        seed = Random(f"sophia {ctx.config.seed} {ctx.step} {rank}").getrandbits(63)
        return torch.Generator(ctx.device).manual_seed(seed)


@component
class SophiaGComponent(SophiaComponent):
    """Sophia-G (Liu et al. 2023, arXiv:2305.14342, algorithms 2 and 3), for classifiers and language models.

    m ← β1·m + (1−β1)g, θ ← θ(1 − ηλ) − η·clip(m / max(γh, ε), −1, 1); every k steps h ← β2·h + (1−β2)ĥ with the
    Gauss-Newton-Bartlett estimate ĥ = B·ĝ⊙ĝ: ĝ is the mean gradient of the cross entropy over the step's B positions with labels
    drawn from the model's own prediction. Each estimate costs a forward and a backward over the step's batch.

    The model's outputs must be logits, or have them under "logits" or `.logits`. A mapping batch is given to the model without its
    "labels" when it returns no logits with them. Positions whose label is -100 do not count; which logits a label belongs to says
    `shift`.
    """

    shift: bool | None = option(
        default=None,
        help="whether labels[t] is predicted by logits[t - 1], as transformers' causal models have it, or by logits[t]; default: as "
        "the model says of itself",
    )

    def estimate(self, ctx: CallbackContext) -> list[Tensor | None]:
        """B·ĝ⊙ĝ."""
        generator = self.generator(ctx, ctx.strategy.data_rank)  # every rank has other data, and draws other labels
        gradients, positions = ctx.gradients_of(step=partial(self._sampled_loss, generator))
        return [
            None if g is None else g.to(torch.promote_types(g.dtype, torch.float32)).square() * positions for g in gradients
        ]

    def _sampled_loss(self, generator: torch.Generator, model: nn.Module, batch: Any) -> Loss:
        logits, labels = self.logits_and_labels(model, batch)
        return sampled_cross_entropy(logits, labels, generator)

    def logits_and_labels(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
        """The model's logits for a batch, with gradient, and the label that each of them predicts (None: every position counts).

        Override it in a subclass for models that are called in another way.

        Raises:
            ModelError: when the model returns no logits.
        """
        if isinstance(batch, Mapping):
            labels = batch.get("labels")
            logits = find_logits(model(**batch))
            if logits is None and labels is not None:
                logits = find_logits(model(**{key: value for key, value in batch.items() if key != "labels"}))
            if labels is not None and (shifts_labels(model) if self.shift is None else self.shift):
                labels = next_labels(labels)
        else:
            inputs, labels = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
            logits = find_logits(model(inputs))
        if logits is None:
            raise ModelError(
                "sophia draws labels from the model's logits, but the model returns none. It must return logits (a tensor of two "
                "or more dimensions, a mapping with 'logits' or an object with .logits), when called as in training or, for a "
                "mapping batch, without its 'labels'. Or subclass drivetrain_sophia.SophiaGComponent and override "
                "logits_and_labels(model, batch), or use sophia_h, which needs the loss only."
            )
        return logits, labels


@component
class SophiaHComponent(SophiaComponent):
    """Sophia-H (Liu et al. 2023, arXiv:2305.14342, algorithms 1 and 3), for any loss.

    The step is Sophia-G's; the curvature is Hutchinson's estimate ĥ = u⊙(∇²L·u) with u ~ N(0, I), on the step's own batch and
    loss, in float32 whatever the run computes in. `product` chooses how ∇²L·u is computed: by the `difference` of gradients at
    θ ± εu, two forward and backward passes that work with every kernel, or by `double_backward`, exact, for models whose every
    operation has a second derivative (not compiled, not checkpointed) and with more memory.

    Every process needs the whole weights: one device or ddp, not fsdp.
    """

    gamma: float = option(
        default=0.01, at_least=0, help="scale of the curvature: a greater one clips fewer weights; see train/sophia_win_rate"
    )
    product: Literal["difference", "double_backward"] = option(
        default="difference", help="how the Hessian is multiplied with a vector: difference of gradients, or double_backward"
    )

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """`Sophia` over the parameters of `ctx.model`.

        Raises:
            ConfigError: for weights that are sharded, or too coarse for a difference of gradients.
        """
        made = SophiaComponent.make_optimizer(self, ctx)
        params = [p for group in made.param_groups for p in group["params"]]
        path = self.plugin_name.replace(":", ".") or "optimizer"
        if any(hasattr(p, "device_mesh") for p in params):
            raise ConfigError([Problem(path, "needs the whole weights in every process, and these are sharded. Use sophia.")])
        if self.product == "difference" and any(p.dtype not in (torch.float32, torch.float64) for p in params):
            message = "'difference' needs weights in float32; these are coarser. Use 'double_backward'."
            raise ConfigError([Problem(f"{path}.product", message)])
        return made

    def estimate(self, ctx: CallbackContext) -> list[Tensor | None]:
        """u⊙(∇²L·u)."""
        generator = self.generator(ctx, 0)  # one u for all ranks: their products are averaged
        params = [p for group in ctx.optimizer.param_groups for p in group["params"]]
        vectors = [torch.empty_like(p, requires_grad=False).normal_(generator=generator) for p in params]
        multiply = by_differences if self.product == "difference" else by_double_backward
        return [None if hu is None else u * hu for u, hu in zip(vectors, multiply(ctx, vectors), strict=True)]


def _sophia(ctx: CallbackContext) -> Sophia:
    if not isinstance(ctx.optimizer, Sophia):
        raise ModelError(f"sophia's events work on its own optimizer, and the run has {type(ctx.optimizer).__name__}")
    return ctx.optimizer
