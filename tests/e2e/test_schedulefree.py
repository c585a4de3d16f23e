"""Schedule-free optimizers with the plugins beside them: the schedule they get, and the checkpoint of the result."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from drivetrain import CheckpointCallback, Trainer, TrainingConfig
from drivetrain_checkpoint import find_checkpoints, read_checkpoint
from drivetrain_cli import main


@pytest.mark.parametrize(
    ("settings", "name", "warmup"),
    [
        ({"optimizer": "schedulefree_adamw"}, "constant", "5%"),
        ({"optimizer": "schedulefree_sgd", "scheduler": {"warmup": "3st"}}, "constant", "3st"),
        ({"optimizer": "schedulefree_adamw", "scheduler": "linear"}, "linear", "0.0"),
        ({"optimizer": "adamw"}, "cosine", "0.0"),
    ],
    ids=str,
)
def test_the_schedule_where_none_is_named(settings: dict[str, Any], name: str, warmup: str) -> None:
    table = TrainingConfig(**settings).to_dict(full=True)["scheduler"]
    assert (table["use"], str(table["warmup"])) == (name, warmup)


@pytest.mark.parametrize("every", ["12st", "5st"])  # whether a periodic checkpoint falls on the last step
def test_the_last_checkpoint_holds_the_average(tmp_path: Path, every: str) -> None:
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
    model = nn.Linear(4, 1)
    config = TrainingConfig(
        max_duration="12st",
        run_name="a",
        output_dir=tmp_path,
        optimizer="schedulefree_adamw",
        standard_callbacks=False,
        callbacks=[CheckpointCallback(every=every)],
    )
    output = Trainer(model, config, TensorDataset(x, x.sum(1, keepdim=True)), loss=nn.MSELoss()).train()
    assert output.checkpoint is not None
    saved = read_checkpoint(output.checkpoint)["model"]
    assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())
    assert find_checkpoints(tmp_path / "a")[0].step == 12


RUN = """
run_name = "a"
model = { use = "gpt", layers = 1, heads = 2, width = 16, context = 16 }
data = { use = "text", path = "text.txt", context = 16 }
max_duration = "8st"
per_device_batch_size = 4
optimizer = "schedulefree_adamw"
precision = "fp32"
eval_interval = false
standard_callbacks = false
callbacks = [{ use = "checkpoint", every = "3st" }]
"""


def test_the_export_of_an_interrupted_run_is_the_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its newest checkpoint holds y: gradients are taken there, but the result is x."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    Path("run.toml").write_text(RUN)
    assert main(["train", "run.toml"]) == 0
    *later, third = find_checkpoints("runs/a")
    assert third.step == 3
    for checkpoint in later:
        shutil.rmtree(checkpoint.path)
    saved = read_checkpoint(third.path)
    assert main(["export", "runs/a", "out"]) == 0
    exported = load_file("out/model.safetensors")
    for group in saved["optimizer"]["param_groups"]:
        for index, name in zip(group["params"], group["param_names"], strict=True):
            z, y = saved["optimizer"]["state"][index]["z"], saved["model"][name]
            torch.testing.assert_close(exported[name], torch.lerp(z, y, 1 / 0.9))
            assert not torch.equal(exported[name], y), "control: not the point at which gradients are taken"
