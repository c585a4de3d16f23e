"""Vision: a small convolutional network learns scikit-learn's handwritten digits, through the Python interface.

python docs/examples/digits.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset, random_split

from drivetrain import Trainer, TrainingConfig, TrainOutput


def accuracy(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The share of right answers in one batch; the evaluation averages it over all of them."""
    _, labels = batch
    return {"accuracy": (outputs.argmax(1) == labels).float().mean()}


def main() -> TrainOutput:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8), from 0 to 1
    data = TensorDataset(images, torch.tensor(digits.target))
    train, held_out = random_split(data, [1397, 400], torch.Generator().manual_seed(0))

    torch.manual_seed(0)  # the model is made here, so its first weights are ours to fix
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # (32, 4, 4)
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # (64, 2, 2)
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip

    config = TrainingConfig(
        max_duration="10ep",
        per_device_batch_size=32,
        optimizer={"use": "adamw", "lr": 3e-3},
        scheduler={"use": "cosine", "warmup": "1ep"},
    )
    return Trainer(model, config, train, held_out, loss=nn.CrossEntropyLoss(), compute_metrics=accuracy).train()


if __name__ == "__main__":
    output = main()
    print(f"{output.steps} steps, {output.seconds:.1f} s, {output.metrics['eval/accuracy']:.1%} of the held-out digits right")
