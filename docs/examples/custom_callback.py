"""A callback of your own, with options, state that survives a resume, and a reason to stop.

python docs/examples/custom_callback.py
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import TensorDataset

from drivetrain import Callback, CallbackContext, Trainer, TrainingConfig, TrainOutput, component, option, state


@component
class LossFloor(Callback):
    """Stop when the training loss stays under a floor.

    For `callbacks = [{use = "loss_floor", floor = 0.1}]` in a configuration, ship it in a package whose pyproject.toml says

        [project.entry-points."drivetrain.callback"]
        loss_floor = "my_package:LossFloor"
    """

    floor: float = option(help="stop below this loss")
    patience: int = option(default=3, at_least=1, help="logging steps in a row")
    hits: int = state(default=0)  # saved in every checkpoint and restored from it

    def on_log(self, ctx: CallbackContext) -> None:
        # in on_log the values are on the host already: reading them waits for nothing
        self.hits = self.hits + 1 if ctx.metrics["train/loss"] < self.floor else 0
        if self.hits >= self.patience:
            ctx.stop(f"the loss was under {self.floor} {self.hits} times in a row")


def main() -> TrainOutput:
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    model = nn.Linear(8, 1)
    config = TrainingConfig(max_duration="100ep", per_device_batch_size=32, optimizer={"use": "adamw", "lr": 1e-2})
    return Trainer(model, config, data, loss=nn.MSELoss(), callbacks=[LossFloor(floor=0.1)]).train()


if __name__ == "__main__":
    output = main()
    print(f"stopped after {output.steps} steps: {output.stop_reason}")
