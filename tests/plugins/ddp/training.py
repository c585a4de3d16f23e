"""What one process of the test does: train several configurations and let rank 0 write what came out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from drivetrain import Callback, CallbackContext, Loss, ModelError, Precision, Trainer, TrainingConfig, component, option


class Tokens(nn.Module):
    """Samples with unequal numbers of targets; `weighted=False` is the control that ignores them."""

    def __init__(self, weighted: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.weighted = nn.Linear(4, 8), nn.Linear(8, 5), weighted

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Loss | torch.Tensor:
        logits = self.head(self.body(x).tanh()).flatten(0, 1)
        total = nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
        count = (labels != -100).sum()
        return Loss(total, count) if self.weighted else total / count


def token_data(n: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 5, (n, 6), generator=generator)
    for row in range(n):
        labels[row, 1 + row % 5 :] = -100
    return [{"x": torch.randn(6, 4, generator=generator), "labels": labels[row]} for row in range(n)]


def whole(tensors: Any) -> list[float]:
    """The values of all tensors; sharded ones are put together, in which every rank takes part."""
    parts = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors if t is not None]
    return torch.cat([part.detach().reshape(-1) for part in parts]).tolist()


def mlp() -> nn.Module:
    torch.manual_seed(1)
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)))
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), blocks, nn.Linear(8, 1))


class Leaves(nn.Module):
    """Leaves a layer out of the loss: always, or for rows whose first number is at most 1, as all are in some batches."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body, self.extra, self.head, self.always = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1), always

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with_extra = (x[:, 0] > 1) & (not self.always)
        x = self.body(x).tanh()
        if with_extra.any():
            x = torch.where(with_extra[:, None], self.extra(x), x)
        return self.head(x)


def graphs(pairs: Any, world: int) -> dict[str, Any]:
    """Models with the same graph in every step, and models without, under the options that are for them."""

    def of(model: nn.Module, **options: Any) -> dict[str, Any]:
        try:
            return run(model, pairs, world, distributed={"use": "ddp", **options} if world > 1 else "none")
        except ModelError as error:
            return {"error": str(error)}

    return {
        "static": of(mlp(), static_graph=True),
        "some": of(Leaves(always=False), find_unused_parameters=True),
        "never": of(Leaves(always=True), find_unused_parameters=True),
        "unsaid": of(Leaves(always=True)),
    }


@component
class Record(Callback):
    stop_at: int = option(default=0)
    stop_on: int | None = option(default=None, help="the rank; None for all")

    def __attrs_post_init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[list[float]] = []

    def on_gradients(self, ctx: CallbackContext) -> None:
        self.gradients.append(whole(p.grad for p in ctx.model.parameters()))

    def on_log(self, ctx: CallbackContext) -> None:
        self.losses.append(ctx.metrics["train/loss"])

    def on_step_end(self, ctx: CallbackContext) -> None:
        if self.stop_at and ctx.step == self.stop_at and self.stop_on in (ctx.strategy.rank, None):
            ctx.stop("one rank has had enough")


def run(model: nn.Module, data: Any, world: int, record: Record | None = None, **given: Any) -> dict[str, Any]:
    record = record or Record()
    loss = None if isinstance(model, Tokens) else nn.MSELoss()
    settings: dict[str, Any] = {
        "max_duration": "2ep",
        "per_device_batch_size": 24 // world // 2,
        "gradient_accumulation_steps": 2,
        "standard_callbacks": False,
        "log_interval": "1st",
        "max_grad_norm": 0.5,
        "distributed": "auto",
    }
    config = TrainingConfig(**settings | given)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    output = Trainer(
        model, config, data, data, loss=loss, optimizer=optimizer, callbacks=[record], precision=Precision()
    ).train()
    return {
        "losses": record.losses,
        "gradients": record.gradients,
        "weights": whole(model.parameters()),
        "eval": output.metrics.get("eval/loss"),
        "steps": output.steps,
        "stop": output.stop_reason,
    }


def main(target: str, strategy: str) -> None:
    """53 samples in global batches of 24: the last step of an epoch holds 5, spread over ranks and microbatches."""
    from drivetrain.cluster import detect

    world = detect().world_size
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(53, 4, generator=generator)
    pairs = TensorDataset(rows, rows.sum(1, keepdim=True))
    every = {"distributed": strategy if world > 1 else "none"}
    if strategy == "graphs":
        results = graphs(pairs, world)
        if detect().rank == 0:
            Path(target).write_text(json.dumps(results))
        return
    if strategy == "compressed":
        options: dict[str, Any] = {
            "bf16": {"compress": "bf16"},
            "powersgd": {"compress": "powersgd", "powersgd_after": 2, "powersgd_rank": 1},
        }
        results = {
            name: run(mlp(), pairs, world, distributed={"use": "ddp", **given} if world > 1 else "none")
            for name, given in options.items()
        }
        if detect().rank == 0:
            Path(target).write_text(json.dumps(results))
        return
    results = {
        "pairs": run(mlp(), pairs, world, **every),
        "tokens": run(Tokens(), token_data(53), world, **every),
        "unweighted": run(Tokens(weighted=False), token_data(53), world, **every),
        "loader": run(mlp(), DataLoader(pairs, batch_size=24 // world // 2), world, **every),
        "stopped": run(mlp(), pairs, world, Record(stop_at=2, stop_on=world - 1), log_interval="100st", **every),
        "all stopped": run(mlp(), pairs, world, Record(stop_at=2), log_interval="100st", **every),
    }
    if detect().rank == 0:
        Path(target).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
