"""Two real processes of which one stands still: what is written, and what the command makes of it."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from drivetrain import Callback, CallbackContext, ConfigError, DrivetrainError, Precision, Trainer, TrainingConfig, component
from drivetrain_watchdog.callback import Watchdog
from drivetrain_watchdog.command import Hang, report

SCRIPT = Path(__file__).with_name("two_ranks.py")


def stand_still(folder: Path, how: str) -> tuple[str, Path]:
    """Start both; returns what the first one says when its collective fails, and the run's directory."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": one.getsockname()[1]}
    quiet = {"PYTHONWARNINGS": "ignore"}  # torch warns where NumPy is missing
    envs = [
        os.environ | quiet | {k: str(v) for k, v in (place | {"RANK": rank, "LOCAL_RANK": rank}).items()} for rank in (0, 1)
    ]
    command = [sys.executable, str(SCRIPT), str(folder), how]
    ranks = [subprocess.Popen(command, env=env, stderr=-1, stdout=-1, text=True) for env in envs]
    try:
        _, said = ranks[0].communicate(timeout=100)
        assert ranks[0].returncode == 1, said
        return said, folder / "a"
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


@component
class Looks(Callback):
    """Whether the watchdog's thread is there, a moment after it began."""

    alive: list[bool] = attrs.field(factory=list, init=False)

    def on_step_end(self, ctx: CallbackContext) -> None:
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "watchdog"]
        thread.join(0.1)
        self.alive.append(thread.is_alive())


def test_a_patience_beyond_what_a_thread_can_wait(tmp_path: Path) -> None:
    model, looks = nn.Linear(4, 1), Looks()
    config = TrainingConfig(output_dir=tmp_path, run_name="a", max_duration="1st", standard_callbacks=False, device="cpu")
    data = TensorDataset(torch.ones(8, 4), torch.ones(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callbacks = [Watchdog(after=1e308), looks]
    Trainer(model, config, data, loss=nn.MSELoss(), optimizer=optimizer, callbacks=callbacks, precision=Precision()).train()
    assert looks.alive == [True]


def test_a_rank_that_is_busy_elsewhere(tmp_path: Path) -> None:
    said, run_dir = stand_still(tmp_path, "sleep")
    assert said.startswith(f"rank 1 on {os.uname().nodename} did not come to the collective (process ")
    title, first, second, verdict, _ = report(run_dir)
    assert title == "no progress for 3 s at step 3"
    assert "rank 0" in first and "in gloo:all_reduce number" in first and "reduce_gradients (two_ranks.py:" in first
    assert "rank 1" in second and "after gloo:all_reduce number" in second and "stand_still (two_ranks.py:" in second
    assert verdict == "rank 1 keeps the others waiting"


@pytest.mark.slow
def test_a_rank_that_is_frozen(tmp_path: Path) -> None:
    said, run_dir = stand_still(tmp_path, "stop")
    assert said.startswith(f"rank 1 on {os.uname().nodename} does not answer: its process ")
    _, first, second, verdict, _ = report(run_dir)
    assert "in gloo:all_reduce number" in first
    assert "has written nothing; process " in second and second.endswith(" is stopped")
    assert verdict == "rank 1 keeps the others waiting"


class Slow(Callback):
    """A step that takes longer than the watchdog waits, or as many evaluated batches."""

    def __init__(self, seconds: float, where: str) -> None:
        self.seconds, self.where = seconds, where

    def on_step_end(self, ctx) -> None:
        time.sleep(self.seconds if self.where == "step" and ctx.step == 2 else 0)

    def on_evaluate_batch(self, ctx) -> None:
        time.sleep(self.seconds / 10 if self.where == "evaluation" else 0)


def trained(tmp_path: Path, after: float, slow: Slow) -> Path:
    model, data = nn.Linear(4, 1), TensorDataset(torch.ones(16, 4), torch.ones(16, 1))
    config = TrainingConfig(
        max_duration="4st", per_device_batch_size=4, standard_callbacks=False, output_dir=tmp_path, run_name="a"
    )
    parts = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "precision": Precision(), "loss": nn.MSELoss()}
    Trainer(model, config, data, data, callbacks=[Watchdog(after=after), slow], device="cpu", **parts).train()
    return tmp_path / "a" / "hang"


def test_a_long_step_is_written_down_and_the_run_goes_on(tmp_path: Path) -> None:
    folder = trained(tmp_path, 0.4, Slow(1.5, "step"))
    found = json.loads((folder / "rank-0.json").read_text())
    assert (found["rank"], found["world_size"], found["step"], found["pid"]) == (0, 1, 2, os.getpid())
    assert found["idle"] >= 0.4
    assert "in on_step_end" in (folder / "rank-0.txt").read_text()
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog" and not ended_soon(thread)]


def test_a_run_that_makes_progress_writes_nothing(tmp_path: Path) -> None:
    """Many evaluated batches take longer together than the watchdog waits, none of them alone."""
    assert not trained(tmp_path, 1.0, Slow(4.0, "evaluation")).exists()


def ended_soon(thread: threading.Thread) -> bool:
    thread.join(10)
    return not thread.is_alive()


def test_what_ranks_say_is_put_together(tmp_path: Path) -> None:
    """Three of four have written: one is a collective behind, and one on another machine is not heard of."""
    folder = tmp_path / "hang"
    folder.mkdir()
    peers = [{"rank": rank, "host": f"node{rank // 2}", "pid": 100 + rank, "state": "unknown"} for rank in range(4)]
    for rank, number in ((0, 9), (1, 8), (2, 9)):
        last = {"group": "0:default_pg", "name": "nccl:all_reduce", "number": number, "ended": number == 8}
        row = {
            "rank": rank,
            "world_size": 4,
            "host": f"node{rank // 2}",
            "pid": 100 + rank,
            "time": 1.0,
            "idle": 60.0,
            "step": 5,
        }
        row |= {"epoch": 0, "main_thread": 1, "collectives": [last], "peers": peers}
        (folder / f"rank-{rank}.json").write_text(json.dumps(row))
    assert report(tmp_path)[-2] == "rank 3 keeps the others waiting"
    assert report(tmp_path)[4] == "  rank 3 on node1  has written nothing; process 103 is unknown"
    (folder / "rank-3.json").write_text((folder / "rank-2.json").read_text().replace('"rank": 2', '"rank": 3', 1))
    assert report(tmp_path)[-2] == "rank 1 keeps the others waiting"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Hang().run(argparse.Namespace(run_dir=tmp_path)) == 1
    assert "no process has written anything" in capsys.readouterr().out
    with pytest.raises(DrivetrainError, match="is no directory"):
        Hang().run(argparse.Namespace(run_dir=tmp_path / "missing"))


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="after: must be above 0"):
        Watchdog(after=0)


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from drivetrain_watchdog.command import Hang; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("False", "")
