"""Every built-in callback goes on exactly: all of them together over real kills, and those with state in a part of the grid."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.everything import LEFT_OUT, built_in
from tests.faults.test_exactness import QUICK, Case, Interrupt, equal, final, sitting
from tests.faults.watched import GRID
from torch import nn

from drivetrain import Callback, CheckpointCallback, EarlyStoppingCallback, Trainer, TrainingConfig
from drivetrain_anomaly import AnomalyCallback
from drivetrain_checkpoint import find_checkpoints, read_checkpoint
from drivetrain_ema import EmaCallback
from drivetrain_goodput import GoodputCallback
from drivetrain_ledger import read_book
from drivetrain_ledger.book import find


def watchers() -> list[Callback]:
    """As many as there are with state, and one that times the rest."""
    return [
        EmaCallback(decay=0.9),
        AnomalyCallback(nonfinite="rollback", spike="skip", norm_factor=2.0, warmup=2, snapshot_every=2, renew_every=4),
        EarlyStoppingCallback(patience=100),
        GoodputCallback(show=False),
    ]


@pytest.mark.parametrize("case", QUICK[:8], ids=lambda case: case.id)
def test_interrupted_and_not(tmp_path: Path, case: Case) -> None:
    whole, _ = sitting(tmp_path / "whole", case._replace(place="mid-epoch"), None, *watchers())
    expected = final(whole)
    for at in [*case.stops(), None]:
        trainer, _ = sitting(tmp_path, case, at, *watchers())
        assert at is None or trainer.ctx.step == at
    found = final(trainer)
    assert {"callback:EmaCallback", "callback:AnomalyCallback", "callback:EarlyStoppingCallback"} <= set(found["components"])
    assert equal(found, expected)


@pytest.mark.parametrize("name", ["EmaCallback", "AnomalyCallback"])
def test_negative_control_a_watcher_that_forgets(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = QUICK[0]._replace(place="mid-epoch")
    whole, _ = sitting(tmp_path / "whole", case, None, *watchers())
    expected: dict[str, Any] = final(whole)
    sitting(tmp_path, case, case.stops()[0], *watchers())
    forgetful = {"EmaCallback": EmaCallback, "AnomalyCallback": AnomalyCallback}[name]
    monkeypatch.setattr(forgetful, "load_state_dict", lambda self, saved: None)
    trainer, _ = sitting(tmp_path, case, None, *watchers())
    assert not equal(final(trainer)["components"][f"callback:{name}"], expected["components"][f"callback:{name}"])


def bad_window(folder: Path, at: int | None, name: str = "a") -> Trainer:
    """A run over a NaN in step 9's data, logged every sixth step, with real checkpoints; interrupted after the step `at`."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    rows = [(torch.randn(3), torch.randn(1)) for _ in range(4 * 16)]
    rows[4 * 8 + 1][0].fill_(float("nan"))
    config = TrainingConfig(
        max_duration="1ep",
        per_device_batch_size=4,
        log_interval="6st",
        dataloader={"shuffle": False},
        output_dir=folder,
        run_name=name,
        device="cpu",
        standard_callbacks=False,
    )
    run = Trainer(
        model,
        config,
        rows,
        loss=nn.MSELoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.02),
        scheduler=lambda position: 1 / (1 + position),
        callbacks=[Interrupt(at=at), AnomalyCallback(nonfinite="rollback"), CheckpointCallback(every="5st")],
    )
    run.train()
    return run


@pytest.mark.parametrize("at", [9, 10, 11])  # step 9 is bad, a periodic checkpoint comes after step 10, the log after step 12
def test_a_rollback_over_an_interruption(tmp_path: Path, at: int) -> None:
    whole = final(bad_window(tmp_path, None, "whole"))
    bad_window(tmp_path, at)
    resumed = bad_window(tmp_path, None)
    assert resumed.ctx.resumed and resumed.ctx.step == 15
    assert equal(final(resumed), whole)


def test_a_rollback_over_a_kill(tmp_path: Path) -> None:
    """What a kill after step 11 leaves: the checkpoint of step 10."""
    whole = final(bad_window(tmp_path, None, "whole"))
    bad_window(tmp_path, 10)
    bad_window(tmp_path, 11)
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-00000011")
    resumed = bad_window(tmp_path, None)
    assert resumed.ctx.step == 15
    assert equal(final(resumed), whole)


# -- all built-in callbacks, in processes that are killed ------------------------------------------------------------------------

MEASURED = ("speed/", "memory/", "system/", "time")  # what depends on the machine
FORGETFUL = ["ema", "anomaly", "early_stopping"]  # with each of which the end must differ when its state is lost


