"""All trackers together over a real kill and a resume from a real checkpoint, read back with the tools' own readers."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = """
import os, signal, sys
import torch
from torch import nn
from drivetrain import Callback, Trainer, TrainingConfig, component

@component
class Die(Callback):
    def on_step_start(self, ctx):
        if ctx.step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

torch.manual_seed(0)
model = nn.Linear(2, 1)
config = TrainingConfig(
    max_duration="12st", log_interval="2st", eval_interval="4st", per_device_batch_size=2, device="cpu", precision="fp32",
    output_dir=sys.argv[1], run_name="run", resume="auto", standard_callbacks=False,
    optimizer={"use": "sgd", "lr": 0.1},
    callbacks=[
        {"use": "logging", "trackers": ["jsonl", "csv", "tensorboard", {"use": "wandb", "mode": "offline"}, "mlflow"]},
        {"use": "checkpoint", "every": "5st", "asynchronous": False},
    ],
)
data = [(torch.randn(2), torch.randn(1)) for _ in range(8)]
Trainer(model, config, data, data, loss=nn.MSELoss(), callbacks=[Die()]).train()
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed before step 10, when 8 was the last one logged, and resumed from the checkpoint of step 5."""
    folder = tmp_path_factory.mktemp("trackers")
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")} | {"OMP_NUM_THREADS": "1"}
    env["WANDB_ERROR_REPORTING"] = "false"
    for at, code in ((9, -signal.SIGKILL), (-1, 0)):
        command = [sys.executable, "-c", SCRIPT, str(folder), str(at)]
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=150)
        assert done.returncode == code, done.stderr[-3000:]
    assert "Training goes on" not in done.stderr, "no tracker failed"
    return folder / "run"


STEPS, EVALUATIONS = [2, 4, 6, 8, 10, 12], [4, 8, 12]


@pytest.mark.timeout(300)
def test_csv_and_jsonl(run_dir: Path) -> None:
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == STEPS
    assert [int(row["step"]) for row in rows if row["eval/loss"]] == EVALUATIONS
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [float(row["train/loss"]) for row in rows if row["train/loss"]] == [
        r["train/loss"] for r in lines if "train/loss" in r
    ]


def test_tensorboard(run_dir: Path) -> None:
    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == STEPS
    assert [event.step for event in board.Scalars("eval/loss")] == EVALUATIONS


def test_mlflow(run_dir: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("drivetrain").experiment_id])
    assert sorted(metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")) == STEPS
    assert sorted(metric.step for metric in client.get_metric_history(run.info.run_id, "eval/loss")) == EVALUATIONS
    assert run.data.params["optimizer.lr"] == "0.1"


def test_wandb(run_dir: Path) -> None:
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({path.name for path in files}) == 1, "the id is the run's"
    assert json.loads((run_dir / "wandb" / "drivetrain.json").read_text())["step"] == 12
