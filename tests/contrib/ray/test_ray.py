"""Ray Train for real: in this process, and on a local cluster of two workers of which one is killed."""

from __future__ import annotations

import math
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.train import FailureConfig, Result, RunConfig, ScalingConfig
from torch import nn

from drivetrain import Callback, CallbackContext, Precision, Trainer, TrainingConfig, component, option, state
from drivetrain_checkpoint import find_checkpoints, read_checkpoint, verify
from drivetrain_ray import RayReportCallback, ray_trainer
from drivetrain_testing import PlainSgd, tiny_data


@component
class Dies(Callback):
    """Kills one worker, once: in the middle of the step after `at`."""

    at: int = option(help="steps done by then")

    def on_backward(self, ctx: CallbackContext) -> None:
        if ctx.step == self.at and ctx.strategy.rank == ctx.strategy.world_size - 1 and not ctx.resumed:
            os.kill(os.getpid(), signal.SIGKILL)


def config(folder: Path, **options: Any) -> TrainingConfig:
    given = {"max_duration": "3ep", "per_device_batch_size": 8, "log_interval": "2st", "output_dir": folder / "runs"}
    checkpoint = {"use": "checkpoint", "every": "1ep", "asynchronous": False}
    callbacks = [*options.pop("callbacks", []), options.pop("checkpoint", checkpoint)]
    return TrainingConfig(
        **{**given, "standard_callbacks": False, "callbacks": callbacks, "optimizer": PlainSgd(), "scheduler": None, **options}
    )


def make_trainer(config: TrainingConfig) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    return Trainer(
        model, config, tiny_data(), tiny_data(seed=2), loss=nn.MSELoss(), precision=Precision(), scheduler=lambda _: 1.0
    )


def fit(folder: Path, config: TrainingConfig, workers: int, name: str = "x", **options: Any) -> Result:
    run_config = RunConfig(name=name, storage_path=str(folder / "store"), **options)
    return ray_trainer(make_trainer, config, scaling_config=ScalingConfig(num_workers=workers), run_config=run_config).fit()


class TestInThisProcess:
    """Ray Train's local mode: no cluster, the same reports."""

    def test_values_and_checkpoints_reach_ray(self, tmp_path: Path) -> None:
        result = fit(tmp_path, config(tmp_path), workers=0)
        alone = make_trainer(config(tmp_path, run_name="alone"))
        output = alone.train()
        assert result.metrics == {"step": 36, "epoch": 3.0, **output.metrics}
        assert result.checkpoint is not None and Path(result.checkpoint.path).name == "step-00000036"
        assert verify(result.checkpoint.path) == []
        assert equal(read_checkpoint(Path(result.checkpoint.path))["model"], alone.model.state_dict())

    def test_the_output_directory_is_this_programs(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.chdir(tmp_path)
        given = config(tmp_path, output_dir="here", max_duration="1st")
        trainer = ray_trainer(make_trainer, given, scaling_config=ScalingConfig(num_workers=0))
        monkeypatch.chdir("/")
        trainer.fit()
        (run,) = (tmp_path / "here").iterdir()
        assert [found.step for found in find_checkpoints(run)] == [1]
        assert given.run_name is None and str(given.output_dir) == "here", "the caller's configuration is left alone"

    def test_a_callback_of_ones_own_reports_alone(self, tmp_path: Path, monkeypatch: Any) -> None:
        reports: list[Any] = []
        monkeypatch.setattr(ray.train, "report", lambda metrics, checkpoint=None: reports.append((metrics["step"], checkpoint)))
        fit(tmp_path, config(tmp_path, callbacks=[RayReportCallback(every="10st")]), workers=0)
        assert [step for step, checkpoint in reports if checkpoint is None] == [10, 20, 30]
        assert [step for step, checkpoint in reports if checkpoint is not None] == [12, 24, 36]

    def test_a_checkpoint_comes_with_the_values_of_its_step(self, tmp_path: Path, monkeypatch: Any) -> None:
        """It is written in the background, and heard of when the run has come further."""
        reports: list[Any] = []
        monkeypatch.setattr(ray.train, "report", lambda metrics, checkpoint=None: reports.append(metrics))
        late, notes = Late(folder=str(tmp_path)), Notes()
        given = config(
            tmp_path, callbacks=[notes], checkpoint=late, log_interval="3st", eval_interval="2st", max_duration="12st"
        )
        fit(tmp_path, given, workers=0)
        assert reports == [{"step": 6, "epoch": 0.5, **notes.logged[6], **notes.evaluated[6]}]
        assert reports[0] != {"step": 6, "epoch": 0.5, **notes.logged[9], **notes.evaluated[8]}, "negative control"


@component
class Late(Callback):
    """A checkpoint plugin whose save of step 6 ends when step 10 is done."""

    folder: str = option(help="where it lies")

    def on_step_end(self, ctx: CallbackContext) -> None:
        if ctx.step == 10:
            ctx.checkpoint_saved(Path(self.folder) / "step-00000006")


@component
class Notes(Callback):
    logged: dict[int, Any] = state(factory=dict)
    evaluated: dict[int, Any] = state(factory=dict)

    def on_log(self, ctx: CallbackContext) -> None:
        self.logged[ctx.step] = dict(ctx.metrics)

    def on_evaluate_end(self, ctx: CallbackContext) -> None:
        self.evaluated[ctx.step] = dict(ctx.eval_metrics)


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two CPUs on the loopback interface, in a directory with a short name: Ray's sockets lie there."""
    variables = {
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else Ray would keep one in the home directory
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_memory_monitor_refresh_ms": "0",  # what others on this machine need is no reason to kill a worker
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    folder = tempfile.mkdtemp(prefix="ray-")
    address = {"_node_ip_address": "127.0.0.2"} if sys.platform == "linux" else {}  # for 127.0.0.1 Ray takes the machine's own
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=10**8,
        _temp_dir=folder,
        **address,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(cluster: None, tmp_path: Path) -> None:
    """Against one process with the same global batch; where the second attempt began is read from its directory."""
    given = config(tmp_path, callbacks=[Dies(at=14)])
    result = fit(tmp_path, given, workers=2, failure_config=FailureConfig(max_failures=1))
    assert result.error is None and result.checkpoint is not None

    alone = make_trainer(config(tmp_path, run_name="alone", per_device_batch_size=16))
    output = alone.train()
    assert result.metrics is not None and result.metrics.keys() == {"step", "epoch", *output.metrics}
    assert result.metrics["step"] == 18
    assert math.isclose(result.metrics["eval/loss"], output.metrics["eval/loss"], rel_tol=1e-5)
    found = read_checkpoint(Path(result.checkpoint.path))["model"]
    for name, weight in alone.model.state_dict().items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)

    assert list(result.metrics_dataframe["step"]) == [6, 12, 18]
    first, second = sorted(path for path in (tmp_path / "runs").iterdir() if path.name != "alone")
    # Ray had fetched the report of step 6, without which the next would have waited; that of step 12 it may not have
    assert [c.step for c in find_checkpoints(first)] == [12, 6]
    assert [c.step for c in find_checkpoints(second)] in ([18], [18, 12])
    assert second.name.startswith("x-from-checkpoint_")
