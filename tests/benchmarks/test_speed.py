"""The scripts that compare engines: that all train the same steps, and the arithmetic of their tables."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from drivetrain import Trainer, TrainingConfig

SPEED = Path(__file__).with_name("speed")


def test_ratios_are_of_turns_side_by_side(script: Any) -> None:
    task = script("speed/task").Task(model="mlp", batch=10)
    turns = lambda *seconds: [{"seconds_per_step": s, "loss": 1.0} for s in seconds]  # noqa: E731
    found = script("speed/engines").summary(turns(2.0, 30.0, 4.0), turns(1.0, 10.0, 4.0), task)
    assert found["ratio"] == 2.0 and found["quartiles"] == [1.0, 3.0]
    assert found["us_per_step"] == 4e6 and found["per_second"] == 2.5


def test_an_engine_finds_its_own_distributions_and_what_they_need(script: Any) -> None:
    """With none named, everything that is installed: the negative control."""

    def found(*names: str) -> list[bool]:
        command, variables = script("speed/environments").python(names)
        code = "from importlib.util import find_spec as f; print([f(n) is not None for n in ('torch', 'sympy', 'pytest', 'drivetrain')])"
        done = subprocess.run([*command, "-c", code], env=variables, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.lower())  # type: ignore[no-any-return]

    assert found("torch") == [True, True, False, False]
    assert found() == [True] * 4


def test_flops_are_counted_as_llm_c_does(script: Any) -> None:
    """GPT-2 124M with 1,024 tokens: 6 N + 12 L d T = 0.86 GFLOP for a token, N without the position table."""
    gpu = script("speed/gpu")
    task = gpu.SHAPES["gpt2-124m"]
    tied = 124_475_904  # what llm.c counts, head and embedding being one matrix of 50,304 rows
    untied = tied + 50_304 * 768
    assert gpu.flops_per_token(untied, task) / 1e9 == pytest.approx(0.86, abs=0.01)


@pytest.mark.slow
def test_loops_and_engine_train_alike(tmp_path: Path) -> None:
    """Each in its process, as in the real measurement; without the peers, which are not installed here."""
    names = ["raw, textbook", "drivetrain", "drivetrain, watched"]
    command = [sys.executable, str(SPEED / "engines.py"), "--toy", "--out", str(tmp_path), "--engines", *names]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    for part in ("mlp", "gpt", "gpt-bf16", "gpt-defaults"):
        rows = json.loads((tmp_path / f"{part}.json").read_text())["rows"]
        losses = [row["loss"] for row in rows.values()]
        assert max(losses) - min(losses) < 0.2 * max(losses)
        assert (tmp_path / f"{part}.png").stat().st_size > 5000
    assert rows.keys() >= {"raw, tuned", "drivetrain"}


@pytest.mark.slow
def test_models_of_published_shapes_train_alike_at_toy_size(tmp_path: Path) -> None:
    """QLoRA among them, whose layers and adapters the loop makes by hand."""
    shapes = ["gpt2-124m", "llama-1b", "llama-1b-qlora"]
    command = [
        sys.executable,
        str(SPEED / "gpu.py"),
        "--toy",
        "--out",
        str(tmp_path),
        "--engines",
        "drivetrain",
        "--shapes",
        *shapes,
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    for shape in shapes:
        rows = json.loads((tmp_path / f"{shape}.json").read_text())["rows"]
        assert abs(rows["drivetrain"]["loss"] - rows["raw, tuned"]["loss"]) < 0.02


def test_adapters_by_hand_are_those_of_the_mode(script: Any) -> None:
    """As many trained numbers, in as many tensors, and as many bytes in all."""
    task = script("speed/task").Task(model="llama", layers=2, width=64, context=32, vocabulary=512, qlora=True)
    by_hand, loss = script("speed/task").build(task)
    plain, _ = script("speed/task").build(replace(task, qlora=False))
    config = TrainingConfig(training_mode={"use": "qlora", "r": 16}, precision="bf16", standard_callbacks=False, device="cpu")
    ours = Trainer(plain, config, script("speed/task").data(task), loss=loss).model
    assert sizes(by_hand) == sizes(ours)


def sizes(model: nn.Module) -> list[Any]:
    return sorted((p.requires_grad, p.numel() * p.element_size()) for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("script", ["dispatch.py", "start.py", "ranks.py"])
def test_the_other_scripts_run(script: str, tmp_path: Path) -> None:
    more = ["--strategies", "ddp", "fsdp"] if script == "ranks.py" else []
    command = [sys.executable, str(SPEED / script), "--toy", "--out", str(tmp_path), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("|") > 10
    assert json.loads((tmp_path / f"{script[:-3]}.json").read_text())["environment"]["torch"]
