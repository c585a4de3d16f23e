"""A run as it comes: what the installed plugins make of a configuration that leaves things to them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from drivetrain import Trainer, TrainingConfig

AS_IT_COMES = """
import sys, torch
from torch.utils.data import TensorDataset
from drivetrain import Trainer, TrainingConfig

data = TensorDataset(torch.ones(64, 4), torch.ones(64, 1))
for end in ("20st", "30st"):
    model = torch.nn.Linear(4, 1)
    config = TrainingConfig(max_duration=end, eval_interval="10st", output_dir=sys.argv[1], precision="bf16", max_grad_norm=1.0)
    Trainer(model, config, data, data, loss=torch.nn.MSELoss(), optimizer=OPTIMIZER).train()
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize(("optimizer", "imported"), [("None", "False"), ("torch.optim.AdamW(model.parameters())", "True")])
def test_a_run_as_it_comes_does_not_import_the_compiler(tmp_path: Path, optimizer: str, imported: str) -> None:
    """Trained, counted, evaluated, saved and gone on with: half a second earlier than with torch's own optimizer, the control."""
    command = [sys.executable, "-c", AS_IT_COMES.replace("OPTIMIZER", optimizer), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == imported


def test_choices_say_what_was_taken_and_why() -> None:
    config = TrainingConfig(standard_callbacks=False, device="cpu")
    made = Trainer(torch.nn.Linear(4, 1), config, TensorDataset(torch.ones(64, 4), torch.ones(64, 1)), loss=torch.nn.MSELoss())
    found = {key: (value, reason) for key, value, reason in made.choices()}
    assert found["optimizer"] == ("adamw", "fused: one kernel for the whole update")
    assert found["scheduler"] == ("cosine", "goes with adamw")
    assert found["precision"] == (made.ctx.precision.name, made.ctx.precision.reason)
