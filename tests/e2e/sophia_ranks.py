"""What one process of test_sophia_ranks does: a few steps with Sophia, and on rank 0 the same curvature from all ranks' data by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from drivetrain import CallbackContext, Trainer, TrainingConfig, component
from drivetrain_sophia import SophiaGComponent, SophiaHComponent, sampled_cross_entropy
from drivetrain_sophia.gauss_newton import IGNORED

STEPS, CLASSES = 7, 6


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def data() -> list[tuple[Tensor, Tensor]]:
    """Samples of which more and more do not count: the ranks' numbers of labels differ."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS * 12, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (len(inputs),), generator=generator)
    labels[(torch.arange(len(labels)) % 12 > 7) & (torch.arange(len(labels)) % 3 > 0)] = IGNORED
    return list(zip(inputs, labels, strict=True))


def everybody(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


@component
class Watched(SophiaGComponent):
    """Keeps the first estimate and what it was made of."""

    def __attrs_post_init__(self) -> None:
        self.first: list[Tensor] = []
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.seeds: list[int] = []

    def logits_and_labels(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
        if not self.first:
            self.seen.append((batch[0].clone(), batch[1].clone()))
        return super().logits_and_labels(model, batch)

    def estimate(self, ctx: CallbackContext) -> list[Tensor | None]:
        found = super().estimate(ctx)
        if not self.first:
            self.first = [whole(f).clone() for f in found if f is not None]
            self.seeds = [self.generator(ctx, rank).initial_seed() for rank in range(dist.get_world_size())]
        return found


def by_hand(batches: list[list[tuple[Tensor, Tensor]]], seeds: list[int]) -> list[Tensor]:
    """B·ĝ⊙ĝ of all ranks' microbatches at once, on a model that no strategy has touched."""
    plain, losses = model(), []
    for microbatches, seed in zip(batches, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        losses += [sampled_cross_entropy(plain(inputs), labels, generator) for inputs, labels in microbatches]
    count = sum(float(loss.weight) for loss in losses)
    mean = torch.stack([loss.total for loss in losses]).sum() / count
    return [count * g.square() for g in torch.autograd.grad(mean, list(plain.parameters()))]


def run(optimizer: Any, strategy: str) -> Trainer:
    config = TrainingConfig(
        max_duration=f"{STEPS}st",
        per_device_batch_size=3,
        gradient_accumulation_steps=2,
        standard_callbacks=False,
        distributed=strategy,
        device="cpu",
        precision="fp32",
    )
    config.dataloader.shuffle = False
    given: dict[str, Any] = {"loss": nn.CrossEntropyLoss(), "scheduler": lambda position: 1.0}
    trainer = Trainer(model(), config, data(), optimizer=optimizer, **given)
    trainer.train()
    return trainer


def whole(tensor: Any) -> Tensor:
    """A sharded tensor in one piece, in which every rank takes part."""
    made: Tensor = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()
    return made


def flat(tensors: Any) -> list[float]:
    return torch.cat([whole(t).reshape(-1) for t in tensors]).tolist()


def one(strategy: str) -> dict[str, Any]:
    """Sophia-G under a strategy, beside what its first estimate should be."""
    gnb = Watched(lr=0.01, decay="all", update_interval=3)
    trainer, batches = run(gnb, strategy), everybody(gnb.seen)
    ranks = range(len(batches))
    of_each = [by_hand([batches[rank]], [gnb.seeds[rank]]) for rank in ranks]
    return {
        "estimate": everybody(flat(gnb.first)),
        "weights": everybody(flat(trainer.ctx.model.parameters())),
        "curvature": everybody(flat(state["hessian"] for state in trainer.ctx.optimizer.state.values())),
        "by hand": flat(by_hand(batches, gnb.seeds)),
        "same labels on both": flat(by_hand(batches, [gnb.seeds[0]] * len(ranks))),
        "mean of the ranks' squares": flat(torch.stack(parts).mean(0) for parts in zip(*of_each, strict=True)),
        "positions": [sum(int((labels != IGNORED).sum()) for _, labels in some) for some in batches],
    }


if __name__ == "__main__":
    result = {strategy: one(strategy) for strategy in ("ddp", "fsdp")}
    hutchinson = run(SophiaHComponent(lr=0.01, decay="all", update_interval=3, product="double_backward"), "ddp")
    result["sophia_h"] = {"weights": everybody(flat(hutchinson.model.parameters()))}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(result))
