"""The audit over everything of ours, and from the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from drivetrain import Callback, Trainer, TrainingConfig, component
from drivetrain_audit import AuditCallback

CALLBACKS: list[Any] = [
    "goodput",
    "throughput",
    {"use": "progress", "seconds": 0.001},
    {"use": "logging", "trackers": ["jsonl", "csv", "tensorboard"]},
    {"use": "checkpoint", "every": "10st"},
    {"use": "early_stopping", "monitor": "train/loss", "patience": 1000},
    "ema",
    {"use": "anomaly", "nonfinite": "rollback", "spike": "skip"},
    "ledger",
    {"use": "gradient_stats", "steps": 1000},
    "watchdog",
]


@component
class Control(Callback):
    def on_step_end(self, ctx: Any) -> None:
        (ctx.run_dir / "control").write_text(str(ctx.loss))


@pytest.mark.parametrize("control", [False, True])
def test_no_callback_of_ours_waits_writes_or_communicates_on_an_ordinary_step(tmp_path: Path, control: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    data = TensorDataset(torch.randn(160, 4), torch.randn(160, 1))
    config = TrainingConfig(
        max_duration="1ep",
        per_device_batch_size=4,
        log_interval="6st",
        eval_interval="9st",
        output_dir=tmp_path,
        callbacks=CALLBACKS,
        standard_callbacks=False,
        device="cpu",
        optimizer={"use": "adamw", "lr": 0.01},
        scheduler="cosine",
    )
    audit = AuditCallback(show=False)
    Trainer(model, config, data, data, loss=nn.MSELoss(), callbacks=[audit, *([Control()] if control else [])]).train()
    found = {(f.place.plugin, f.kind) for f in audit.findings}
    assert found == ({("callback:Control", "reads a tensor"), ("callback:Control", "writes a file")} if control else set())


def drivetrain(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "drivetrain_cli", "train", "run.toml", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("What waits is named, and so is the line. " * 100)
    (tmp_path / "mine.py").write_text(
        "from drivetrain import Callback, component\n\n\n@component\nclass Peek(Callback):\n"
        "    def on_step_end(self, ctx):\n        self.seen = ctx.loss\n"
    )
    (tmp_path / "run.toml").write_text(
        'model = { use = "gpt", layers = 1, heads = 1, width = 16, context = 16 }\n'
        'data = { use = "text", path = "text.txt", context = 16 }\noptimizer = "adamw"\ndevice = "cpu"\n'
        'max_duration = "12st"\nlog_interval = "5st"\nper_device_batch_size = 2\n'
    )
    clean = drivetrain(tmp_path, "--audit", "callbacks.audit.fail=true")
    assert clean.returncode == 0, clean.stderr
    assert "audit: nothing waited for the device, wrote a file or called a collective on 8 ordinary steps" in clean.stderr
    more = ['plugins=["./mine.py"]', 'callbacks=["peek"]', "--audit"]
    named = drivetrain(tmp_path, *more)
    assert named.returncode == 0, named.stderr
    assert "mine.py:7 in on_step_end  reads a tensor: item()" in named.stderr
    failed = drivetrain(tmp_path, *more, "callbacks.audit.fail=true", "--run-name", "other")
    assert failed.returncode not in (0, 75), failed.stderr
    assert "the audit has 1 finding" in failed.stderr
