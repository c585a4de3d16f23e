"""Drivetrain: bare, with the usual callbacks, and as it comes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantized import RANK
from task import Task, Timed, build, data, optimizer

from drivetrain import Trainer, TrainingConfig

WATCHED: list[Any] = [  # "progress, logging every 50, checkpoint and early stopping"
    "progress",
    {"use": "logging", "trackers": ["jsonl", "tensorboard"]},
    {"use": "checkpoint", "every": "100000st", "save_at_end": False},
    {"use": "early_stopping", "monitor": "train/loss", "patience": 1_000_000},
]


def train(task: Task, callbacks: list[Any] | None = None, torchs: bool = False) -> Timed:
    """With the best settings of the task and nothing that listens, unless `callbacks` are given; else all defaults.

    Args:
        torchs: with an AdamW of torch's own, as everybody else has, instead of the engine's.
    """
    model, loss = build(replace(task, qlora=False))
    common: dict[str, Any] = {
        "seed": task.seed,
        "max_duration": f"{task.steps}st",
        "per_device_batch_size": task.batch,
        "dataloader": {"drop_last": True},
        "scheduler": "linear",
        "max_grad_norm": task.max_norm,
        "output_dir": task.folder,
        "resume": "never",
        "device": task.device,
        "compile": task.compiled,
    }
    if task.qlora:
        common["training_mode"] = {"use": "qlora", "r": RANK, "alpha": RANK, "dropout": 0.0}
    adamw: dict[str, Any] = {"use": "adamw", "lr": task.lr, "weight_decay": task.weight_decay}
    if task.best:
        interval = f"{50 if callbacks else task.steps}st"
        common |= {
            "precision": "bf16" if task.bf16 else "fp32",
            "standard_callbacks": False,
            # in each run unless it is told otherwise, and no setting that others have: it keeps a CPU's freed memory
            "callbacks": callbacks or (["gc"] if task.turn else []),
            "log_interval": interval,
        }
        adamw["decay"] = "all"  # one group of parameters, as everybody else has
    config = TrainingConfig(optimizer=adamw, **common)
    Trainer(model, config, data(task), loss=loss, optimizer=optimizer(model, task) if torchs else None).train()
    return model


def train_with_torchs(task: Task) -> Timed:
    """What is left of a step is the engine alone."""
    return train(task, torchs=True)


def train_watched(task: Task) -> Timed:
    """With progress, logging every 50 steps, checkpoint and early stopping."""
    return train(task, WATCHED)
