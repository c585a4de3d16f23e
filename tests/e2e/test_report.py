"""The report of a real run: killed, resumed, with an anomaly, read back from the page. What writes and what reads must agree."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from drivetrain_cli import main

SCRIPT = """
import os, signal, sys
import torch
from torch import nn
from drivetrain import Callback, Trainer, TrainingConfig, component

@component
class Trouble(Callback):
    def on_loss(self, ctx):
        if ctx.step == 7:
            ctx.microbatch_loss = ctx.microbatch_loss * float("nan")
    def on_step_start(self, ctx):
        if ctx.step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

torch.manual_seed(0)
model = nn.Linear(2, 1)
config = TrainingConfig(
    max_duration="12st", log_interval="2st", eval_interval="4st", per_device_batch_size=2, device="cpu", precision="fp32",
    output_dir=sys.argv[1], run_name="run", resume="auto", standard_callbacks=False, optimizer={"use": "sgd", "lr": 0.1},
    callbacks=[
        {"use": "logging", "trackers": ["jsonl"]}, {"use": "checkpoint", "every": "5st", "asynchronous": False, "keep_last": None},
        {"use": "goodput", "show": False}, {"use": "anomaly", "nonfinite": "skip"}, "throughput",
    ],
)
data = [(torch.randn(2), torch.randn(1)) for _ in range(8)]
Trainer(model, config, data, data, loss=nn.MSELoss(), callbacks=[Trouble()]).train()
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed before step 10, resumed from the checkpoint of step 5."""
    folder = tmp_path_factory.mktemp("report")
    for at, code in ((9, -signal.SIGKILL), (-1, 0)):
        command = [sys.executable, "-c", SCRIPT, str(folder), str(at)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=150)
        assert done.returncode == code, done.stderr[-3000:]
    return folder / "run"


@pytest.fixture(scope="module")
def run(run_dir: Path) -> dict[str, Any]:
    assert main(["report", str(run_dir)]) == 0
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert embedded is not None
    found: dict[str, Any] = json.loads(embedded[1])["runs"][0]
    return found


@pytest.mark.timeout(300)
def test_metrics(run_dir: Path, run: dict[str, Any]) -> None:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for name in ("train/loss", "train/lr", "eval/loss", "speed/step_ms", "memory/process_gb"):
        series = run["series"][name]
        odd = {point: word for point, word, _ in series.get("odd", [])}
        shown = [odd.get(i, value) for i, value in enumerate(series["values"])]
        wanted = [(line["step"], line["time"], line[name]) for line in lines if name in line]
        grid = run["grids"][series["grid"]]
        assert list(zip(grid["step"], grid["time"], shown, strict=True)) == wanted and len(wanted) >= 3
    assert run["per_step"] == {"samples": 2.0}
    assert "NaN" in [word for _, word, _ in run["series"]["train/loss"]["odd"]], "it was injected"


def test_events(run_dir: Path, run: dict[str, Any]) -> None:
    events = [(event["kind"], event["step"]) for event in run["events"]]
    assert [event for event in events if event[0] == "checkpoint"] == [
        ("checkpoint", 5),
        ("checkpoint", 10),
        ("checkpoint", 12),
    ]
    assert ("anomaly", 8) in events
    assert all("NaN or infinity in" in event["text"] for event in run["events"] if event["kind"] == "anomaly")


def test_goodput(run_dir: Path, run: dict[str, Any]) -> None:
    sittings = json.loads((run_dir / "goodput.json").read_text())["sittings"]
    assert run["goodput"]["sittings"] == len(sittings)
    assert sum(run["goodput"]["parts"].values()) >= sum(sum(one["parts"].values()) for one in sittings)
    assert {"forward and backward", "optimizer", "evaluation"} <= set(run["goodput"]["parts"])


def test_configuration_and_environment(run: dict[str, Any]) -> None:
    config = {key: (value, origin) for key, value, origin in run["config"]}
    assert config["log_interval"] == ("2st", "python")
    assert config["optimizer.lr"][0] == "0.1"
    assert config["callbacks.checkpoint.every"][0] == "5st"
    environment = dict(run["environment"])
    assert environment["processes.world_size"] == "1" and environment["model.parameters"] == "3"
    assert environment["plugins.drivetrain-optimizers"] == environment["versions.drivetrain-core"]
