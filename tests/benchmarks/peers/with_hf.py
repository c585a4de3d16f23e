"""Hugging Face's Trainer, as its documentation and examples resume: `get_last_checkpoint`; SIGTERM by `enable_jit_checkpoint`."""

from __future__ import annotations

import shutil
from pathlib import Path

from task import BATCH, EPOCHS, Rows, Task, build, finish
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

DISTRIBUTIONS = ("transformers", "accelerate")


def train(folder: Path, task: Task) -> int:
    """The same call each time."""
    model = build(task, folder)
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="random" if task.shuffle else "sequential",
        dataloader_num_workers=task.workers,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=task.every,
        save_total_limit=2,
        enable_jit_checkpoint=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    last = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    Trainer(model, arguments, train_dataset=Rows(task)).train(resume_from_checkpoint=last)
    finish(model, folder)
    return 0


def newest(folder: Path) -> Path:
    """Where the newest checkpoint is."""
    found = get_last_checkpoint(str(folder / "run"))
    if found is None:
        raise FileNotFoundError(folder)
    return Path(found)


def mend(folder: Path) -> None:
    """What a person would do: remove the newest one."""
    shutil.rmtree(newest(folder))
