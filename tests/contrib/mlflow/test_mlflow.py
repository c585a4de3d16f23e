"""The MLflow tracker: what it writes is read back with MLflow's own client."""

from __future__ import annotations

import json
import logging
import math
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from torch import nn

from drivetrain import Callback, Trainer, TrainingConfig, component, make_component
from drivetrain_mlflow import MlflowTracker


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An empty database: making its tables takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    return (folder / "mlflow.db").read_bytes()


@pytest.fixture
def run_dir(tmp_path: Path, prepared: bytes) -> Path:
    (tmp_path / "mlflow.db").write_bytes(prepared)
    (tmp_path / "quiet-fox").mkdir()
    return tmp_path / "quiet-fox"


def context(folder: Path, step: int = 0) -> Any:
    """As much of a run as a tracker asks for."""
    return SimpleNamespace(run_dir=folder, step=step, resumed=step > 0, config=SimpleNamespace(run_name="quiet-fox"))


def client(folder: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{folder.parent / 'mlflow.db'}")


def artifact(run_dir: Path, run_id: str, path: str) -> str:
    """Where a file of a run is; the client's own `download_artifacts` looks in the default store before MLflow 3.1."""
    return download_artifacts(f"{client(run_dir).get_run(run_id).info.artifact_uri}/{path}")


def history(folder: Path, run_id: str, name: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client(folder).get_metric_history(run_id, name))


def sitting(folder: Path, start: int, end: int, offset: float = 0.0, saved: Any = None) -> dict[str, Any]:
    """One sitting: a value for each second step after `start`, an evaluation for each fourth; gives the state after it."""
    tracker = make_component("tracker", {"use": "mlflow", "experiment": "foxes"})
    assert isinstance(tracker, MlflowTracker)
    if saved is not None:
        tracker.load_state_dict(saved)
    tracker.start(context(folder, start))
    tracker.config({"seed": 3, "optimizer": {"use": "adamw", "lr": 0.001}}, start)
    for step in range(start + 2, end + 1, 2):
        tracker.log({"train/loss": step + offset}, step)
        if step % 4 == 0:
            tracker.log({"eval/loss": step + offset + 0.5}, step)
    tracker.close()
    return tracker.state_dict()


def test_values_and_configuration_come_back(run_dir: Path) -> None:
    run_id = sitting(run_dir, 0, 8)["run_id"]
    assert history(run_dir, run_id, "train/loss") == [(2, 2.0), (4, 4.0), (6, 6.0), (8, 8.0)]
    assert history(run_dir, run_id, "eval/loss") == [(4, 4.5), (8, 8.5)]
    run = client(run_dir).get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("quiet-fox", "FINISHED")
    assert run.data.params == {"seed": "3", "optimizer.use": "adamw", "optimizer.lr": "0.001"}
    assert client(run_dir).get_experiment(run.info.experiment_id).name == "foxes"
    path = artifact(run_dir, run_id, "config/step-0.json")
    assert json.loads(Path(path).read_text())["optimizer"] == {"use": "adamw", "lr": 0.001}


def test_a_resumed_run_is_the_same_and_repeats_nothing(run_dir: Path) -> None:
    """Killed after step 10, resumed from step 6."""
    saved = sitting(run_dir, 0, 10)
    assert sitting(run_dir, 6, 14, offset=100.0, saved=saved) == saved
    found = history(run_dir, saved["run_id"], "train/loss")
    assert found == [(2, 2.0), (4, 4.0), (6, 6.0), (8, 8.0), (10, 10.0), (12, 112.0), (14, 114.0)]
    assert history(run_dir, saved["run_id"], "eval/loss") == [(4, 4.5), (8, 8.5), (12, 112.5)]


def test_a_run_begun_anew_is_another_one(run_dir: Path) -> None:
    first = sitting(run_dir, 0, 4)
    assert sitting(run_dir, 0, 4, saved=first)["run_id"] != first["run_id"]


def test_odd_names_and_values(run_dir: Path) -> None:
    tracker = MlflowTracker()
    tracker.start(context(run_dir))
    tracker.log({"a/b/c": math.nan, "new\nline": 2.0, "esc\x1b[31m": math.inf, "loss, mean (%)": 1.0}, 1)
    tracker.text("sam\nple", "once upon a time", 1)
    run_id = tracker.run_id
    assert run_id is not None
    tracker.close()
    assert math.isnan(history(run_dir, run_id, "a/b/c")[0][1])
    assert history(run_dir, run_id, "new_line") == [(1, 2.0)]
    assert history(run_dir, run_id, "esc__31m")[0][1] > 1e300
    assert history(run_dir, run_id, "loss_ mean ___") == [(1, 1.0)]
    path = artifact(run_dir, run_id, "sam_ple/step-1.txt")
    assert Path(path).read_text() == "once upon a time"


def test_a_server_that_is_not_there_is_said_once_and_the_data_kept(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = MlflowTracker(uri="http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING, "drivetrain.mlflow"):
        tracker.start(context(run_dir))
        for step in (2, 4):
            tracker.log({"train/loss": float(step)}, step)
        tracker.close()
    said = [record for record in caplog.records if record.name == "drivetrain.mlflow"]
    assert len(said) == 1 and "mlflow.db" in said[0].getMessage()
    assert tracker.run_id is not None
    assert history(run_dir, tracker.run_id, "train/loss") == [(2, 2.0), (4, 4.0)]


class Server:
    """As much of MLflow's server as the tracker talks to, over real HTTP; in a database of its own."""

    def __init__(self, folder: Path) -> None:
        self.metrics: list[tuple[str, int]] = []
        self.refuses = False
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, asked: Any) -> None:
                status, answer = server.answer(self.path.partition("?")[0].rpartition("/mlflow/")[2], asked)
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self.folder = folder
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self.http.server_port}"
        self._thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def answer(self, path: str, asked: Any) -> tuple[int, Any]:
        if self.refuses:
            return 401, {"error_code": "UNAUTHENTICATED", "message": "log in\nfirst"}
        info = {"run_id": "r1", "run_uuid": "r1", "experiment_id": "1", "status": "RUNNING", "artifact_uri": str(self.folder)}
        run = {"run": {"info": info, "data": {"metrics": [{"key": k, "value": 0.0, "step": s} for k, s in self.metrics[-1:]]}}}
        if path == "runs/log-batch":
            self.metrics += [(metric["key"], metric["step"]) for metric in asked.get("metrics", [])]
        known = {
            "experiments/get-by-name": (404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}),
            "experiments/create": (200, {"experiment_id": "1"}),
            "metrics/get-history": (200, {"metrics": [{"key": k, "value": 0.0, "step": s} for k, s in self.metrics]}),
            "runs/create": (200, run),
            "runs/get": (200, run),
            "runs/update": (200, {"run_info": info}),
        }
        return known.get(path, (200, {}))

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self._thread.join()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name, value in (("MAX_RETRIES", "0"), ("TIMEOUT", "20"), ("BACKOFF_FACTOR", "0")):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    made = Server(tmp_path / "artifacts")
    yield made
    with suppress(OSError):
        made.close()


