"""Muon for Drivetrain: orthogonalized updates for the hidden matrices, AdamW for everything else, in one optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from drivetrain import CallbackContext, ConfigError, OptimizerComponent, Problem, component, option
from drivetrain_muon.optimizer import Muon
from drivetrain_muon.orthogonal import orthogonalize

__all__ = ["Muon", "MuonComponent", "head_weight", "orthogonalize"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@component
class MuonComponent(OptimizerComponent):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the hidden matrices, AdamW for the rest, in one optimizer.

    m ← μm + (1−μ)g, u = (1−μ)g + μm, θ ← θ(1 − ηλ) − η·s·O, where O is nearly UVᵀ for u = UΣVᵀ, by the polynomials of Polar
    Express (Amsel et al. 2025, arXiv:2505.16932) or by Newton-Schulz. `adjust_lr` chooses s: 0.2√max(rows, columns), with which
    AdamW's learning rate fits both parts (Liu et al. 2025, arXiv:2502.16982, equation 4), or the `original` √max(1, rows/columns).
    Matrices of one shape are orthogonalized together: in bfloat16 on GPUs, in float32 on CPUs. Sharded ones are gathered first.

    Hidden are all parameters of two dimensions but embeddings and the output layer (`head_weight`), and the kernels of convolutions
    without groups, as matrices of [outputs, inputs × positions]; say it yourself with `adamw`.
    """

    lr: float = option(default=1e-3, at_least=0, help="peak learning rate; the schedule multiplies it")
    weight_decay: float = option(default=0.1, at_least=0, help="decay of the weights it applies to, see `decay`")
    momentum: float = option(default=0.95, at_least=0, below=1, help="averaging factor of the matrices' gradients")
    coefficients: Literal["polar_express", "newton_schulz"] = option(
        default="polar_express", help="polynomials of the orthogonalization"
    )
    ns_steps: int = option(default=5, at_least=1, help="how many of them")
    adjust_lr: Literal["match_rms_adamw", "original"] = option(
        default="match_rms_adamw", help="how a matrix' shape scales its learning rate"
    )
    normuon: bool = option(
        default=False, help="even out the rows' sizes by a running mean of their squares (Li et al. 2025, arXiv:2510.05491)"
    )
    normuon_beta: float = option(default=0.95, at_least=0, below=1, help="averaging factor of those squares")
    cautious: bool = option(
        default=False,
        help="decay only those weights of the matrices that the update moves towards zero (Chen et al. 2025, arXiv:2510.12402)",
    )
    adamw: list[str] | None = option(
        default=None, help="name patterns of the matrices left to AdamW; default: embeddings and the output layer"
    )
    adamw_lr: float | None = option(default=None, at_least=0, help="peak learning rate of the AdamW part; default: lr")
    betas: tuple[float, float] = option(
        default=(0.9, 0.95), at_least=0, below=1, help="AdamW's averaging factors of gradient and squared gradient"
    )
    eps: float = option(default=1e-8, at_least=0, help="added to AdamW's denominator")

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        """`Muon` over the parameters of `ctx.model`.

        Raises:
            ConfigError: when no matrix is left for Muon, or a pattern matches nothing.
        """
        hidden = self._hidden(ctx.model)
        settings = {
            "momentum": self.momentum,
            "coefficients": self.coefficients,
            "ns_steps": self.ns_steps,
            "adjust_lr": self.adjust_lr,
            "normuon": self.normuon,
            "normuon_beta": self.normuon_beta,
            "cautious": self.cautious,
        }
        rest = copy(self)
        rest.lr = self.lr if self.adamw_lr is None else self.adamw_lr
        groups = [{**g, **settings, "algorithm": "muon"} for g in _only(self.parameter_groups(ctx.model), hidden, True)]
        groups += [{**g, "algorithm": "adamw"} for g in _only(rest.parameter_groups(ctx.model), hidden, False)]
        return Muon(groups, betas=self.betas, eps=self.eps)

    def _hidden(self, model: nn.Module) -> set[int]:
        """The `id`s of the parameters that Muon updates."""
        groups = self.parameter_groups(model)
        pairs = [(name, p) for g in groups for name, p in zip(g["param_names"], g["params"], strict=True)]
        kernels = {id(m.weight) for m in model.modules() if isinstance(m, _CONVOLUTIONS) and m.groups == 1}
        matrices = {name: id(p) for name, p in pairs if p.ndim == 2 or id(p) in kernels}
        if self.adamw is None:
            outer = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
            outer.add(id(head_weight(model)))
            hidden = set(matrices.values()) - outer
        else:
            self._check_patterns(self.adamw, list(matrices))
            hidden = {i for name, i in matrices.items() if not any(fnmatchcase(name, pattern) for pattern in self.adamw)}
        if not hidden:
            message = "no matrix is left for Muon: the model has none between its embeddings and its output layer. Use adamw."
            raise ConfigError([Problem(self._path, message)])
        return hidden

    def _check_patterns(self, patterns: list[str], names: list[str]) -> None:
        said = ", ".join(names[:3]) or "none"
        problems = [
            Problem(f"{self._path}.adamw[{index}]", f"the pattern {pattern!r} matches no matrix (there are {said})")
            for index, pattern in enumerate(patterns)
            if not any(fnmatchcase(name, pattern) for name in names)
        ]
        if problems:
            raise ConfigError(problems)

    @property
    def _path(self) -> str:
        return self.plugin_name.replace(":", ".") or "optimizer"


def head_weight(model: nn.Module) -> torch.Tensor | None:
    """The weight of the layer that makes the outputs: what `get_output_embeddings()` says, as models of transformers have it, for
    others the last linear layer's; None without one."""
    for module in model.modules():  # wrapped or not
        ask = getattr(module, "get_output_embeddings", None)
        if callable(ask) and (found := ask()) is not None:
            return getattr(found, "weight", None)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1].weight if linear else None


def _only(groups: list[dict[str, Any]], chosen: set[int], inside: bool) -> Iterator[dict[str, Any]]:
    """The groups reduced to the parameters whose `id` is chosen (or is not); without those that become empty."""
    for group in groups:
        pairs = zip(group["param_names"], group["params"], strict=True)
        kept = [(name, p) for name, p in pairs if (id(p) in chosen) is inside]
        if kept:
            yield {**group, "param_names": [name for name, _ in kept], "params": [p for _, p in kept]}
