"""Profiles of real runs: which steps they have, what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from drivetrain import Callback, ConfigError, Trainer, TrainingConfig, component, hook, make_component
from drivetrain_profiler import ProfilerCallback


@component
class Mark(Callback):
    """Puts the step's number into the trace."""

    @hook(trylast=True)
    def on_batch(self, ctx: Any) -> None:
        with torch.profiler.record_function(f"in step {ctx.step + 1}"):
            pass


def trainer(folder: Path, *callbacks: Callback, steps: int = 12) -> Trainer:
    model = nn.Linear(2, 1)
    config = TrainingConfig(
        max_duration=f"{steps}st", output_dir=folder, run_name="a", standard_callbacks=False, device="cpu", log_interval="4st"
    )
    data = [(torch.ones(2), torch.ones(1))] * 8
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, config, data, loss=nn.functional.mse_loss, optimizer=optimizer, callbacks=[*callbacks, Mark()])


def marked(folder: Path, start: int) -> list[int]:
    """The steps that a trace holds."""
    trace = json.loads((folder / "a" / "profile" / f"rank0-step-{start:08d}.pt.trace.json").read_text())
    names = [event["name"] for event in trace["traceEvents"] if str(event.get("name", "")).startswith("in step ")]
    return sorted({int(name.rpartition(" ")[2]) for name in names})


def test_the_steps_asked_for_and_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, ProfilerCallback(start=[4, 9], steps=2)).train()
    assert marked(tmp_path, 4) == [4, 5]
    assert marked(tmp_path, 9) == [9, 10]
    assert len(list((tmp_path / "a" / "profile").iterdir())) == 4
    printed = capsys.readouterr().err
    assert "profile of steps 4 to 5" in printed and "aten::addmm" in printed
    assert "aten::addmm" in (tmp_path / "a" / "profile" / "rank0-step-00000004.txt").read_text()


def test_a_run_that_ends_in_the_middle(tmp_path: Path) -> None:
    trainer(tmp_path, ProfilerCallback(start=[11], steps=5)).train()
    assert marked(tmp_path, 11) == [11, 12]


def test_a_failed_run_stops_the_profiler(tmp_path: Path) -> None:
    @component
    class Fail(Callback):
        def on_loss(self, ctx: Any) -> None:
            if ctx.step == 4:
                raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, ProfilerCallback(start=[4]), Fail()).train()
    with torch.profiler.profile():  # torch refuses a second profiler in one process
        pass
    assert not (tmp_path / "a" / "profile").exists()


def test_what_is_behind_a_resumed_run_is_not_profiled(tmp_path: Path) -> None:
    run = trainer(tmp_path, ProfilerCallback(start=[3, 8], steps=1))
    for step in run.steps():
        if step.number == 5:
            break
    (tmp_path / "a" / "profile" / "rank0-step-00000003.txt").unlink()
    run.train()
    assert marked(tmp_path, 8) == [8]
    assert not (tmp_path / "a" / "profile" / "rank0-step-00000003.txt").exists()


def test_bad_input() -> None:
    for options in ({"start": [1]}, {"start": 10}, {"steps": 0}, {"top": -1}):
        with pytest.raises(ConfigError):
            make_component("callback", {"use": "profiler", **options})
