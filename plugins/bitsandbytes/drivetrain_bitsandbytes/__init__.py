"""The 8-bit optimizers of bitsandbytes for Drivetrain, by name.

In the formulas θ is a parameter, g its gradient, η the learning rate, λ the weight decay, t the step, counted from 1. Everything
but the state is computed in float32.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from drivetrain import CallbackContext, component, option
from drivetrain_bitsandbytes.base import DECAY_HELP, EPS_HELP, LR_HELP, Optimizer8bit, embeddings, optim

__all__ = [
    "AdEMAMix8bit",
    "Adam8bit",
    "AdamW8bit",
    "Lion8bit",
    "Optimizer8bit",
    "PagedAdEMAMix8bit",
    "PagedAdamW8bit",
    "PagedLion8bit",
    "RMSprop8bit",
    "SGD8bit",
    "embeddings",
]

_BETAS = "averaging factors of gradient and squared gradient"


@component
class AdamW8bit(Optimizer8bit):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2) with 2.03 bytes of state for each parameter instead of 8.

    m ← β1·m + (1−β1)g, v ← β2·v + (1−β2)g², θ ← θ(1 − ηλ) − η·m̂/(√v̂ + ε), with m̂ = m/(1−β1ᵗ) and v̂ = v/(1−β2ᵗ). The 8 bits:
    Dettmers et al. 2022, arXiv:2110.02861, section 2. Embeddings and small tensors keep a 32-bit state.

    On a GPU bitsandbytes waits for the device after each parameter's update.
    """

    algorithm: ClassVar[type[torch.optim.Optimizer]] = optim.AdamW8bit

    weight_decay: float = option(default=0.01, at_least=0, help=DECAY_HELP)
    betas: tuple[float, float] = option(default=(0.9, 0.999), at_least=0, below=1, help=_BETAS)
    eps: float = option(default=1e-8, at_least=0, help=EPS_HELP)

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """The optimizer over the parameters of `ctx.model`."""
        return self.build(ctx, betas=self.betas, eps=self.eps)


@component
class PagedAdamW8bit(AdamW8bit):
    """`adamw_8bit` whose state gives way to activations: in managed memory, which the driver moves to the host when the GPU is full.

    Dettmers et al. 2023 (QLoRA, arXiv:2305.14314), section 3, "Paged Optimizers". CUDA only; tensors under 100,000 elements are
    not paged, nor is what a resumed run has read from its checkpoint. Meant for peaks: a state that never fits makes each step
    wait
    for the host's memory, and far too little memory can hang a GPU.
    """

    algorithm: ClassVar[type[torch.optim.Optimizer]] = optim.PagedAdamW8bit
    paged: ClassVar[bool] = True


@component
class Adam8bit(AdamW8bit):
    """Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1) with an 8-bit state: `adamw_8bit`, by default without weight decay.

    Weight decay, if set, is decoupled as in AdamW: bitsandbytes has no other in its Adam.
    """

    algorithm: ClassVar[type[torch.optim.Optimizer]] = optim.Adam8bit

    weight_decay: float = option(default=0.0, at_least=0, help=DECAY_HELP)


@component
class Lion8bit(Optimizer8bit):
    """Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2) with 1.02 bytes of state for each parameter instead of 4.

    u = sign(β1·m + (1−β1)g), θ ← θ(1 − ηλ) − ηu, m ← β2·m + (1−β2)g. The learning rate is 3 to 10 times smaller than AdamW's and the
    weight decay as much larger (section 5 of the paper). Embeddings and small tensors keep a 32-bit state.
    """

    algorithm: ClassVar[type[torch.optim.Optimizer]] = optim.Lion8bit

    lr: float = option(default=1e-4, at_least=0, help=LR_HELP)
    betas: tuple[float, float] = option(
        default=(0.9, 0.99), at_least=0, below=1, help="averaging factors of the update and of the momentum"
    )

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """The optimizer over the parameters of `ctx.model`."""
        return self.build(ctx, betas=self.betas)


