"""Throughput: the arithmetic against a clock that the test sets, then a real run."""

from __future__ import annotations

import itertools
import resource
import shutil
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import drivetrain_throughput
from drivetrain import Callback, Precision, Trainer, TrainingConfig, component
from drivetrain_throughput import ThroughputCallback

SPEEDS = ("steps_per_second", "samples_per_second", "tokens_per_second", "step_ms", "data_wait")


class Run:
    """A context whose clock stands still until it is told to move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **counters: Any) -> None:
        given = {"step": 0, "samples": 0, "tokens": 0, "data_wait": 0.0, "metrics": {}, "device": torch.device("cpu")}
        given |= {"config": TrainingConfig(compile=True), "trainer": SimpleNamespace(has_run_dir=False)}
        self.ctx: Any = SimpleNamespace(**given | counters)
        self.now = 1000.0
        monkeypatch.setattr(drivetrain_throughput, "perf_counter", lambda: self.now)
        self.callback = ThroughputCallback()
        self.callback.on_run_start(self.ctx)

    def train(self, steps: int, seconds: float, wait: float = 0.0, tokens: int = 64) -> None:
        self.now += seconds
        self.ctx.step += steps
        self.ctx.samples += 8 * steps
        self.ctx.tokens += tokens * steps
        self.ctx.data_wait += wait

    def evaluate(self, seconds: float) -> None:
        self.callback.on_evaluate_start(self.ctx)
        self.now += seconds
        self.callback.on_evaluate_end(self.ctx)

    def save(self, seconds: float) -> None:
        self.now += seconds
        self.callback.on_checkpoint_saved(self.ctx)

    def log(self) -> dict[str, float]:
        self.ctx.metrics = {"train/loss": 1.0}
        self.callback.on_log(self.ctx)
        return {name: self.ctx.metrics[f"speed/{name}"] for name in SPEEDS if f"speed/{name}" in self.ctx.metrics}


def test_speeds_are_those_of_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, step=500, samples=4000, tokens=32_000)  # after a resume the counters do not begin at 0
    run.train(steps=10, seconds=2.0, wait=0.5)
    expected = {
        "steps_per_second": 5.0,
        "samples_per_second": 40.0,
        "tokens_per_second": 320.0,
        "step_ms": 200.0,
        "data_wait": 0.25,
    }
    assert run.log() == pytest.approx(expected)
    run.train(steps=10, seconds=1.0)
    assert run.log() == pytest.approx({k: 2 * v for k, v in expected.items()} | {"step_ms": 100.0, "data_wait": 0.0})
    assert run.ctx.metrics["train/loss"] == 1.0, "what others logged stays"


def test_a_run_that_waits_for_data_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    run.ctx.config.dataloader.num_workers = 3
    quiet = [
        [(10, 4.0, 1.9), (10, 4.0, 1.9)],  # less than half of the time
        [(10, 0.4, 0.3), (10, 0.4, 0.3)],  # less than a second
        [(10, 4.0, 3.0), (10, 4.0, 0.0), (10, 4.0, 3.0), (10, 4.0, 0.0)],  # not twice in a row: workers that start, a slow disk
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steps, seconds, wait in itertools.chain.from_iterable(quiet):
            run.train(steps, seconds, wait)
            run.log()
    run.train(10, 4.0, 3.0)
    run.log()
    run.train(10, 4.0, 2.5)
    with pytest.warns(
        UserWarning, match=r"^throughput: 62% of the time .*num_workers is 3, the machine has 16 cores; .* workers_finder"
    ):
        run.log()
    run.train(10, 4.0, 3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.log()


def test_batches_without_tokens_have_no_token_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    run.train(steps=1, seconds=1.0, tokens=0)
    assert "tokens_per_second" not in run.log()


def test_evaluation_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    run.train(steps=5, seconds=1.0)
    run.evaluate(60.0)
    run.train(steps=5, seconds=1.0, wait=0.5)
    run.evaluate(30.0)
    assert run.log()["step_ms"] == pytest.approx(200.0)
    run.train(steps=10, seconds=2.0)
    assert run.log()["step_ms"] == pytest.approx(200.0), "each pause is taken out of its own interval"


def test_a_checkpoint_after_a_log_or_an_evaluation_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    run.train(steps=10, seconds=2.0)
    run.log()
    run.save(20.0)
    run.train(steps=10, seconds=2.0)
    assert run.log()["step_ms"] == pytest.approx(200.0)
    run.evaluate(60.0)
    run.save(20.0)
    run.train(steps=10, seconds=2.0)
    assert run.log()["step_ms"] == pytest.approx(200.0)


def test_a_checkpoint_that_becomes_durable_later_takes_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved in the background: the steps meanwhile were training."""
    run = Run(monkeypatch)
    run.train(steps=10, seconds=2.0)
    run.log()
    run.train(steps=5, seconds=1.0)
    run.save(0.0)
    run.train(steps=5, seconds=1.0)
    assert run.log()["step_ms"] == pytest.approx(200.0)


