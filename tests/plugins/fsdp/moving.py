"""Train three steps and save, or load and train three more; rank 0 writes what it saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from drivetrain import Callback, CallbackContext, Precision, Trainer, TrainingConfig
from drivetrain.cluster import detect

WORLD = detect().world_size


def whole(tensors: Any) -> list[float]:
    return torch.cat([(t.full_tensor() if hasattr(t, "full_tensor") else t).detach().reshape(-1) for t in tensors]).tolist()


class Move(Callback):
    def __init__(self, what: str, path: str) -> None:
        self.what, self.path, self.seen = what, path, dict[str, Any]()

    def on_restore(self, ctx: CallbackContext) -> None:
        if self.what == "load":
            ctx.load_state_dict(torch.load(self.path, weights_only=True))
            self.seen["at_load"] = whole(ctx.model.parameters())

    def on_step_end(self, ctx: CallbackContext) -> None:
        if self.what == "save" and ctx.step == 3:
            state = ctx.state_dict()
            self.seen["at_save"] = whole(ctx.model.parameters())
            self.seen["shapes"] = [list(p.shape) for p in ctx.model.parameters()]
            self.seen["local_shapes"] = [list(getattr(p, "_local_tensor", p).shape) for p in ctx.model.parameters()]
            if ctx.is_main:
                torch.save(state, self.path)


def main(what: str, path: str, target: str) -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))
    model = nn.Sequential(nn.Linear(4, 8), blocks, nn.Linear(8, 1))
    rows = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
    config = TrainingConfig(
        max_duration="6st",
        per_device_batch_size=8 // WORLD,
        standard_callbacks=False,
        distributed="fsdp" if WORLD > 1 else "none",
    )
    move = Move(what, path)
    data = TensorDataset(rows, rows[:, :1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = Trainer(model, config, data, loss=nn.MSELoss(), optimizer=optimizer, callbacks=[move], precision=Precision())
    trainer.train()
    end = whole(trainer.ctx.model.parameters())
    if trainer.ctx.is_main:
        Path(target).write_text(json.dumps(move.seen | {"end": end}))


if __name__ == "__main__":
    main(*sys.argv[1:])
