"""What all built-in callbacks together cost an ordinary step: counts, which are free of noise. The time: tests/benchmarks/callbacks.py."""

from __future__ import annotations

import cProfile
import io
import pstats
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.everything import CALLBACKS, LEFT_OUT, Net, built_in, tables
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drivetrain import Strategy, Trainer, TrainingConfig, at_hand
from drivetrain_precision import ScaledPrecision

READS = ("item", "tolist", "__float__", "__bool__", "__int__", "__index__", "cpu", "numpy", "nonzero")
COLLECTIVES = ("sum", "gather", "barrier")


class Ranks(Strategy):
    """One process that counts what would be collectives; with two ranks, it finds itself on both."""

    def __init__(self, world_size: int = 1) -> None:
        self.world_size = world_size

    def sum(self, value: Tensor) -> Tensor:
        return value * self.world_size

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.world_size

    def barrier(self) -> None:
        return None


def data(rows: int) -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(rows, 4), torch.randn(rows, 1))


def net() -> Net:
    torch.manual_seed(0)
    return Net(16, 0)


def trainer(folder: Path, steps: int, *more: Any, fused: bool = True, **options: Any) -> Trainer:
    model = net()
    given = {"max_duration": f"{steps}st", "per_device_batch_size": 4, "log_interval": "1000st", "eval_interval": False}
    given |= {"output_dir": folder, "callbacks": tables(), "standard_callbacks": False, "device": "cpu"}
    parts = {key: options.pop(key) for key in ("strategy", "precision") if key in options}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    config = TrainingConfig(**{**given, **options})
    return Trainer(model, config, data(4 * 400), loss=nn.MSELoss(), optimizer=optimizer, callbacks=more, **parts)


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
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setattr("drivetrain_progress.callback.monotonic", lambda: 0.0)


def test_every_built_in_callback_takes_part() -> None:
    assert set(CALLBACKS) | set(LEFT_OUT) == built_in(), "a new callback belongs into tests/e2e/everything.py"


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
def test_python_calls_per_step_above_a_raw_loop(tmp_path: Path, fused: bool) -> None:
    rows = data(4 * 400).tensors

    def raw(steps: int) -> None:
        model, loss = net(), nn.MSELoss()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        parameters = list(model.parameters())
        for index in range(steps):
            place = slice(4 * index, 4 * index + 4)
            loss(model(rows[0][place]), rows[1][place]).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def ours(steps: int) -> None:
        trainer(tmp_path, steps, fused=fused).train()

    def per_step(loop: Callable[[int], None]) -> float:
        loop(10)
        return (calls(lambda: loop(300)) - calls(lambda: loop(100))) / 200

    above = per_step(ours) - per_step(raw)
    assert above <= 80, f"{above} Python calls per step above the raw loop"


def found_on_ordinary_steps(run: Trainer, period: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], Counter[str]]:
    """Readings of tensors and collectives, on ordinary steps and on those that log."""
    ordinary: Counter[str] = Counter()
    logging: Counter[str] = Counter()

    def watched(name: str, original: Any) -> Any:
        def spy(*args: Any, **kwargs: Any) -> Any:
            (ordinary if run.ctx.step % period else logging)[name] += 1
            return original(*args, **kwargs)

        return spy

    for name in READS:
        monkeypatch.setattr(Tensor, name, watched(name, getattr(Tensor, name)))
    for name in COLLECTIVES:
        monkeypatch.setattr(Ranks, name, watched(name, getattr(Ranks, name)))
    run.train()
    return ordinary, logging


def added(folder: Path, callbacks: list[Any], beside: list[Any], **options: Any) -> tuple[Counter[str], Counter[str]]:
    """What `callbacks` read and call more than the engine with `beside` does, on ordinary steps and on those that log."""
    pairs = []
    for chosen in (callbacks, beside):
        given = {"strategy": Ranks(), "log_interval": "6st", "callbacks": chosen, **options}
        if "precision" in options:
            given["precision"] = ScaledPrecision(torch.device("cpu"), "a test", init_scale=1024.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(at_hand, "__code__", (lambda value: None).__code__)  # a CPU's numbers are, a device's are not
            pairs.append(found_on_ordinary_steps(trainer(folder, 24, **given), 6, patch))
    (ordinary, logging), (alone, logging_alone) = pairs
    return ordinary - alone, logging - logging_alone


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
def test_ordinary_steps_read_nothing_and_call_no_collective(tmp_path: Path, ranks: int, fused: bool) -> None:
    without = ("batch_size_finder", *(() if fused else ("anomaly",)))
    ordinary, logging = added(tmp_path, tables(*without), [], strategy=Ranks(ranks), fused=fused)
    assert ordinary == {}
    assert logging["tolist"] >= 4 * fused, "the spy must see the reads of logging steps"
    assert logging["gather"] >= 1, "and the collectives of a checkpoint's beginning"


def test_an_optimizer_that_is_not_fused_costs_one_reading_a_step_for_the_veto(tmp_path: Path) -> None:
    """The limit that the anomaly callback states."""
    assert added(tmp_path, tables(), tables("anomaly"), fused=False)[0] == {"item": 20}


def test_a_loss_scale_costs_one_reading_more_only_for_the_veto_of_spikes(tmp_path: Path) -> None:
    def more(**options: Any) -> Counter[str]:
        beside = tables("anomaly")
        return added(tmp_path, [*beside, {"use": "anomaly", **options}], beside, precision="fp16")[0]

    assert more(nonfinite="rollback") == {}, "what is not finite is the scale's business"
    assert more(nonfinite="rollback", spike="skip") == {"item": 20}
