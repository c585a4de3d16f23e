"""Lightning: a module and its Trainer; the best settings switch off what can be switched off."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.plugins.environments import LightningEnvironment
from task import Task, Timed, build, loader, optimizer, schedule
from torch import Tensor


class Module(lightning.LightningModule):
    """As its documentation shows."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.net, self.loss = build(task)

    def training_step(self, batch: Any, index: int) -> Tensor:
        """The loss of one batch."""
        x, y = batch
        value = self.loss(self.net(x), y)
        if not self.task.best:
            self.log("train_loss", value, prog_bar=True)
        return value  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        """The optimizer, its schedule counted in steps."""
        refused = self.task.bf16  # in mixed precision Lightning does not clip for a fused optimizer
        made = optimizer(self, replace(self.task, best=False) if refused else self.task)
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule(made, self.task), "interval": "step"}}


def train(task: Task) -> Timed:
    """Fit."""
    warnings.filterwarnings("ignore")
    quiet: dict[str, Any] = {"barebones": True} if task.best else {}
    trainer = lightning.Trainer(
        max_steps=task.steps,
        max_epochs=-1,
        accelerator="cpu" if task.device == "cpu" else "gpu",
        precision="bf16-mixed" if task.bf16 else "32-true",
        devices=1,
        gradient_clip_val=task.max_norm,
        default_root_dir=task.folder,
        plugins=[LightningEnvironment()],  # else it asks an mpi4py that may be there for MPI
        **quiet,
    )
    module = Module(task)
    if task.compiled:
        for block in getattr(module.net, "blocks", [module.net]):
            block.compile()
    trainer.fit(module, loader(task))
    return module.net