def test_a_log_without_a_step_has_no_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    assert run.log() == {}


def test_memory_and_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    run.log()
    metrics = run.ctx.metrics
    assert metrics["memory/process_gb"] == pytest.approx(psutil.Process().memory_info().rss / 1e9, rel=0.2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert metrics["memory/process_peak_gb"] == pytest.approx(max(peak * 1024 / 1e9, metrics["memory/process_gb"]), rel=0.2)
    assert metrics["memory/process_peak_gb"] >= metrics["memory/process_gb"]
    assert 0 <= metrics["system/cpu_percent"] <= 100
    assert "memory/device_gb" not in metrics


def test_the_peak_outlives_what_caused_it(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    run.log()
    before = run.ctx.metrics["memory/process_peak_gb"]
    size = int((before - psutil.Process().memory_info().rss / 1e9) * 1e9) + 200_000_000
    block = bytearray(size)
    block[::4096] = b"x" * len(block[::4096])
    del block
    run.log()
    assert run.ctx.metrics["memory/process_peak_gb"] >= before + 0.15
    assert run.ctx.metrics["memory/process_gb"] < run.ctx.metrics["memory/process_peak_gb"] - 0.1


def test_memory_of_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 3_500_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a new one")
    run = Run(monkeypatch, device=torch.device("cuda", 0))
    run.log()
    assert run.ctx.metrics["memory/device_gb"] == 3.5


def test_an_accelerator_that_does_not_count_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, device=torch.device("meta"))
    run.log()
    assert "memory/device_gb" not in run.ctx.metrics


@component
class Slow(Callback):
    """Slow evaluation, and a listener of the log in front of the configured place of throughput."""

    def on_log(self, ctx: Any) -> None:
        assert "speed/step_ms" in ctx.metrics, "throughput comes first, whatever the order of the configuration"

    def on_evaluate_batch(self, ctx: Any) -> None:
        time.sleep(0.2)


class SlowData(torch.utils.data.Dataset[Any]):
    """Eight samples that take 5 ms each."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.005)
        return torch.ones(4), torch.ones(1)


def test_a_real_run() -> None:
    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return nn.functional.mse_loss(outputs, targets)

    seen = []

    @component
    class Watch(Callback):
        def on_log(self, ctx: Any) -> None:
            seen.append(dict(ctx.metrics))

    model = nn.Linear(4, 1)
    config = TrainingConfig(
        max_duration="12st", eval_interval="3st", log_interval="4st", per_device_batch_size=2, standard_callbacks=False
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callbacks = [Slow(), ThroughputCallback(), Watch()]
    Trainer(model, config, SlowData(), SlowData(), loss=loss, optimizer=optimizer, callbacks=callbacks).train()
    assert len(seen) == 3
    for metrics in seen[1:]:  # a step: 2 × 5 ms of data, 10 ms of loss; an evaluation in the interval: 4 × (0.2 s + 20 ms)
        assert 20 <= metrics["speed/step_ms"] < 180, "with the evaluation it would be 220 more"
        assert 0 < metrics["speed/data_wait"] < 1
        assert metrics["speed/samples_per_second"] == pytest.approx(2 * metrics["speed/steps_per_second"])


def test_percentiles_are_of_single_steps_without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nineteen steps of 10 ms and one of 90, with an evaluation and a log between them."""
    run = Run(monkeypatch)
    for index in range(20):
        run.train(steps=1, seconds=0.09 if index == 7 else 0.01)
        run.callback.on_step_end(run.ctx)
        if index == 11:
            run.evaluate(60.0)
    run.now += 30.0  # the log's own time, until the values are at hand
    run.log()
    found = {name: run.ctx.metrics[f"speed/step_ms_{name}"] for name in ("p50", "p95", "max")}
    assert found == pytest.approx({"p50": 10.0, "p95": 90.0, "max": 90.0})
    run.train(steps=1, seconds=0.02)
    run.callback.on_step_end(run.ctx)
    run.log()
    assert run.ctx.metrics["speed/step_ms_max"] == pytest.approx(20.0), "of its own interval only"


class Attention(nn.Module):
    """One layer of everything that is counted: products, attention, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48, bias=False), nn.Linear(16, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Watch(Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, ctx: Any) -> None:
        self.seen.append(dict(ctx.metrics))


def attend(throughput: ThroughputCallback, **given: Any) -> list[dict[str, float]]:
    watch, model = Watch(), Attention()
    config = TrainingConfig(
        max_duration="6st", log_interval="3st", per_device_batch_size=4, standard_callbacks=False, device="cpu", **given
    )
    data = torch.utils.data.TensorDataset(torch.randn(24, 10, 16), torch.randn(24, 10, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Trainer(
        model, config, data, data, loss=nn.MSELoss(), optimizer=optimizer, callbacks=[throughput, watch], precision=Precision()
    ).train()
    return watch.seen


def test_flops_are_those_of_the_paper_and_pencil() -> None:
    """Batch 4, time 10, width 16: products 2 m n k, three of them for a layer whose input needs a gradient, two for the first;
    attention 4 b t t d forward and, with the scores computed anew, 2.5 times that backward."""
    rows = 4 * 10
    products = 2 * (2 * rows * 16 * 48) + 3 * (2 * rows * 16 * 1)
    attention = 4 * 4 * 10 * 10 * 16
    first, second = attend(ThroughputCallback(peak_tflops=0.5))
    counted = second["speed/tflops_per_second"] * 1e12 / second["speed/steps_per_second"]
    assert counted == pytest.approx(products + 3.5 * attention, rel=1e-9)
    assert second["speed/mfu"] == pytest.approx(second["speed/tflops_per_second"] / 0.5)
    assert "speed/tflops_per_second" in first and first["speed/step_ms_max"] >= first["speed/step_ms_p50"] > 0


def test_evaluation_in_between_is_not_counted_as_a_step() -> None:
    whole = attend(ThroughputCallback(peak_tflops=1.0))[-1]
    disturbed = attend(ThroughputCallback(peak_tflops=1.0), eval_interval="2st")[-1]
    per_step = [row["speed/tflops_per_second"] / row["speed/steps_per_second"] for row in (whole, disturbed)]
    assert per_step[0] == pytest.approx(per_step[1], rel=1e-9)


def stepped(width: int, log_interval: str = "3st", steps: str = "12st") -> tuple[Trainer, Watch]:
    watch, data = Watch(), torch.utils.data.TensorDataset(torch.randn(48, 4), torch.randn(48, 1))
    config = TrainingConfig(
        max_duration=steps, log_interval=log_interval, per_device_batch_size=4, standard_callbacks=False, device="cpu"
    )
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given: Any = {"callbacks": [ThroughputCallback(), watch], "precision": Precision(), "loss": nn.MSELoss()}
    return Trainer(model, config, data, optimizer=optimizer, **given), watch


def flops(watch: Watch) -> int:
    """Of one step."""
    return round(watch.seen[-1]["speed/tflops_per_second"] * 1e12 / watch.seen[-1]["speed/steps_per_second"])


def test_what_runs_between_steps_is_not_counted() -> None:
    """2 · 4 rows · width · (4 inputs, forward and backward of the weight; 1 output, and of its input)."""
    (first, watch), (second, other) = stepped(8), stepped(512)
    for _ in zip(first.steps(), second.steps(), strict=False):
        torch.ones(64, 64) @ torch.ones(64, 64)
    assert flops(watch) == 2 * 4 * 8 * (2 * 4 + 3 * 1)
    assert flops(other) == 2 * 4 * 512 * (2 * 4 + 3 * 1)


def test_steps_may_come_from_several_threads() -> None:
    trainer, watch = stepped(8)
    steps, left = trainer.steps(), object()
    while left is not None:
        with ThreadPoolExecutor(1) as pool:
            left = pool.submit(next, steps, None).result()
    assert flops(watch) == 2 * 4 * 8 * (2 * 4 + 3 * 1)


def test_runs_that_log_every_step_are_counted() -> None:
    trainer, watch = stepped(8, log_interval="1st")
    trainer.train()
    assert flops(watch) == 2 * 4 * 8 * (2 * 4 + 3 * 1)


def test_a_skipped_step_is_not_counted() -> None:
    """The two after the first overflow."""

    class Skips(Precision):
        scales, tries = True, 0

        def scale(self, loss: torch.Tensor) -> torch.Tensor:
            return loss

        def unscale(self, optimizer: torch.optim.Optimizer) -> None:
            return None

        def step(self, optimizer: torch.optim.Optimizer) -> bool:
            self.tries += 1
            return self.tries not in (2, 3)

    (watch, data), model = (Watch(), torch.utils.data.TensorDataset(torch.randn(48, 4), torch.randn(48, 1))), nn.Linear(4, 1)
    config = TrainingConfig(
        max_duration="6st", log_interval="6st", per_device_batch_size=4, standard_callbacks=False, device="cpu"
    )
    given: Any = {"callbacks": [ThroughputCallback(), watch], "precision": Skips(), "loss": nn.MSELoss()}
    trainer = Trainer(model, config, data, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **given)
    trainer.train()
    assert trainer.ctx.skipped_steps == 2
    assert flops(watch) == 2 * (2 * 4 * 4)


def test_counting_may_be_left_out_and_ends_with_the_run() -> None:
    assert "speed/tflops_per_second" not in attend(ThroughputCallback(flops=False))[-1]
    model = Attention()
    config = TrainingConfig(max_duration="1st", per_device_batch_size=4, standard_callbacks=False, device="cpu")
    data = torch.utils.data.TensorDataset(torch.randn(8, 10, 16), torch.randn(8, 10, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Trainer(model, config, data, loss=nn.MSELoss(), optimizer=optimizer, callbacks=[ThroughputCallback()]).train()
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_a_gpu_is_asked_by_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a stand-in for NVIDIA's library; the device is the second of the machine and the first that this process sees."""
    asked: list[str] = []

    class NVMLError(Exception):
        pass

    def fails(handle: str) -> int:
        raise NVMLError("not supported")

    stand_in = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: asked.append("init"),
        nvmlDeviceGetHandleByUUID=lambda identity: asked.append(identity) or identity,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=87),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=12_500_000_000),
        nvmlDeviceGetPowerUsage=lambda handle: 310_500,
    )
    monkeypatch.setitem(sys.modules, "pynvml", stand_in)
    monkeypatch.setattr("drivetrain_throughput.machine.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 1)
    run = Run(monkeypatch, device=torch.device("cuda", 0))
    run.log()
    assert asked == ["init", "GPU-1234"]
    assert {name: run.ctx.metrics[f"gpu/{name}"] for name in ("percent", "memory_gb", "watts")} == {
        "percent": 87.0,
        "memory_gb": 12.5,
        "watts": 310.5,
    }
    assert run.callback._peak == 989.0
    monkeypatch.setattr(stand_in, "nvmlDeviceGetPowerUsage", fails)
    run.ctx.metrics = {}
    run.log()
    assert "gpu/percent" not in run.ctx.metrics


def test_the_disk_and_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Run(monkeypatch, trainer=SimpleNamespace(has_run_dir=True, run_dir=tmp_path))
    run.log()
    assert run.ctx.metrics["system/disk_free_gb"] == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, rel=0.2)
    assert 0 < run.ctx.metrics["system/memory_percent"] <= 100


