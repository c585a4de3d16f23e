"""All trackers together over a real kill, a resume from a real checkpoint and a rollback, read back with the tools' own readers."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.plugins.wandb.server import environment, serving

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

SHUFFLE = sys.argv[3] == "shuffled"
torch.manual_seed(0)
model = nn.Linear(2, 1)
config = TrainingConfig(
    max_duration="12st" if SHUFFLE else "1ep", log_interval="2st",
    eval_interval="4st", per_device_batch_size=2, device="cpu", precision="fp32",
    output_dir=sys.argv[1], run_name="run", resume="auto", standard_callbacks=False,
    optimizer={"use": "sgd", "lr": 0.1},
    callbacks=[
        {"use": "logging", "trackers": ["jsonl", "csv", "tensorboard", {"use": "wandb", "mode": "offline"}, "mlflow"]},
        {"use": "checkpoint", "every": "5st", "asynchronous": False},
        {"use": "anomaly", "nonfinite": "rollback", "snapshot_every": 2},
    ],
    dataloader={"shuffle": SHUFFLE},
)
data = [(torch.randn(2), torch.randn(1)) for _ in range(8)]
train = data if SHUFFLE else data * 3
if not SHUFFLE:
    train[13] = (torch.full((2,), torch.nan), torch.ones(1))  # in step 7
Trainer(model, config, train, data, loss=nn.MSELoss(), callbacks=[Die()]).train()
"""


def sittings(folder: Path, what: str, *kills: int) -> Path:
    """One after the other, killed before a step, and a last one to the end."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")} | {"OMP_NUM_THREADS": "1"}
    env["WANDB_ERROR_REPORTING"] = "false"
    for at in (*kills, -1):
        command = [sys.executable, "-c", SCRIPT, str(folder), str(at), what]
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=150)
        assert done.returncode == (0 if at < 0 else -signal.SIGKILL), done.stderr[-3000:]
    assert "Training goes on" not in done.stderr, "no tracker failed"
    return folder / "run"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed before step 10, when 8 was the last one logged, and resumed from the checkpoint of step 5."""
    return sittings(tmp_path_factory.mktemp("trackers"), "shuffled", 9)


@pytest.fixture(scope="module")
def gone_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NaN in step 7, found at 8, back to 6; killed before step 10; from the checkpoint of step 5 the same once more, to the end at 11."""
    return sittings(tmp_path_factory.mktemp("gone-back"), "in order", 9)


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


def read_by_wandb(run_dir: Path) -> dict[str, list[tuple[int, Any]]]:
    """Scalars with their steps out of the offline files, as `wandb sync` reads them and sends them to a server."""
    with serving() as server:
        env = environment(server, os.environ)
        for path in sorted(run_dir.glob("wandb/offline-run-*")):
            command = [str(Path(sys.executable).with_name("wandb")), "sync", str(path)]
            done = subprocess.run(command, env=env, cwd=run_dir, capture_output=True, text=True, timeout=100)
            assert done.returncode == 0, done.stderr
            server.sitting_ends()
        (run,) = server.history
        names = {name for row in server.rows(run) for name in row}
        return {name: server.values(run, name) for name in names}


@pytest.mark.timeout(300)
def test_wandb(run_dir: Path) -> None:
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({path.name for path in files}) == 1, "the id is the run's"
    found = read_by_wandb(run_dir)
    assert [step for step, _ in found["train/loss"]] == STEPS
    assert [step for step, _ in found["eval/loss"]] == EVALUATIONS
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    expected = [(row["step"], row["train/loss"]) for row in lines if "train/loss" in row]
    assert found["train/loss"] == [(step, pytest.approx(loss)) for step, loss in expected]


BACK = [2, 4, 6, 8, 10, 11]  # the steps of the log when step 7 was left out


@pytest.mark.timeout(300)
class TestGoneBack:
    """No step is there twice, and the NaN is nowhere hidden."""

    def test_events(self, gone_back: Path) -> None:
        found = [json.loads(line) for line in (gone_back / "events.jsonl").read_text().splitlines()]
        assert {(row["step"], row["loss"], row["did"]) for row in found} == {
            (7, "NaN", f"went back to step {step}") for step in (6, 5)
        }

    def test_jsonl_and_csv(self, gone_back: Path) -> None:
        lines = [json.loads(line) for line in (gone_back / "metrics.jsonl").read_text().splitlines()]
        logged = [row for row in lines if "train/loss" in row]
        assert [row["step"] for row in logged] == BACK
        assert all(math.isfinite(float(row["train/loss"])) for row in logged)
        assert [row["step"] for row in lines if row.get("anomaly/nonfinite")] == [8], "told in the first log from its step on"
        with (gone_back / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows if row["train/loss"]] == BACK
        assert [row["anomaly/nonfinite"] for row in rows if row["anomaly/nonfinite"]] == ["1.0"]

    def test_tensorboard(self, gone_back: Path) -> None:
        board = EventAccumulator(str(gone_back / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
        losses = board.Scalars("train/loss")
        assert [event.step for event in losses] == BACK
        assert all(math.isfinite(event.value) for event in losses)
        assert [event.step for event in board.Scalars("anomaly/nonfinite")] == [8]
        told = board.Tensors(
            "anomaly/text_summary"
        )  # of each sitting: TensorBoard hides scalars of steps that are run again, not texts
        assert told and all(b"NaN or infinity in loss at step 7" in text.tensor_proto.string_val[0] for text in told)

    def test_wandb(self, gone_back: Path) -> None:
        """It takes nothing back: the row with the NaN stays that of step 8, and is there once."""
        found = read_by_wandb(gone_back)
        assert [step for step, _ in found["train/loss"]] == BACK
        assert [step for step, loss in found["train/loss"] if not math.isfinite(float(loss))] == [8]
        assert [step for step, _ in found["anomaly/nonfinite"]] == [8]

    def test_mlflow(self, gone_back: Path) -> None:
        client = MlflowClient(tracking_uri=f"sqlite:///{gone_back.parent / 'mlflow.db'}")
        (run,) = client.search_runs([client.get_experiment_by_name("drivetrain").experiment_id])
        history = sorted(client.get_metric_history(run.info.run_id, "train/loss"), key=lambda metric: metric.step)
        assert [metric.step for metric in history] == BACK
        assert [metric.step for metric in history if not math.isfinite(metric.value)] == [8]
        assert [m.step for m in client.get_metric_history(run.info.run_id, "anomaly/nonfinite")] == [8]
