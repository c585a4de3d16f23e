"""ignite: `Checkpoint` with its atomic `DiskSaver` and the `DeterministicEngine`; choosing the file is the person's own code."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from ignite.engine.deterministic import DeterministicEngine
from ignite.handlers import Checkpoint, DiskSaver, global_step_from_engine
from ignite.utils import manual_seed
from task import BATCH, EPOCHS, Rows, Task, build, finish

DISTRIBUTIONS = ("pytorch-ignite",)


def train(folder: Path, task: Task) -> int:
    """The same call each time."""
    manual_seed(1)
    model = build(task, folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(engine: Engine, batch: dict[str, torch.Tensor]) -> float:
        model.train()
        optimizer.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        return float(loss)

    engine = DeterministicEngine(step)
    objects = {"model": model, "optimizer": optimizer, "engine": engine}
    saving = Checkpoint(
        objects,
        DiskSaver(folder / "run", create_dir=True, require_empty=False),
        n_saved=2,
        global_step_transform=global_step_from_engine(engine, Events.ITERATION_COMPLETED),
    )
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=task.every), saving)
    with contextlib.suppress(FileNotFoundError, ValueError):
        Checkpoint.load_objects(objects, torch.load(newest(folder), weights_only=False))
    engine.run(
        torch.utils.data.DataLoader(Rows(task), batch_size=BATCH, shuffle=task.shuffle, num_workers=task.workers),
        max_epochs=EPOCHS,
    )
    finish(model, folder)
    return 0


def newest(folder: Path) -> Path:
    """By the step in the name."""
    return max((folder / "run").glob("checkpoint_*.pt"), key=lambda path: int(path.stem.split("_")[1]))


def mend(folder: Path) -> None:
    """What a person would do: remove the newest one."""
    newest(folder).unlink()
