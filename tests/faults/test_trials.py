"""Killed or signalled at any instant and started again by the same command, a run ends as if nothing had happened."""

from __future__ import annotations

import os
import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.faults.trials import PREEMPTED, Trials, differing, final, killed, signalled

from drivetrain_checkpoint import find_checkpoints

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the trials fork their training processes"),
    pytest.mark.timeout(7200),
]
TRIALS = int(os.environ.get("TRIALS", "300"))
BIG, HUGE = 512, 1728  # a save of 3 MB, of 36 MB


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    """A temporary directory on another file system, as node-local /tmp is on a cluster."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev:
        pytest.skip("no second file system here")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: Any) -> Iterator[Trials]:
    with Trials(tmp_path_factory.mktemp("small")) as trials:
        yield trials


# -- at random instants --------------------------------------------------------------------------------------------------------


def check_kills(trials: Trials, number: int, seed: int, kills: int = 2) -> None:
    count = killed(trials, number, seed, kills)
    assert count["equal"] == number
    assert count["hit"] >= number * kills / 2, count  # else they came too late to mean anything
    assert count["in a save"] >= max(1, number * kills // 16), count


def test_killed(tmp_path: Path, elsewhere: str) -> None:
    """Twenty runs, half of them with TMPDIR on another file system."""
    with Trials(tmp_path / "same", width=BIG, steps=6) as trials:
        check_kills(trials, 10, 1)
    with Trials(tmp_path / "other", width=BIG, steps=6, variables={"TMPDIR": elsewhere}) as trials:
        check_kills(trials, 10, 2, kills=1)
    assert not [path for path in Path(elsewhere).iterdir() if "drivetrain" in path.name or "tmp" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["", "elsewhere"])
def test_killed_many_times(tmp_path: Path, elsewhere: str, where: str) -> None:
    with Trials(tmp_path, width=HUGE, variables={"TMPDIR": elsewhere} if where else {}) as trials:
        check_kills(trials, TRIALS, 3)


def test_signalled(small: Trials) -> None:
    count = signalled(small, 5, 1)
    assert count["equal"] == 5 and count["hit"] >= 2, count


@pytest.mark.slow
def test_signalled_many_times(tmp_path: Path) -> None:
    with Trials(tmp_path) as trials:
        count = signalled(trials, TRIALS, 4)
    assert count["equal"] == TRIALS and count["hit"] >= TRIALS and count["preempted"] > TRIALS / 8, count


# -- at named points -----------------------------------------------------------------------------------------------------------

KILLED_AT = [  # and how often the run comes there before
    "on_restore:1",
    "configuration:1",
    "on_run_start:1",
    "on_epoch_start:2",
    "on_batch:1",
    "on_forward:7",
    "on_gradients:3",
    "on_step_end:4",
    "on_log:2",
    "on_evaluate_batch:10",
    "on_checkpoint_saved:3",
    "on_run_end:1",
    "mkdir:4",
    "write:1",
    "write:9",
    "half of write:11",
    "fsync:7",
    "fsync_dir:5",
    "rename:3",
    "rename:6",
    "remove:3",
    "rmdir:2",
]


@pytest.mark.parametrize("point", KILLED_AT)
def test_killed_at_a_point(small: Trials, point: str) -> None:
    name = point.replace(":", "-").replace(" ", "-")
    assert small.call(name, FAULT=f"{point}:kill").code == -signal.SIGKILL
    small.finish(name)


@pytest.mark.slow
@pytest.mark.parametrize("point", KILLED_AT)
def test_killed_at_a_point_again_and_again(small: Trials, point: str) -> None:
    """Also at that point of the sittings that follow, if they come there."""
    name = f"again-{point.replace(':', '-').replace(' ', '-')}"
    codes = [small.call(name, FAULT=f"{point}:kill").code for _ in range(4)]
    assert codes[0] == -signal.SIGKILL and set(codes) <= {0, -signal.SIGKILL}
    small.finish(name)


@pytest.mark.parametrize(
    "point", ["on_forward:9", "on_evaluate_batch:10", "half of write:11", "rename:3", "rmdir:3", "on_checkpoint_saved:2"]
)
def test_signalled_at_a_point(small: Trials, point: str) -> None:
    """In a step, an evaluation, a save, a rotation: the step is finished and saved, and the exit code says so."""
    name = f"signal-{point.replace(':', '-').replace(' ', '-')}"
    ended = small.call(name, FAULT=f"{point}:SIGTERM")
    assert ended.code == PREEMPTED, ended.err
    assert "interrupted by SIGTERM: stopping after this step" in ended.err and "go on with: drivetrain resume" in ended.out
    assert find_checkpoints(small.run(name))[0].step == int(ended.out.split("SIGTERM (")[1].split()[0])
    small.finish(name)


@pytest.mark.parametrize("seconds", [0.3, 0.8])
def test_the_whole_group_with_workers_gets_the_signal(tmp_path: Path, small: Trials, seconds: float) -> None:
    """F8, case 51: as a scheduler sends it, to the processes that load the data too."""
    name, given = f"group-{seconds}", ["dataloader.num_workers=2", "data.slow=0.02"]
    process = small.start(name, *given, FAULT="")
    metrics = small.run(name) / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and not small.has_ended():
        pass
    os.killpg(process, signal.SIGTERM)
    ended = small.wait()
    assert ended.code == PREEMPTED, ended.err
    small.finish(name, *given)


@pytest.mark.parametrize("fault", ["kill", "hang"])
def test_a_worker_that_is_killed_or_hangs(small: Trials, fault: str) -> None:
    """F21: as by the system when memory is short. The run ends in good order, names the worker, and goes on exactly."""
    given = ["dataloader.num_workers=2", "dataloader.timeout=5.0"]
    ended = small.call(fault, *given, WORKER_FAULT=f"{fault}:20")
    said = r"worker 1 of the data loader \(process \d+\) " + ("has died|" if fault == "kill" else "has sent nothing for 5 s")
    assert ended.code == 1 and re.search(said + r"DataLoader worker \(pid" * (fault == "kill"), ended.err), ended.err
    assert "go on with: drivetrain resume" in ended.err
    small.finish(fault, *given)


def test_resume_goes_on_after_a_kill_as_well(small: Trials) -> None:
    """Config.json is whole from the first step on."""
    assert small.call("by-name", FAULT="on_step_end:3:kill").code == -signal.SIGKILL
    ended = small._server.call("resume", "runs/by-name", f'plugins=["{Path(__file__).with_name("trial_plugin.py")}"]')
    assert ended.code == 0, ended.err
    assert small.is_equal("by-name")


def test_it_would_notice_a_difference(small: Trials) -> None:
    """Negative control: one bit of the last checkpoint, and a state that nothing restores."""
    one, other = final(small.run("whole")), final(small.run("whole"))
    assert differing(one, other) == []
    weight = next(iter(other["model"].values())).view(-1)
    weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    assert differing(one, other) == [f"/model/{next(iter(one['model']))}"]
    assert small.call("another", "seed=1").code == 0
    assert not small.is_equal("another")
