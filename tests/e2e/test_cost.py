"""What all callbacks together cost an ordinary step: counts, which are free of noise."""

from __future__ import annotations

import cProfile
import io
import pstats
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drivetrain import Callback, CallbackContext, Strategy, Trainer, TrainingConfig, component

CALLBACKS: list[Any] = [
    "goodput",
    "throughput",
    "progress",
    {"use": "logging", "trackers": ["jsonl", "csv", "tensorboard"]},
    {"use": "checkpoint", "every": "1000st", "save_at_end": False},
    {"use": "early_stopping", "monitor": "train/loss", "patience": 1000},
    "ema",
    {"use": "anomaly", "nonfinite": "rollback", "spike": "skip"},
    "ledger",
    {"use": "gradient_stats", "steps": 1000},
    {"use": "profiler", "start": [5000]},
]


class Ranks(Strategy):
    """One process that counts what would be collectives."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def sum(self, value: Tensor) -> Tensor:
        self.called.append("sum")
        return value

    def gather(self, value: Any) -> list[Any]:
        self.called.append("gather")
        return [value]

    def barrier(self) -> None:
        self.called.append("barrier")


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))


def data(rows: int) -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(rows, 4), torch.randn(rows, 1))


def trainer(folder: Path, steps: int, *more: Any, strategy: Strategy | None = None, **options: Any) -> Trainer:
    model = mlp()
    given = {"max_duration": f"{steps}st", "per_device_batch_size": 4, "log_interval": "1000st", "eval_interval": False}
    given |= {"output_dir": folder, "callbacks": CALLBACKS, "standard_callbacks": False, "device": "cpu"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    config = TrainingConfig(**{**given, **options})
    return Trainer(model, config, data(4 * 400), loss=nn.MSELoss(), optimizer=optimizer, callbacks=more, strategy=strategy)


def calls(run: Callable[[], Any]) -> int:
    profiler = cProfile.Profile(builtins=False)
    profiler.enable()
    run()
    profiler.disable()
    return sum(entry[0] for entry in pstats.Stats(profiler).stats.values())  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of the progress would depend on the time."""
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setattr("drivetrain_progress.callback.monotonic", lambda: 0.0)


def test_python_calls_per_step_above_a_raw_loop(tmp_path: Path) -> None:
    rows = data(4 * 400).tensors

    def raw(steps: int) -> None:
        model, loss = mlp(), nn.MSELoss()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        for index in range(steps):
            place = slice(4 * index, 4 * index + 4)
            loss(model(rows[0][place]), rows[1][place]).backward()
            optimizer.step()
            optimizer.zero_grad()

    def ours(steps: int) -> None:
        trainer(tmp_path, steps, max_grad_norm=False).train()

    def per_step(loop: Callable[[int], None]) -> float:
        loop(10)
        return (calls(lambda: loop(300)) - calls(lambda: loop(100))) / 200

    above = per_step(ours) - per_step(raw)
    assert above <= 80, f"{above} Python calls per step above the raw loop"


@component
class Where(Callback):
    """Knows which step the run is in, and in which it may read and speak."""

    def on_run_start(self, ctx: CallbackContext) -> None:
        self.ctx = ctx


def test_ordinary_steps_read_nothing_and_call_no_collective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[int, str]] = []
    strategy = Ranks()
    run = trainer(tmp_path, 24, strategy=strategy, log_interval="6st")

    def watched(name: str, original: Any) -> Any:
        def spy(*args: Any, **kwargs: Any) -> Any:
            found.append((run.ctx.step, name))
            return original(*args, **kwargs)

        return spy

    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "__index__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, watched(name, getattr(Tensor, name)))
    for name in ("sum", "gather", "barrier"):
        monkeypatch.setattr(Ranks, name, watched(name, getattr(Ranks, name)))
    run.train()
    assert {(step, name) for step, name in found if step % 6} == set()
    assert {step for step, name in found if name == "tolist"} >= {6, 12, 18, 24}, "the spy must see the reads of logging steps"
    assert "gather" in {name for _, name in found}, "and the collectives of a checkpoint's beginning"