class Normed(nn.Module):
    """Operations that a mode could take apart: a norm, a gated product, attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.attention, self.out = nn.RMSNorm(16), Attention(), nn.Linear(10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.attention(nn.functional.silu(self.norm(x)) * x).flatten(1))


@pytest.mark.parametrize("mode", ["ours", "rounding"])
def test_counting_changes_no_bit(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """A run that goes on counts another step than one that was not interrupted, and must end with equal bits: so nothing may be taken
    apart and put together otherwise. The control computes products another way."""
    if mode != "ours":
        monkeypatch.setattr("drivetrain_throughput.flops._counting_mode", Rounding)

    def weights(*callbacks: Callback) -> torch.Tensor:
        model = Normed()
        generator = torch.Generator().manual_seed(1)
        data = torch.utils.data.TensorDataset(torch.randn(32, 10, 16, generator=generator), torch.ones(32, 1))
        config = TrainingConfig(max_duration="8st", per_device_batch_size=4, standard_callbacks=False, device="cpu")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Trainer(model, config, data, loss=nn.MSELoss(), optimizer=optimizer, callbacks=callbacks, precision=Precision()).train()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    equal = torch.equal(weights(ThroughputCallback()), weights())
    assert equal if mode == "ours" else not equal


class Rounding(TorchDispatchMode):
    """Products in fp64: other last bits."""

    flops = 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket is torch.ops.aten.mm:
            return func(*(arg.double() for arg in args)).float()
        return func(*args, **(kwargs or {}))
