"""Train the same small model with the options given by name; rank 0 writes what came out and what was seen on the way."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import TensorDataset

from drivetrain import CallbackContext, Component, OptimizerComponent, Precision, Trainer, TrainingConfig, component
from drivetrain.cluster import detect

WORLD, RANK = detect().world_size, detect().rank
WIDTH = 8


class Block(nn.Module):
    """A residual layer of two matrices, that remembers how it was called."""

    seen: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen["weights"], self.seen["inputs"] = str(self.up.weight.dtype), str(x.dtype)
        return x + self.down(self.up(x).tanh())


class Model(nn.Module):
    tensor_parallel_plan: ClassVar[dict[str, str]] = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.last = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.tensor([0.5, 2.0]).prod())
        if tied:
            self.last.weight = self.first.weight
        else:
            nn.init.normal_(self.last.weight, std=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x) * self.scale


class Plain(nn.Sequential):
    """Layers that can all be filled by their own `reset_parameters`."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(WIDTH, WIDTH), *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)) for _ in range(3))
        )


@component
class Built(Component):
    """The model as a configuration names it."""

    kind: ClassVar[str] = "model"
    tied: bool = False

    def make_model(self, ctx: CallbackContext) -> nn.Module:
        return Model(self.tied)


@component
class Momentum(OptimizerComponent):
    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameter_groups(ctx.model), lr=0.1, momentum=0.9)


class Half(Precision):
    """Autocast to bfloat16, as the precision plugin's bf16."""

    dtype = torch.bfloat16

    def forward(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16)


def made(kind: str) -> dict[str, Any]:
    """What gives the model, as arguments: "built" or "tied" by the configuration; or given, "plain", and on "meta"."""
    if kind in ("built", "tied"):
        return {"model": Built(tied=kind == "tied")}
    torch.manual_seed(0)
    with torch.device("meta" if kind == "meta" and WORLD > 1 else "cpu"):
        return {"given": Plain()}


def values(tensors: Any) -> list[float]:
    return [x for t in tensors for x in t.detach().reshape(-1).tolist()]


def run(
    options: dict[str, Any] | None = None, model: str = "built", half: bool = False, data_ranks: int = WORLD, **given: Any
) -> dict[str, Any]:
    """Train four steps of 8 samples with these options of the strategy; what came out, and what was seen on the way."""
    how = made(model)
    config = TrainingConfig(
        model=how.get("model"),
        max_duration="4st",
        per_device_batch_size=8 // data_ranks // 2,
        gradient_accumulation_steps=2,
        standard_callbacks=False,
        max_grad_norm=0.5,
        optimizer=Momentum(),
        scheduler=Component(),
        distributed={"use": "fsdp", **(options or {})} if WORLD > 1 else "none",
        **given,
    )
    inputs = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(inputs, inputs.cumsum(1))
    Block.seen.clear()
    torch.manual_seed(0)  # what a plain model on the meta device draws its weights from
    trainer = Trainer(how.get("given"), config, data, loss=nn.MSELoss(), precision=Half() if half else Precision())
    ctx = trainer.ctx
    first = values(ctx.strategy.model_state(ctx.model).values())
    losses = [ctx.strategy.sum(step.loss_tensor).item() / WORLD for step in trainer.steps()]
    return {
        "first": first,
        "losses": losses,
        "last": values(ctx.strategy.model_state(ctx.model).values()),
        "local": [list(getattr(p, "_local_tensor", p).shape) for p in ctx.model.parameters()],
        "seen": dict(Block.seen),
    }


if __name__ == "__main__":
    found = {name: run(**arguments) for name, arguments in json.loads(sys.argv[2]).items()}
    if RANK == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