@component
class Feed(Callback):
    """Hands the log of a run to a tracker, and does something at a step."""

    tracker: Any
    at: int = 0
    then: Any = None

    def on_run_start(self, ctx: Any) -> None:
        self.tracker.start(ctx)
        self.tracker.config({"seed": 3}, ctx.step)

    def on_log(self, ctx: Any) -> None:
        if ctx.step == self.at:
            self.then()
        self.tracker.log(dict(ctx.metrics), ctx.step)

    def on_run_end(self, ctx: Any) -> None:
        self.tracker.close()


@pytest.mark.parametrize("how", ["gone", "refuses"])
def test_a_server_that_is_lost_in_the_middle_of_a_run(
    run_dir: Path, server: Server, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    def lose() -> None:
        server.refuses = how == "refuses"
        if how == "gone":
            server.close()

    tracker = MlflowTracker(uri=server.uri)
    config = TrainingConfig(
        max_duration="8st",
        log_interval="2st",
        per_device_batch_size=1,
        device="cpu",
        output_dir=run_dir.parent,
        run_name=run_dir.name,
        standard_callbacks=False,
    )
    model = nn.Linear(1, 1)
    data = [(torch.ones(1), torch.ones(1))] * 8
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING, "drivetrain.mlflow"):
        run = Trainer(
            model, config, data, loss=nn.MSELoss(), optimizer=optimizer, callbacks=[Feed(tracker=tracker, at=4, then=lose)]
        )
        assert run.train().completed
    (record,) = caplog.records
    assert re.fullmatch(
        r"MLflow at http://127.* was lost \(.*\)\. The rest of this run is recorded in sqlite:///.*mlflow\.db\.",
        record.getMessage(),
    )
    assert ("train/loss", 2) in server.metrics and ("train/loss", 4) not in server.metrics
    (kept,) = client(run_dir).search_runs([client(run_dir).get_experiment_by_name("drivetrain").experiment_id])
    assert [step for step, _ in history(run_dir, kept.info.run_id, "train/loss")] == [4, 6, 8]
    assert kept.info.status == "FINISHED"
    assert tracker.state_dict() == {"run_id": "r1", "where": server.uri}, "a resumed run is that of the server"


def test_a_resumed_run_tries_its_server_again(run_dir: Path, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    tracker = MlflowTracker(uri=server.uri)
    tracker.start(context(run_dir))
    tracker.log({"a": 1.0}, 2)
    server.refuses = True
    tracker.log({"a": 1.0}, 4)
    saved = tracker.state_dict()
    tracker.close()
    server.refuses = False
    again = MlflowTracker(uri=server.uri)
    again.load_state_dict(saved)
    again.start(context(run_dir, 4))
    again.log({"a": 1.0}, 2)
    again.log({"a": 1.0}, 6)
    again.close()
    assert server.metrics == [("a", 2), ("a", 6)]
    assert len(caplog.records) == 1


def test_what_a_server_says_of_a_value_is_no_loss_of_the_server(run_dir: Path, server: Server) -> None:
    tracker = MlflowTracker(uri=server.uri)
    tracker.start(context(run_dir))
    answer = server.answer
    server.answer = lambda path, asked: (400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "no"})  # type: ignore[method-assign]
    with pytest.raises(MlflowException, match="INVALID_PARAMETER_VALUE"):
        tracker.log({"a": 1.0}, 2)
    server.answer = answer  # type: ignore[method-assign]
    tracker.log({"a": 1.0}, 4)
    tracker.close()
    assert server.metrics == [("a", 4)]