def test_every_built_in_callback_is_in_the_grid() -> None:
    assert set(GRID) | set(LEFT_OUT) == built_in(), "a new callback belongs into tests/faults/watched.py"


def carried_out(folder: Path, plan: list[dict[str, Any]]) -> None:
    command = [sys.executable, "-m", "tests.faults.watched", str(folder), json.dumps(plan)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes == {run["name"]: [*(-9 for _ in run["kills"]), 0] for run in plan}, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that nobody touched, one that was killed three times, and for each callback one that was killed and forgets its state."""
    folder = tmp_path_factory.mktemp("watched")
    kills = [["on_clipped", 4], ["on_log", 12], ["on_evaluate_batch", 20]]
    plan: list[dict[str, Any]] = [{"name": "whole", "kills": []}, {"name": "killed", "kills": kills}]
    plan += [{"name": f"without-{name}", "kills": [["on_step_start", 11]], "forget": name} for name in FORGETFUL]
    carried_out(folder, plan)
    return folder


def end(run: Path) -> dict[str, Any]:
    """The state at the end, without clocks, places, and what checkpoints remember of each other."""
    tree: dict[str, Any] = read_checkpoint(find_checkpoints(run)[0].path)
    del tree["manifest"], tree["progress"]["seconds"]
    logged = tree["progress"]["metrics"]["logged"]
    tree["progress"]["metrics"]["logged"] = {k: v for k, v in logged.items() if not k.startswith(MEASURED)}
    tree["components"].pop("callback:checkpoint", None)
    for unlogged in tree["unlogged"]:
        unlogged["values"] = {k: v for k, v in unlogged["values"].items() if not k.startswith(MEASURED)}
    return tree


def lines(path: Path) -> list[Any]:
    """The rows of a log without what the machine measured."""
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            rows: list[Any] = list(csv.DictReader(file))
        rows = [{name: value for name, value in row.items() if value} for row in rows]
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(MEASURED)} for row in rows]


@pytest.mark.timeout(900)
class TestKilled:
    def test_the_end_is_that_of_the_run_that_was_not(self, runs: Path) -> None:
        killed, whole = end(runs / "killed"), end(runs / "whole")
        assert {"callback:ema", "callback:anomaly", "callback:early_stopping"} <= set(whole["components"])
        assert whole["components"]["callback:anomaly"]["left_out"] == [[0, 8], [1, 8]], (
            "both epochs went back over the bad window"
        )
        assert equal(killed, whole)

    @pytest.mark.parametrize("name", FORGETFUL)
    def test_negative_control_a_callback_that_forgets(self, runs: Path, name: str) -> None:
        assert not equal(end(runs / f"without-{name}"), end(runs / "whole"))

    @pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.csv"])
    def test_the_logs_are_the_same(self, runs: Path, name: str) -> None:
        assert lines(runs / "killed" / name) == lines(runs / "whole" / name)

    def test_the_same_anomalies_are_told(self, runs: Path) -> None:
        def told(run: str) -> set[tuple[Any, ...]]:
            rows = lines(runs / run / "events.jsonl")
            return {(row["epoch"], row["window"], row["kind"], row["tensor"], tuple(row["samples"])) for row in rows}

        assert told("killed") == told("whole") != set()

    def test_the_ledger_knows_the_same_samples_of_every_step(self, runs: Path) -> None:
        killed, whole = (read_book(runs / run) for run in ("killed", "whole"))
        assert [find(killed, step).samples for step in range(1, 27)] == [find(whole, step).samples for step in range(1, 27)]

    def test_files_of_the_others(self, runs: Path) -> None:
        for run in ("killed", "whole"):
            assert list((runs / run / "profile").glob("*.json")), "the profile of step 5"
            assert "sample after 26 steps" in (runs / run / "samples.txt").read_text()
        assert (runs / "killed" / "lr_finder.csv").read_text() == (runs / "whole" / "lr_finder.csv").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("event", ["on_step_start", "on_clipped", "on_log", "on_evaluate_batch"])
def test_killed_at_every_step(tmp_path: Path, event: str) -> None:
    every = {"on_log": 3, "on_evaluate_batch": 4}.get(event, 1)
    steps = [step for step in range(every, 24, every) if not (event == "on_log" and step in (9, 21))]  # those it goes back from
    carried_out(tmp_path, [{"name": "whole", "kills": []}, *({"name": f"at-{s}", "kills": [[event, s]]} for s in steps)])
    whole = end(tmp_path / "whole")
    for step in steps:
        assert equal(end(tmp_path / f"at-{step}"), whole), step
        assert lines(tmp_path / f"at-{step}" / "metrics.jsonl") == lines(tmp_path / "whole" / "metrics.jsonl"), step
