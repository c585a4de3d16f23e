"""Your own loop around the same engine: the steps, callbacks and checkpoints are those of `trainer.train()`.

python docs/examples/own_loop.py
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import TensorDataset

from drivetrain import Trainer, TrainingConfig, TrainOutput


def main() -> TrainOutput:
    torch.manual_seed(0)
    x = torch.linspace(-3, 3, 1024).unsqueeze(1)
    data = TensorDataset(x, x.sin())
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)  # a ready torch object is as good as a name

    config = TrainingConfig(max_duration="2000st", per_device_batch_size=64)
    trainer = Trainer(model, config, data, loss=nn.MSELoss(), optimizer=optimizer)
    for step in trainer.steps():
        if step.number % 100 == 0:  # reading `step.loss` waits for the device, so not on every step
            print(f"step {step.number}: loss {step.loss:.4f}")
            if step.loss < 1e-3:
                break  # ends the run in good order: the callbacks see its end
    return trainer.output


if __name__ == "__main__":
    output = main()
    print(f"{output.steps} steps: {output.stop_reason}")
