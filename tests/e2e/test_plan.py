"""`drivetrain plan` with the strategies, modes and optimizers that are distributions of their own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from drivetrain import TrainingConfig, load_training_config
from drivetrain_cli import main
from drivetrain_plan import plan

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "docs/examples/quickstart.toml"
SMALL = ["model={use='gpt',layers=2,width=32,heads=2,context=32}", "data={use='text',context=32,max_bytes=20000}"]


def quickstart(*overrides: str) -> TrainingConfig:
    return load_training_config(QUICKSTART, overrides=[*SMALL, *overrides])


@pytest.fixture
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("plan_memory", ROOT / "tests/benchmarks/plan_memory.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestStrategies:
    def test_fsdp_divides_what_it_should_and_gathers_in_sixteen_bits(self) -> None:
        alone = plan(quickstart("distributed=none", "precision=bf16"), 1, "h100").simulation
        shared = plan(quickstart("distributed=fsdp", "precision=bf16"), 4, "h100").simulation
        for kind in ("parameters", "gradients"):
            assert shared.largest[kind] * 4 == alone.largest[kind]
        gathered = sum(c.size * n for c, n in shared.collectives.items() if c.name == "all-gather" and c.phase == "forward 0")
        blocks = sum(p for p in (2 * (32 * 96 + 32 * 32 + 32 * 192 + 96 * 32 + 2 * 32),))
        around = alone.parameters - blocks
        assert gathered == 2 * blocks + 4 * around

    def test_ddp_reduces_every_gradient_once_a_step(self) -> None:
        found = plan(quickstart("distributed=ddp", "gradient_accumulation_steps=3"), 8, "h100").simulation
        reduced = [(c.size, n) for c, n in found.collectives.items() if c.phase == "backward 1"]
        assert sum(size * n for size, n in reduced) == 4 * found.parameters
        assert not any(c.phase == "backward 0" for c in found.collectives)

    def test_auto_takes_what_fits(self) -> None:
        assert plan(quickstart(), 2, "h100").simulation.strategy == "ddp"

    def test_a_strategy_that_the_optimizer_cannot_work_with(self) -> None:
        found = plan(quickstart("distributed=fsdp", "optimizer=adamw_8bit"), 2, "h100")
        assert "sharded" in found.simulation.problems[0] and found.ranks == 1


class TestCommand:
    def test_as_data(self, capsys: pytest.CaptureFixture[str]) -> None:
        code = main(["plan", str(QUICKSTART), *SMALL, "--device", "h100", "--price", "2", "--json"])
        said = json.loads(capsys.readouterr().out)
        assert code == 0 and said["memory"]["fits"] and said["cost"] == pytest.approx(2 * said["gpu_hours"])

    def test_sweep_picks_what_fits_and_writes_it(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        target = tmp_path / "chosen.toml"
        code = main(["plan", str(QUICKSTART), *SMALL, "--sweep", "--device", "h100", "--write", str(target)])
        assert code == 0 and "cheapest" in capsys.readouterr().out
        found = plan(load_training_config(target), 1, "h100")
        assert found.fits and found.course.samples == 8

    def test_curve_as_a_page(self, tmp_path: Path) -> None:
        target = tmp_path / "curve.html"
        assert main(["plan", str(QUICKSTART), *SMALL, "--curve", str(target), "--device", "h100"]) == 0
        assert target.read_text(encoding="utf-8").count("<svg") == 3

    def test_an_unknown_device(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", str(QUICKSTART), "--device", "h1000"]) == 2
        assert "h100" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one process", "adamw_8bit", "LoRA", "ddp, 2 ranks", "fsdp, 4 ranks, bf16"])
def test_estimates_are_what_real_processes_take(name: str, benchmark: Any) -> None:
    estimate, truth = benchmark.planned(name), benchmark.measured(name)
    for kind in ("parameters", "gradients", "optimizer state"):
        assert estimate[kind] == pytest.approx(truth[kind], rel=0.01)
    for kind in ("held for backward", "peak"):
        assert estimate[kind] == pytest.approx(truth[kind], rel=0.05)
