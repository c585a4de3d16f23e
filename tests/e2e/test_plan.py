"""`drivetrain plan` with the strategies, modes and optimizers that are distributions of their own."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve

from drivetrain import Trainer, TrainingConfig, load_training_config
from drivetrain_cli import main
from drivetrain_plan import DeviceProfile, load_profile, plan, sweep
from drivetrain_plan.curve import curve
from drivetrain_plan.roofline import step_time
from drivetrain_plan.scaling import Family, Size
from drivetrain_plan.simulate import simulate

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "docs/examples/quickstart.toml"
SMALL = [
    "model={use='gpt',layers=2,width=32,heads=2,context=32}",
    f"data={{use='text',path='{Path(json.__file__).parent}',pattern='*.py',context=32,max_bytes=20000}}",
]


def quickstart(*overrides: str) -> TrainingConfig:
    return load_training_config(QUICKSTART, overrides=[*SMALL, *overrides])


def script(name: str) -> Any:
    """A benchmark script, which a person runs for the tables of docs/plan.md."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tests/benchmarks/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its components look their types up there
    spec.loader.exec_module(module)
    return module


memory, published, scale, step_times = map(script, ("plan_memory", "plan_published", "plan_scale", "plan_time"))


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


class TestFlops:
    def test_those_of_the_model_are_those_of_the_papers_formula(self) -> None:
        """6 N + 12 L d T, N without the embedding, which multiplies nothing (arXiv:2204.02311, appendix B)."""
        layers, width, context = 3, 96, 64
        model = {"use": "gpt", "layers": layers, "width": width, "heads": 4, "context": context}
        config = quickstart("precision=fp32", "data.context=64")
        config.model = model
        found = plan(config, 1, "h100")
        numbers = found.simulation.parameters - 256 * width - (2 * layers + 1) * width  # nor do the norms
        assert found.model_flops_per_token == 6 * numbers + 12 * layers * width * context
        # flash attention computes its scores once more in backward: 2 L d T
        assert found.flops_per_token == 6 * numbers + 14 * layers * width * context


class TestSizes:
    """What is fitted from two sizes against simulations of the true ones."""

    @pytest.mark.parametrize(
        ("strategy", "ranks", "shards", "samples", "accumulation"),
        [
            ("none", 1, 1, 1, 1),
            ("none", 1, 1, 64, 1),
            ("none", 1, 1, 16, 3),
            ("ddp", 4, 1, 16, 1),
            ("ddp", 2, 1, 8, 3),
            ("fsdp", 8, 8, 64, 1),
            ("fsdp", 32, 32, 4, 4),
            pytest.param({"use": "fsdp", "shards": 4}, 8, 4, 16, 1, id="hsdp"),
        ],
    )
    def test_memory_within_five_percent(
        self, strategy: Any, ranks: int, shards: int, samples: int, accumulation: int, families: Any
    ) -> None:
        config = sized(strategy, samples, accumulation)
        real = simulate(config, ranks)
        family = families["none" if strategy in ("none", "ddp") else "fsdp"]
        size = Size(ranks, shards, samples, accumulation)
        assert family.peak(size) == pytest.approx(real.peak, rel=0.05)
        # a step this small is as long as its launches: those that add up microbatches and that fill ddp's buckets are left out
        device = load_profile("h100")
        assert family.time(size, device).total.likely == pytest.approx(step_time(real, device).total.likely, rel=0.12)


def sized(strategy: Any, samples: int, accumulation: int = 1) -> TrainingConfig:
    config = quickstart("precision=bf16", f"per_device_batch_size={samples}", f"gradient_accumulation_steps={accumulation}")
    config.distributed = strategy
    return config


@pytest.fixture(scope="module")
def families() -> dict[str, Family]:
    made = {name: [simulate(sized(name, n), ranks) for n in (2, 4)] for name, ranks in (("none", 1), ("fsdp", 2))}
    return {name: Family(*pair) for name, pair in made.items()}


def device_of(gigabytes: float) -> DeviceProfile:
    return evolve(load_profile("h100"), name=f"{gigabytes:g} GB", memory=gigabytes * 1e9, reserved=0.0)