@component
class PagedLion8bit(Lion8bit):
    """`lion_8bit` with its state in paged memory; see `paged_adamw_8bit`. CUDA only."""

    algorithm: ClassVar[type[torch.optim.Optimizer]] = optim.PagedLion8bit
    paged: ClassVar[bool] = True


@component
class AdEMAMix8bit(Optimizer8bit):
    """AdEMAMix (Pagliardini et al. 2024, arXiv:2409.03137, algorithm 1): AdamW with a second, slow average of the gradient.

    m1 ← β1·m1 + (1−β1)g, m2 ← β3·m2 + (1−β3)g, v ← β2·v + (1−β2)g²,
    θ ← θ(1 − ηλ) − η·(m1/(1−β1ᵗ) + α·m2)/(√(v/(1−β2ᵗ)) + ε). 3.05 bytes of state for each parameter instead of 12.

    With `ramp`, α and β3 grow to their values over that many steps (equations 3 and 4 of the paper), which early steps need:
    set it to the length of the run. Embeddings and small tensors keep a 32-bit state.
    """

    algorithm: ClassVar[type[torch.optim.Optimizer]] = optim.AdEMAMix8bit

    weight_decay: float = option(default=0.01, at_least=0, help=DECAY_HELP)
    betas: tuple[float, float, float] = option(
        default=(0.9, 0.999, 0.9999),
        at_least=0,
        below=1,
        help="averaging factors of gradient, squared gradient, and gradient, slowly",
    )
    alpha: float = option(default=5.0, at_least=0, help="weight of the slow average")
    ramp: int | None = option(default=None, at_least=1, help="steps over which alpha and the slow averaging factor grow")
    eps: float = option(default=1e-8, at_least=0, help=EPS_HELP)

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """The optimizer over the parameters of `ctx.model`."""
        return self.build(ctx, betas=self.betas, alpha=self.alpha, t_alpha=self.ramp, t_beta3=self.ramp, eps=self.eps)


@component
class PagedAdEMAMix8bit(AdEMAMix8bit):
    """`ademamix_8bit` with its state in paged memory; see `paged_adamw_8bit`. CUDA only."""

    algorithm: ClassVar[type[torch.optim.Optimizer]] = optim.PagedAdEMAMix8bit
    paged: ClassVar[bool] = True


@component
class SGD8bit(Optimizer8bit):
    """Stochastic gradient descent with an 8-bit momentum (Sutskever et al. 2013, ICML, equations 1 and 2): b ← μb + g + λθ, θ ← θ − ηb.

    1.02 bytes of state for each parameter instead of 4. Embeddings and small tensors keep a 32-bit state.
    """

    algorithm: ClassVar[type[torch.optim.Optimizer]] = optim.SGD8bit

    lr: float = option(default=1e-2, at_least=0, help=LR_HELP)
    momentum: float = option(
        default=0.9, above=0, below=1, help="factor of the earlier updates; without momentum there is no state"
    )

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """The optimizer over the parameters of `ctx.model`."""
        return self.build(ctx, momentum=self.momentum)


@component
class RMSprop8bit(Optimizer8bit):
    """RMSprop (Hinton 2012, lecture 6e) with an 8-bit state: v ← αv + (1−α)(g + λθ)², θ ← θ − η(g + λθ)/(√v + ε).

    1.02 bytes of state for each parameter instead of 4. Embeddings and small tensors keep a 32-bit state.
    """

    algorithm: ClassVar[type[torch.optim.Optimizer]] = optim.RMSprop8bit

    lr: float = option(default=1e-2, at_least=0, help=LR_HELP)
    alpha: float = option(default=0.99, above=0, below=1, help="averaging factor of the squared gradient")
    eps: float = option(default=1e-8, at_least=0, help=EPS_HELP)

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """The optimizer over the parameters of `ctx.model`."""
        return self.build(ctx, alpha=self.alpha, eps=self.eps)
