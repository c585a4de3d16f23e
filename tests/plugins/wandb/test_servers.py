"""The W&B tracker and servers: one that works, one that refuses the login, one that is lost in the middle; `wandb sync` afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.plugins.wandb.server import Server, environment, serving

SCRIPT = """
import logging, sys
from pathlib import Path
from types import SimpleNamespace
from drivetrain_wandb import WandbTracker

logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
tracker = WandbTracker(mode="online", timeout=float(sys.argv[2]))
tracker.start(SimpleNamespace(run_dir=Path(sys.argv[1]), step=0, resumed=False, config=SimpleNamespace(run_name="quiet-fox")))
for step in (2, 4, 6, 8):
    tracker.log({"train/loss": float(step)}, step)
    if step == 4:
        print(tracker.run_id, flush=True)
        sys.stdin.readline()
tracker.close()
"""
ALL = [(2, 2.0), (4, 4.0), (6, 6.0), (8, 8.0)]


def started(folder: Path, server: Server, timeout: float = 60.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(folder), str(timeout)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=environment(server, os.environ), text=True, **pipes)  # type: ignore[call-overload, no-any-return]


def synced(folder: Path, server: Server, *options: str) -> None:
    """What lies in the folder, read by W&B and sent to a server."""
    for path in sorted(folder.glob("wandb/*run-*")):
        command = [str(Path(sys.executable).with_name("wandb")), "sync", *options, str(path)]
        done = subprocess.run(
            command, env=environment(server, os.environ), cwd=folder, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr


def said(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("drivetrain.wandb:")]


@pytest.mark.timeout(200)
def test_a_server_that_works(tmp_path: Path) -> None:
    with serving() as server:
        process = started(tmp_path, server)
        output, errors = process.communicate("\n", timeout=150)
        assert process.returncode == 0, errors
        assert said(errors) == []
        assert server.values(output.strip(), "train/loss") == ALL


@pytest.mark.timeout(200)
def test_a_refused_login_is_said_once_and_the_data_can_be_sent_later(tmp_path: Path) -> None:
    with serving(refuses=True) as server:
        process = started(tmp_path, server)
        output, errors = process.communicate("\n", timeout=150)
        assert process.returncode == 0, errors
        assert server.asked > 0 and server.history == {}
    (line,) = said(errors)
    assert "401" in line and "recorded offline" in line
    with serving() as server:
        synced(tmp_path, server)
        assert server.values(output.strip(), "train/loss") == ALL


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_server_that_is_lost_is_said_at_the_end_and_the_data_can_be_sent_later(tmp_path: Path) -> None:
    with serving() as server:
        process = started(tmp_path, server, timeout=5.0)
        assert process.stdout is not None
        run = process.stdout.readline().strip()
    _, errors = process.communicate("\n", timeout=150)
    assert process.returncode == 0, errors
    (line,) = said(errors)
    assert "was lost" in line and f"wandb sync --no-skip-online {tmp_path}" in line
    with serving() as server:
        synced(tmp_path, server, "--no-skip-online")
        assert server.values(run, "train/loss") == ALL