class TestSweep:
    @pytest.mark.slow
    @pytest.mark.parametrize("gigabytes", [0.25, 24, 80, 141])
    def test_the_quickstart_on_devices_small_and_large(self, gigabytes: float) -> None:
        device = device_of(gigabytes)
        found = sweep(load_training_config(QUICKSTART, overrides=["global_batch_size=64"]), device)
        for candidate in found.frontier.values():
            assert plan(candidate.plan.config, candidate.ranks, device).fits
        assert plan(found.chosen(), found.frontier["cheapest"].ranks, device).fits
        assert len(str(found).splitlines()) < 40 and "why the cheapest" in str(found)

    @pytest.mark.slow
    @pytest.mark.parametrize("gigabytes", [24, 80, 141])
    def test_a_model_of_eight_billion_parameters(self, gigabytes: float) -> None:
        config = scale.configuration(scale.LLAMA_8B)
        config.global_batch_size = 64
        device = device_of(gigabytes)
        found = sweep(config, device)
        assert plan(found.chosen(), found.frontier["cheapest"].ranks, device).fits
        assert found.frontier["fewest devices"].ranks > 1, "16 bytes for each parameter do not fit one"
        assert all(c.plan.fits for c in found.frontier.values())

    @pytest.mark.slow
    def test_tensor_parallelism_is_tried_where_a_divided_model_is_best(self) -> None:
        config = quickstart("global_batch_size=8", "precision=bf16")
        held = plan(quickstart("precision=bf16"), 1, "h100").simulation.peak
        found = sweep(config, device_of(0.5 * held / 1e9), ranks=4)
        assert any("tensor parallel 2" in c.named() for c in found.tried)
        assert not any("tensor parallel 2" in note for note in found.notes)


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
        head = target.read_text(encoding="utf-8")
        assert "# origin plan: per_device_batch_size = 8" in head and "# why the cheapest" in head

    def test_curve_as_a_page(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        target = tmp_path / "curve.html"
        assert main(["plan", str(QUICKSTART), *SMALL, "--curve", str(target), "--device", "h100", "--json"]) == 0
        assert target.read_text(encoding="utf-8").count("<svg") == 3
        said = json.loads(capsys.readouterr().out)
        assert len(said["points"]) == 13 and said["unit"] == "tokens"

    def test_curve_as_a_picture(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        target = tmp_path / "curve.png"
        assert main(["plan", str(QUICKSTART), *SMALL, "distributed=fsdp", "--curve", str(target), "--device", "h100"]) == 0
        width, height = struct.unpack(">II", target.read_bytes()[16:24])
        assert target.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and width > 2 * height > 600

    def test_curve_keeps_to_the_groups_of_the_configuration(self) -> None:
        config = quickstart("precision=bf16")
        config.distributed = {"use": "fsdp", "shards": 4, "tensor_parallel": {"size": 2}}
        found = curve(config, "h100")
        assert [point.ranks for point in found.points][:2] == [8, 16]
        assert len({point.memory for point in found.points}) == 1, "four shards however many ranks"
        assert found.strategy == "hsdp, shards 4, tensor parallel 2"

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--price", "-5"], "--price"),
            (["--ranks", "0"], "--ranks"),
            (["--write", "x.toml"], "goes with --sweep"),
            (["--curve", "x.html", "--ranks", "8"], "--ranks"),
            (["--curve", "x.html", "--price", "2"], "--price"),
            (["--curve", "x.html", "--sweep"], "--sweep"),
            (["--curve", "x.bmp"], ".png"),
        ],
    )
    def test_what_would_be_ignored_is_refused(self, options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", str(QUICKSTART), *SMALL, *options]) == 2
        assert said in capsys.readouterr().err

    def test_an_unknown_device(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", str(QUICKSTART), "--device", "h1000"]) == 2
        assert "h100" in capsys.readouterr().err


class TestTruth:
    """Estimates against what real runs take; the scripts print the same as tables."""

    def compare(self, estimate: dict[str, int], truth: dict[str, int]) -> None:
        for kind, limit in memory.LIMITS.items():
            assert estimate[kind] == pytest.approx(truth[kind], rel=limit), kind

    def test_memory_of_one_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(memory.MODEL, "layers", 2)
        monkeypatch.setitem(memory.MODEL, "width", 64)
        estimate, truth = memory.planned("one process"), memory.measured_here("one process")
        self.compare(estimate, truth)
        with pytest.raises(AssertionError):
            self.compare(memory.planned("activation checkpointing"), truth)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", memory.CONFIGURATIONS)
    def test_memory(self, name: str) -> None:
        self.compare(memory.planned(name), memory.measured(name))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True}, {"gradient_accumulation_steps": 2}])
    def test_memory_of_a_gpu(self, changes: dict[str, Any]) -> None:
        """The peak against `torch.cuda.max_memory_allocated`, within 10 %."""
        config = load_training_config(QUICKSTART, overrides=["precision=bf16", "distributed=none", "per_device_batch_size=16"])
        config.model = {"use": "gpt", "layers": 8, "width": 768, "heads": 12, "context": 512}
        config.data = {"use": "text", "context": 512, "max_bytes": 400_000, "held_out": 0}
        config.standard_callbacks, config.callbacks, config.eval_interval = False, [], None
        for key, value in changes.items():
            setattr(config, key, value)
        estimate = plan(config, 1, "h100").simulation.peak
        config.device, config.resume = "cuda", "never"
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for step in Trainer(args=config).steps():
            if step.number == 3:
                break
        assert estimate == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.10)

    def test_published_throughput_of_a_small_model(self) -> None:
        worst, _, best = published.rates("GPT-2 124M, 8 × A100, llm.c")
        assert worst <= 218_000 <= best

    @pytest.mark.slow
    @pytest.mark.parametrize("name", published.CASES)
    def test_published_throughput(self, name: str) -> None:
        worst, likely, best = published.rates(name)
        assert worst <= published.CASES[name][5] <= best and worst < likely < best

    @pytest.mark.slow
    @pytest.mark.parametrize(("name", "ranks"), [("8B", 8), ("70B", 1024)])
    def test_large_models_take_little(self, name: str, ranks: int) -> None:
        """Seconds of the processor: those on the wall depend on what else the machine does."""
        took = scale.planned(name, ranks)
        assert took["cpu"] < scale.SECONDS and took["memory"] < scale.MEMORY
        assert took["parameters"] == {"8B": 8_030_261_248, "70B": 70_553_706_496}[name]  # as Meta counts them

    @pytest.mark.slow
    def test_the_time_of_a_step_on_this_cpu(self) -> None:
        """Up to three times: what else the machine does in one of them is no fault of the plan's."""
        for _ in range(3):
            off = [estimate / truth - 1 for estimate, truth in step_times.compared(2).values()]
            if all(abs(x) <= step_times.LIMIT for x in off):
                return
        pytest.fail(f"off by {off}")
