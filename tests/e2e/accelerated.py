"""What `accelerate launch` starts: the same run on each process; rank 0 writes the weights."""

from __future__ import annotations

import sys

import torch

from drivetrain import Trainer, TrainingConfig
from drivetrain_testing import tiny_data

torch.manual_seed(0)
model = torch.nn.Linear(6, 1)
sizes = {"global_batch_size": 16, "per_device_batch_size": 8}
config = TrainingConfig(**sizes, max_duration="2ep", optimizer="sgd", precision="fp32", standard_callbacks=False, device="cpu")
trainer = Trainer(model, config, tiny_data(), loss=torch.nn.MSELoss())
trainer.train()
if trainer.ctx.is_main:
    torch.save({"world_size": trainer.ctx.strategy.world_size, "model": trainer.model.state_dict()}, sys.argv[1])
