"""The optimizers of torch.optim for Drivetrain, by name, LAMB, and several optimizers as one.

In the formulas θ is a parameter, g its gradient, η the learning rate, λ the weight decay, t the step, counted from 1.
"""

from __future__ import annotations

import torch

from drivetrain import CallbackContext, ConfigError, Problem, component, option
from drivetrain_optimizers import direct
from drivetrain_optimizers.base import DECAY_HELP, LR_HELP, FusibleOptimizer, TorchOptimizer, betas
from drivetrain_optimizers.joined import Joined
from drivetrain_optimizers.lamb import Lamb, LambOptimizer
from drivetrain_optimizers.muon import MuonAdamW, MuonTorch
from drivetrain_optimizers.routed import Routed

__all__ = [
    "SGD",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "FusibleOptimizer",
    "Joined",
    "Lamb",
    "LambOptimizer",
    "MuonAdamW",
    "MuonTorch",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Routed",
    "TorchOptimizer",
]

EPS_HELP = "added to the denominator"


@component
class AdamW(FusibleOptimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2).

    m ← β1·m + (1−β1)g, v ← β2·v + (1−β2)g², θ ← θ(1 − ηλ) − η·m̂/(√v̂ + ε), with m̂ = m/(1−β1ᵗ) and v̂ = v/(1−β2ᵗ).
    """

    lr: float = option(default=1e-3, at_least=0, help=LR_HELP)
    weight_decay: float = option(default=0.01, at_least=0, help=DECAY_HELP)
    betas: tuple[float, float] = betas(0.9, 0.999)
    eps: float = option(default=1e-8, at_least=0, help=EPS_HELP)
    amsgrad: bool = option(default=False, help="divide by the largest v̂ so far (Reddi et al. 2018)")

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """`torch.optim.AdamW` over the parameters of `ctx.model`."""
        return self.build(direct.AdamW, ctx, betas=self.betas, eps=self.eps, amsgrad=self.amsgrad)


@component
class Adam(FusibleOptimizer):
    """Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1). Weight decay is added to the gradient (L2), unlike in `adamw`."""

    lr: float = option(default=1e-3, at_least=0, help=LR_HELP)
    betas: tuple[float, float] = betas(0.9, 0.999)
    eps: float = option(default=1e-8, at_least=0, help=EPS_HELP)
    amsgrad: bool = option(default=False, help="divide by the largest v̂ so far (Reddi et al. 2018)")

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """`torch.optim.Adam` over the parameters of `ctx.model`."""
        return self.build(direct.Adam, ctx, betas=self.betas, eps=self.eps, amsgrad=self.amsgrad)


@component
class SGD(FusibleOptimizer):
    """Stochastic gradient descent with momentum: b ← μb + (1−τ)(g + λθ), θ ← θ − ηb.

    Sutskever et al. 2013 (ICML, equations 1 to 4), whose velocity is −ηb: torch multiplies by the rate at the end. μ is
    `momentum`, τ `dampening`; b is g + λθ in the first step. With `nesterov`, θ ← θ − η(g + λθ + μb).
    """

    lr: float = option(default=1e-2, at_least=0, help=LR_HELP)
    momentum: float = option(default=0.0, at_least=0, below=1, help="factor of the earlier updates")
    dampening: float = option(default=0.0, at_least=0, help="how much of the gradient is held back from the momentum")
    nesterov: bool = option(default=False, help="look ahead along the momentum; needs momentum and no dampening")

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """`torch.optim.SGD` over the parameters of `ctx.model`."""
        return self.build(direct.SGD, ctx, momentum=self.momentum, dampening=self.dampening, nesterov=self.nesterov)


@component
class Adafactor(TorchOptimizer):
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 to 6): a row and a column of second moments for a matrix.

    ρ = min(η, 1/√t), α = max(ε2, RMS(θ))·ρ, θ ← θ(1 − ηλ) − α·U/max(1, RMS(U)/d), with U = g/√max(V, ε1²) and
    V = R⊗C/max(mean(R), ε1), R and C the averaged row and column means of g². Their averaging factor in step t is
    1 − t^`beta2_decay`. No momentum. The paper adds its ε1 (1e-30) to g² instead; torch has a lower limit, of another size.
    """

    lr: float = option(default=1e-2, at_least=0, help="upper bound of the relative step size ρ; the schedule multiplies it")
    beta2_decay: float = option(default=-0.8, at_most=0, help="exponent of the second moments' averaging factor")
    clip: float = option(default=1.0, at_least=1, help="largest root mean square of an update (d in the paper)")
    eps1: float | None = option(
        default=None, at_least=0, help="the least √V; default: the precision of the parameters' type (1.2e-7)"
    )
    eps2: float = option(default=1e-3, at_least=0, help="smallest parameter scale")

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """`torch.optim.Adafactor` over the parameters of `ctx.model`.

        Raises:
            ConfigError: for sharded parameters.
        """
        if any(hasattr(p, "device_mesh") for p in ctx.model.parameters()):
            message = "needs whole matrices for its rows and columns, and these are sharded. Use adamw, or ddp."
            raise ConfigError([Problem(self.path, message)])
        return self.build(torch.optim.Adafactor, ctx, beta2_decay=self.beta2_decay, d=self.clip, eps=(self.eps1, self.eps2))


