"""The W&B tracker: its offline files are read back with W&B's own messages; servers of the tests are on this machine."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from wandb.proto import wandb_internal_pb2

from drivetrain import ConfigError, make_component
from drivetrain_wandb import WandbTracker
from drivetrain_wandb.recorded import newest


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting and no key of the person who runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))


def context(folder: Path, step: int = 0) -> Any:
    """As much of a run as a tracker asks for."""
    return SimpleNamespace(run_dir=folder, step=step, resumed=step > 0, config=SimpleNamespace(run_name="quiet-fox"))


def records(folder: Path) -> Iterator[Any]:
    """The messages of every sitting: LevelDB's log format after a header of 7 bytes, blocks of 32 KiB, as `wandb sync` reads them."""
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        yield from written(path)


def written(path: Path) -> list[Any]:
    """One sitting's messages, when W&B's own process has written the last one."""
    deadline = time.monotonic() + 20
    while not (found := list(messages(path.read_bytes()))) or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, "the file has no end"
        time.sleep(0.05)
    return found


def messages(data: bytes) -> Iterator[Any]:
    place, message = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        message += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            message = b""
            yield record


def rows(folder: Path) -> list[dict[str, Any]]:
    """The history: values by name, for each row."""
    found = []
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return found


def values(folder: Path, name: str) -> list[tuple[int, Any]]:
    return [(row["_step"], row[name]) for row in rows(folder) if name in row]


def sitting(folder: Path, start: int, end: int, offset: float = 0.0, saved: Any = None) -> dict[str, Any]:
    """One sitting: a value for each second step after `start`, an evaluation for each fourth; gives the state after it."""
    tracker = make_component("tracker", {"use": "wandb", "mode": "offline", "project": "foxes", "tags": ["small"]})
    assert isinstance(tracker, WandbTracker)
    if saved is not None:
        tracker.load_state_dict(saved)
    tracker.start(context(folder, start))
    tracker.config({"seed": 3, "optimizer": {"lr": 0.001}}, start)
    for step in range(start + 2, end + 1, 2):
        tracker.log({"train/loss": step + offset}, step)
        if step % 4 == 0:
            tracker.log({"eval/loss": step + offset + 0.5}, step)
    tracker.close()
    return tracker.state_dict()


def test_values_and_configuration_come_back(tmp_path: Path) -> None:
    sitting(tmp_path, 0, 8)
    assert values(tmp_path, "train/loss") == [(2, 2.0), (4, 4.0), (6, 6.0), (8, 8.0)]
    assert values(tmp_path, "eval/loss") == [(4, 4.5), (8, 8.5)]
    assert len(rows(tmp_path)) == 4, "what belongs to one step is one row"
    (run,) = [record.run for record in records(tmp_path) if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name, list(run.tags)) == ("foxes", "quiet-fox", ["small"])
    updates = [u for r in records(tmp_path) if r.WhichOneof("record_type") == "config" for u in r.config.update]
    config = {update.key or "/".join(update.nested_key): json.loads(update.value_json) for update in updates}
    assert (config["seed"], config["optimizer"]) == (3, {"lr": 0.001})


def test_a_resumed_run_is_the_same_and_repeats_nothing(tmp_path: Path) -> None:
    """Killed after step 10, resumed from step 6: the steps that are run again were recorded by the first sitting."""
    saved = sitting(tmp_path, 0, 10)
    again = sitting(tmp_path, 6, 14, offset=100.0, saved=saved)
    assert again == saved
    assert {record.run.run_id for record in records(tmp_path) if record.WhichOneof("record_type") == "run"} == {saved["run_id"]}
    assert values(tmp_path, "train/loss") == [(2, 2.0), (4, 4.0), (6, 6.0), (8, 8.0), (10, 10.0), (12, 112.0), (14, 114.0)]
    assert values(tmp_path, "eval/loss") == [(4, 4.5), (8, 8.5), (12, 112.5)]


def test_what_of_the_last_step_is_missing_is_recorded(tmp_path: Path) -> None:
    """Killed between the log and the evaluation of step 8."""
    tracker = WandbTracker(mode="offline")
    tracker.start(context(tmp_path))
    tracker.log({"train/loss": 8.0}, 8)
    tracker.close()
    sitting(tmp_path, 6, 8, offset=100.0, saved=tracker.state_dict())
    assert values(tmp_path, "train/loss") == [(8, 8.0)]
    assert values(tmp_path, "eval/loss") == [(8, 108.5)]


