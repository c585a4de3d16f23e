"""Muon from torch.optim for the hidden matrices, AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from drivetrain import CallbackContext, ConfigError, PluginError, Problem, component, option
from drivetrain_optimizers.base import DECAY_HELP, LR_HELP, TorchOptimizer, betas, why_not_fused
from drivetrain_optimizers.joined import Joined


class MuonAdamW(Joined):
    """`torch.optim.Muon` and `torch.optim.AdamW` as one optimizer.

    Each group says under `algorithm` whose it is: "muon" (matrices only) or "adamw". The settings are those of torch's two.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        classes = {"muon": torch.optim.Muon, "adamw": torch.optim.AdamW}
        owned = {name: [group for group in groups if group["algorithm"] == name] for name in classes}
        super().__init__([classes[name](own) for name, own in owned.items() if own])


@component
class MuonTorch(TorchOptimizer):
    """Muon as torch ships it for the hidden matrices, AdamW for everything else, both in one optimizer.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): m ← μm + (1−μ)g, u = (1−μ)g + μm,
    θ ← θ(1 − ηλ) − η·s·NS(u), where NS, five Newton-Schulz steps in bfloat16, makes u nearly orthogonal. `adjust_lr` chooses s:
    0.2√max(rows, columns), with which AdamW's learning rate fits both parts (Liu et al. 2025, arXiv:2502.16982, equation 4), or
    the `original` √max(1, rows/columns).

    Hidden are all parameters of two dimensions but embeddings and the output layer, which is what `get_output_embeddings()`
    says or else the last linear one; say it yourself with `adamw`. One matrix at a time, no kernels of convolutions, no
    sharding: for large or sharded models take `muon` (pip install drivetrain-muon).
    """

    lr: float = option(default=1e-3, at_least=0, help=LR_HELP)
    weight_decay: float = option(default=0.1, at_least=0, help=DECAY_HELP)
    momentum: float = option(default=0.95, at_least=0, below=1, help="averaging factor of Muon's gradients")
    ns_steps: int = option(default=5, at_least=0, help="Newton-Schulz steps")
    adjust_lr: Literal["match_rms_adamw", "original"] = option(
        default="match_rms_adamw", help="how a matrix' shape scales Muon's learning rate"
    )
    adamw: list[str] | None = option(
        default=None, help="name patterns of the matrices left to AdamW; default: embeddings and the output layer"
    )
    adamw_lr: float | None = option(default=None, at_least=0, help="peak learning rate of the AdamW part; default: lr")
    betas: tuple[float, float] = betas(0.9, 0.95)
    eps: float = option(default=1e-8, at_least=0, help="added to AdamW's denominator")

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """Muon and AdamW over `ctx.model`.

        Raises:
            ConfigError: when no matrix is left for Muon, or a pattern matches nothing.
            PluginError: when torch is older than 2.9 and has no Muon.
        """
        if not hasattr(torch.optim, "Muon"):
            raise PluginError(
                f"muon_torch needs torch 2.9 or newer, here is {torch.__version__}. Upgrade, or use drivetrain-muon."
            )
        hidden = self._hidden(ctx.model)
        fused = why_not_fused(torch.optim.AdamW, ctx.model) is None
        muon = {
            "algorithm": "muon",
            "momentum": self.momentum,
            "ns_steps": self.ns_steps,
            "adjust_lr_fn": self.adjust_lr,
        }
        adamw = {"algorithm": "adamw", "betas": self.betas, "eps": self.eps, "fused": fused or None}
        rest = copy(self)
        rest.lr = self.lr if self.adamw_lr is None else self.adamw_lr
        groups = [group | muon for group in _only(self.parameter_groups(ctx.model), hidden, True)]
        groups += [group | adamw for group in _only(rest.parameter_groups(ctx.model), hidden, False)]
        return MuonAdamW(groups)

    def _hidden(self, model: nn.Module) -> set[str]:
        """The names of the parameters that Muon updates."""
        groups = self.parameter_groups(model)  # for its names, which are those without DDP's and others' prefixes
        pairs = [(name, p) for g in groups for name, p in zip(g["param_names"], g["params"], strict=True)]
        matrices = {name: p for name, p in pairs if p.ndim == 2}
        if self.adamw is None:
            outer = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
            outer.add(id(_head_weight(model)))
            hidden = {name for name, p in matrices.items() if id(p) not in outer}
        else:
            for index, pattern in enumerate(self.adamw):
                if not any(fnmatchcase(name, pattern) for name in matrices):
                    message = f"the pattern {pattern!r} matches no matrix (there are {', '.join(list(matrices)[:3]) or 'none'})"
                    raise ConfigError([Problem(f"{self.path}.adamw[{index}]", message)])
            hidden = {name for name in matrices if not any(fnmatchcase(name, pattern) for pattern in self.adamw)}
        if not hidden:
            message = "no matrix is left for Muon: the model has none between its embeddings and its output layer. Use adamw."
            raise ConfigError([Problem(self.path, message)])
        return hidden


def _head_weight(model: nn.Module) -> torch.Tensor | None:
    """The weight of the layer that makes the outputs: what `get_output_embeddings()` says, as models of transformers have it, for
    others the last linear layer's; None without one."""
    for module in model.modules():  # wrapped or not
        ask = getattr(module, "get_output_embeddings", None)
        if callable(ask) and (found := ask()) is not None:
            return getattr(found, "weight", None)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1].weight if linear else None


def _only(groups: list[dict[str, Any]], names: set[str], inside: bool) -> Iterator[dict[str, Any]]:
    """The groups reduced to the parameters whose name is in `names` (or is not); without those that become empty."""
    for group in groups:
        kept = [(name, p) for name, p in zip(group["param_names"], group["params"], strict=True) if (name in names) is inside]
        if kept:
            yield {**group, "param_names": [name for name, _ in kept], "params": [p for _, p in kept]}
