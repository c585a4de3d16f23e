"""Checkpoints as this release writes them: `python kept.py` keeps them in kept/VERSION, once for each release, for the later ones.

`kept/VERSION/run` is a run that was stopped half-way, `kept/VERSION/divided` a state whose parts were written by two processes, and
`kept/VERSION/bits.json` the bits of the run's tensors, in a form that needs no reader. Nothing here is drawn from a generator of
torch's, so that later versions of it can be compared.
"""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drivetrain import CheckpointCallback, Trainer, TrainingConfig
from drivetrain_checkpoint import find_checkpoints, read_checkpoint

KEPT = Path(__file__).with_name("kept")
STEPS = 8


def trainer(output_dir: Path) -> Trainer:
    """The same call each time; of some milliseconds."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.sin(torch.arange(1.0, parameter.numel() + 1) + number).view(parameter.shape))
    rows = torch.cos(torch.arange(44 * 5.0)).view(44, 5)
    config = TrainingConfig(
        max_duration=f"{STEPS}st",
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        output_dir=output_dir,
        run_name="run",
        standard_callbacks=False,
    )
    return Trainer(
        model,
        config,
        TensorDataset(rows[:, :4], rows[:, 4:]),
        loss=nn.MSELoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.1),
        scheduler=lambda position: 1 - position / STEPS,
        callbacks=[CheckpointCallback(every="1ep", keep_last=1)],
        device="cpu",
    )


def half_of_a_run(output_dir: Path) -> Path:
    """Where the checkpoint is that a run left when it was stopped."""
    one = trainer(output_dir)
    for step in one.steps():
        if step.number == STEPS // 2:
            break
    return find_checkpoints(output_dir / "run")[0].path


def divided() -> dict[str, Any]:
    """A state with several types, and sizes that two processes cannot share evenly."""
    tensors = {name: torch.arange(21.0).view(7, 3).to(getattr(torch, name)) for name in ("float32", "bfloat16", "int64")}
    return {"step": 1, "model": tensors, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}, "said": ["é", 0.1, 1 << 70]}


def bits(tree: Any, path: str = "") -> dict[str, list[int]]:
    """Every tensor's bytes by its place, leaving out the random state."""
    if isinstance(tree, Tensor):
        return {path: tree.contiguous().reshape(-1).view(torch.uint8).tolist()}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {place: found for key, one in items if key != "rng" for place, found in bits(one, f"{path}/{key}").items()}


def keep(folder: Path, save_divided: Any) -> None:
    """Write all of it.

    Args:
        save_divided: `save` of cutting.py.
    """
    state = read_checkpoint(half_of_a_run(folder))
    (folder / "bits.json").write_text(json.dumps(bits(state), indent=0) + "\n")
    for outcome in save_divided(folder / "divided", divided(), 1, ranks=2):
        outcome.result()


if __name__ == "__main__":
    from cutting import save

    (folder := KEPT / version("drivetrain-checkpoint")).mkdir(parents=True)
    os.chdir(folder)  # so that the files name no place of this machine
    keep(Path(), save)
