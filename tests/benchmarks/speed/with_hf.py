"""Hugging Face's Trainer; the best settings switch off the NaN filter, the reports and the bar."""

from __future__ import annotations

from typing import Any

import torch
from task import Task, Timed, Whole, build, data, optimizer, schedule
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments


class Model(nn.Module):
    """The task's model as Trainer wants one: keywords in, a mapping with the loss out."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.net, self.loss = build(task)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute the loss."""
        return {"loss": self.loss(self.net(x), labels)}


def joined(rows: Any) -> dict[str, Tensor]:
    """A list of pairs, or a batch that was fetched whole, as a mapping."""
    x, y = rows if isinstance(rows, tuple) else (torch.stack(part) for part in zip(*rows, strict=True))
    return {"x": x, "labels": y}


def train(task: Task) -> Timed:
    """Train."""
    model = Model(task)
    best: dict[str, Any] = {"logging_nan_inf_filter": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(
        output_dir=task.folder,
        max_steps=task.steps,
        per_device_train_batch_size=task.batch,
        learning_rate=task.lr,
        weight_decay=task.weight_decay,
        max_grad_norm=task.max_norm,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        use_cpu=task.device == "cpu",
        bf16=task.bf16,
        torch_compile=task.compiled,
        seed=task.seed,
        **(best if task.best else {}),
    )
    rows: Any = Whole(data(task).tensors) if task.best else data(task)
    made = optimizer(model, task) if task.best else None
    pair = (made, schedule(made, task)) if made is not None else (None, None)
    Trainer(model, arguments, data_collator=joined, train_dataset=rows, optimizers=pair).train()
    return model.net