def test_without_what_was_remembered_steps_would_be_there_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control for the resume above."""
    saved = sitting(tmp_path, 0, 10)
    monkeypatch.setattr("drivetrain_wandb.newest", lambda folder, run_id: (-1, set()))
    (tmp_path / "wandb" / "drivetrain.json").unlink()
    sitting(tmp_path, 6, 14, saved=saved)
    steps = [step for step, _ in values(tmp_path, "train/loss")]
    assert len(steps) > len(set(steps))


def test_what_a_kill_has_lost_comes_from_the_runs_own_log(tmp_path: Path) -> None:
    """W&B has got as far as step 4, the run's own log as far as its checkpoint of step 8 and beyond."""
    saved = sitting(tmp_path, 0, 4)
    lines = [{"step": step, "time": 1.0, "epoch": 0.5, "train/loss": step if step < 6 else "NaN"} for step in range(2, 11, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 12, "tr')
    sitting(tmp_path, 8, 12, saved=saved)
    found = values(tmp_path, "train/loss")
    assert [step for step, _ in found] == [2, 4, 6, 8, 10, 12]
    assert [step for step, loss in found if math.isnan(loss)] == [6, 8]


def test_the_newest_step_of_a_long_file_is_found_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = sitting(tmp_path, 0, 2400)
    expected = (2400, {"train/loss", "eval/loss"})
    list(records(tmp_path))  # waits until all is written
    assert newest(tmp_path / "wandb", saved["run_id"]) == expected
    monkeypatch.setattr("drivetrain_wandb.recorded._TAIL", 1)
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert path.stat().st_size > 2 * 32768
    assert newest(tmp_path / "wandb", saved["run_id"]) == expected
    assert newest(tmp_path / "wandb", "another") == (-1, set())


def test_a_run_begun_anew_is_another_one(tmp_path: Path) -> None:
    first = sitting(tmp_path, 0, 4)
    assert sitting(tmp_path, 0, 4, saved=first)["run_id"] != first["run_id"]


def test_odd_names_and_values(tmp_path: Path) -> None:
    tracker = WandbTracker(mode="offline")
    tracker.start(context(tmp_path))
    tracker.log({"a/b/c": math.nan, "new\nline": math.inf, "esc\x1b[31m": -1.0}, 1)
    tracker.text("sample", "<b>once</b>", 1)
    tracker.histogram("weights", torch.tensor([0.0, 1.0, math.nan]), 1)
    tracker.image("picture", torch.rand(3, 4, 5), 1)
    tracker.close()
    (row,) = rows(tmp_path)
    assert math.isnan(row["a/b/c"])
    assert (row["new\\nline"], row["esc\\x1b[31m"]) == (math.inf, -1.0)
    assert row["weights/_type"] == "histogram" and sum(row["weights/values"]) == 2
    assert (row["picture/_type"], row["picture/width"], row["picture/height"]) == ("image-file", 5, 4)
    (page,) = tmp_path.glob("wandb/offline-run-*/files/media/html/*.html")
    assert page.read_text() == "<pre>&lt;b&gt;once&lt;/b&gt;</pre>"


KILLED = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from drivetrain_wandb import WandbTracker

tracker = WandbTracker(mode="offline", timeout=60.0)
tracker.load_state_dict({"run_id": "0123abcd"})
tracker.start(SimpleNamespace(run_dir=Path(sys.argv[1]), step=2, resumed=True, config=SimpleNamespace(run_name="quiet-fox")))
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
tracker.log({"train/loss": 4.0}, 4)
tracker.close()
"""


def test_a_killed_run_goes_on_though_the_service_of_its_parent_thinks_it_still_runs(tmp_path: Path) -> None:
    sitting(tmp_path, 0, 2)
    assert "WANDB_SERVICE" in os.environ, "a process of W&B's that all children of this one would share"
    for end in ("killed", "whole"):
        folder = tmp_path / end  # otherwise the files of the two, begun within a second, would have one name
        folder.mkdir()
        done = subprocess.run([sys.executable, "-c", KILLED, str(folder), end], capture_output=True, text=True, timeout=200)
        assert done.returncode == (-signal.SIGKILL if end == "killed" else 0), done.stderr[-3000:]
    assert values(folder, "train/loss") == [(4, 4.0)]


ONLINE = """
import logging, sys
from pathlib import Path
from types import SimpleNamespace
from drivetrain_wandb import WandbTracker

logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
tracker = WandbTracker(mode="online", timeout=3.0)
tracker.start(SimpleNamespace(run_dir=Path(sys.argv[1]), step=0, resumed=False, config=SimpleNamespace(run_name="quiet-fox")))
for step in (2, 4):
    tracker.log({"train/loss": float(step)}, step)
tracker.close()
"""


@pytest.mark.parametrize("key", [None, "0" * 40])
def test_a_server_that_is_not_there_is_said_once_and_the_data_kept(tmp_path: Path, key: str | None) -> None:
    """In a process of its own, with the address in its environment from the start: W&B reads that once."""
    with socket.socket() as free:  # a port on which nobody listens
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_ERROR_REPORTING": "false"}
    env.pop("WANDB_SERVICE", None)  # that of the other tests, which would keep the id of the attempt that fails
    env |= {} if key is None else {"WANDB_API_KEY": key}
    command = [sys.executable, "-c", ONLINE, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("drivetrain.wandb:")]
    assert len(said) == 1 and "recorded offline" in said[0]
    assert values(tmp_path, "train/loss") == [(2, 2.0), (4, 4.0)]


def test_bad_input() -> None:
    for options in ({"mode": "sometimes"}, {"timeout": 0.0}, {"tags": "one"}, {"projekt": "x"}):
        with pytest.raises(ConfigError):
            make_component("tracker", {"use": "wandb", **options})
