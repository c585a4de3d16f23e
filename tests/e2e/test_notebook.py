"""A notebook: cells in a kernel of Jupyter, whose event loop runs all the while."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

CELLS = [
    """
import threading
import torch
from torch import nn
from torch.utils.data import TensorDataset
from drivetrain import Trainer, TrainingConfig

x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
data = TensorDataset(x, x.sum(1, keepdim=True))

def build(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    config = TrainingConfig(max_duration="8st", seed=seed, standard_callbacks=False, device="cpu")
    return Trainer(model, config, data, loss=nn.MSELoss(), optimizer=optimizer)

def weights(trainer):
    return torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])
""",
    "solo = [build(seed) for seed in (1, 2)]\nfor trainer in solo:\n    trainer.train()",
    # a few steps in one cell, the rest in another, with another run whole in between
    "held = build(1)\nsteps = held.steps()\nfirst = [next(steps).number for _ in range(3)]",
    "between = build(2)\ndone = between.train()",
    "rest = [step.number for step in steps]\nfirst, rest",
    "torch.equal(weights(held), weights(solo[0])), torch.equal(weights(between), weights(solo[1]))",
    # a run in a thread while the next cells run
    "behind = build(1)\nthread = threading.Thread(target=behind.train)\nthread.start()",
    "ahead = build(2) if not thread.join() else None\nahead.train()\ntorch.equal(weights(behind), weights(solo[0]))",
    "import asyncio\nasyncio.get_running_loop().is_running(), build(3).train().completed",
]


@pytest.mark.slow
def test_cells_of_a_notebook(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    kernel = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, startup_timeout=300, kernel_name="python3", resources=kernel).execute()
    outputs = [cell["outputs"] for cell in notebook.cells]
    shown = [[output.get("data", {}).get("text/plain", output) for output in found] for found in outputs]
    assert shown == [
        [], [], [], [], ["([1, 2, 3], [4, 5, 6, 7, 8])"], ["(True, True)"], [], ["True"], ["(True, True)"],
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [], "no file, as everywhere"