@component
class Adagrad(FusibleOptimizer):
    """Adagrad: v ← v + (g + λθ)², θ ← θ − η/(1 + (t−1)·lr_decay) · (g + λθ)/(√v + ε).

    Duchi et al. 2011 (JMLR 12, 2121-2159), algorithm 1, with diagonal matrices and without a projection. Takes sparse
    gradients, if nothing decays.
    """

    lr: float = option(default=1e-2, at_least=0, help=LR_HELP)
    lr_decay: float = option(default=0.0, at_least=0, help="how fast the rate falls, besides the schedule")
    initial_accumulator: float = option(default=0.0, at_least=0, help="what v starts from")
    eps: float = option(default=1e-10, at_least=0, help=EPS_HELP)

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """`torch.optim.Adagrad` over the parameters of `ctx.model`."""
        start = self.initial_accumulator
        return self.build(torch.optim.Adagrad, ctx, lr_decay=self.lr_decay, initial_accumulator_value=start, eps=self.eps)


@component
class RMSprop(TorchOptimizer):
    """RMSprop (Hinton 2012, lecture 6e): v ← αv + (1−α)(g + λθ)², θ ← θ − η(g + λθ)/(√v + ε).

    With `momentum`, the quotient is added up first, b ← μb + (g + λθ)/(√v + ε), and θ ← θ − ηb; `centered` is Graves 2013
    (arXiv:1308.0850), equations 38 to 41.
    """

    lr: float = option(default=1e-2, at_least=0, help=LR_HELP)
    alpha: float = option(default=0.99, at_least=0, below=1, help="averaging factor of the squared gradient")
    eps: float = option(default=1e-8, at_least=0, help=EPS_HELP)
    momentum: float = option(default=0.0, at_least=0, below=1, help="factor of the earlier updates")
    centered: bool = option(default=False, help="subtract the squared mean gradient from v")

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """`torch.optim.RMSprop` over the parameters of `ctx.model`."""
        return self.build(
            torch.optim.RMSprop, ctx, alpha=self.alpha, eps=self.eps, momentum=self.momentum, centered=self.centered
        )


@component
class NAdam(TorchOptimizer):
    """Adam with Nesterov momentum: θ ← θ − η·(μ₊m/(1−Πμ₊) + (1−μ)g/(1−Πμ))/(√v̂ + ε), μ = β1(1 − ½·0.96^(tψ)).

    Dozat 2016, "Incorporating Nesterov Momentum into Adam" (ICLR workshop), algorithm 2. m, v and v̂ are Adam's; μ₊ is the next
    step's μ, the products run up to it. ψ is `momentum_decay`.
    """

    lr: float = option(default=2e-3, at_least=0, help=LR_HELP)
    betas: tuple[float, float] = betas(0.9, 0.999)
    eps: float = option(default=1e-8, at_least=0, help=EPS_HELP)
    momentum_decay: float = option(default=4e-3, at_least=0, help="how fast the momentum warms up")
    decoupled_weight_decay: bool = option(
        default=False, help="decay the weights as AdamW does, instead of adding to the gradient"
    )

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """`torch.optim.NAdam` over the parameters of `ctx.model`."""
        decoupled, decay = self.decoupled_weight_decay, self.momentum_decay
        return self.build(
            torch.optim.NAdam, ctx, betas=self.betas, eps=self.eps, momentum_decay=decay, decoupled_weight_decay=decoupled
        )


@component
class RAdam(TorchOptimizer):
    """Rectified Adam (Liu et al. 2020, arXiv:1908.03265, algorithm 2): Adam's step times r(t).

    With ρ∞ = 2/(1−β2) − 1 and ρ = ρ∞ − 2tβ2ᵗ/(1−β2ᵗ), r = √((ρ−4)(ρ−2)ρ∞ / ((ρ∞−4)(ρ∞−2)ρ)) once ρ > 5, and θ ← θ − ηm̂ before.
    """

    lr: float = option(default=1e-3, at_least=0, help=LR_HELP)
    betas: tuple[float, float] = betas(0.9, 0.999)
    eps: float = option(default=1e-8, at_least=0, help=EPS_HELP)
    decoupled_weight_decay: bool = option(
        default=False, help="decay the weights as AdamW does, instead of adding to the gradient"
    )

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """`torch.optim.RAdam` over the parameters of `ctx.model`."""
        decoupled = self.decoupled_weight_decay
        return self.build(torch.optim.RAdam, ctx, betas=self.betas, eps=self.eps, decoupled_weight_decay=decoupled)
