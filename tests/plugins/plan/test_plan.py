"""Planning runs of small models: memory against counting by hand and against real runs, times by formula, and what cannot be simulated."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from attrs import evolve
from torch import Tensor, nn

from drivetrain import (
    Component,
    ConfigError,
    DrivetrainError,
    OptimizerComponent,
    Precision,
    Strategy,
    Trainer,
    TrainingConfig,
    component,
)
from drivetrain_plan import DeviceProfile, load_profile, plan, sweep
from drivetrain_plan import calibrate as calibration
from drivetrain_plan.calibrate import _added, _Bench, calibrate, save
from drivetrain_plan.profiles import names, parse, seconds_on
from drivetrain_plan.recorder import Collective, Recorder
from drivetrain_plan.roofline import collective_time, phase_seconds, step_time
from drivetrain_plan.scaling import Family, Size
from drivetrain_plan.simulate import Simulation, simulate

WIDTH, BATCH = 64, 16


@component
class Adam(OptimizerComponent):
    """torch's, so that these tests need no plugin beside the one they test."""

    kind: ClassVar[str] = "optimizer"

    def make_optimizer(self, ctx: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(ctx.model.parameters(), lr=1e-3, foreach=False)


@component
class Shape(Component):
    """A schedule that is a function."""

    kind: ClassVar[str] = "scheduler"
    function: Any = None

    def make_schedule(self, ctx: Any) -> Any:
        return self.function


def net(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *between, nn.Linear(WIDTH, WIDTH))


def data(samples: int = 200) -> list[tuple[Tensor, Tensor]]:
    return [(torch.ones(WIDTH), torch.ones(WIDTH)) for _ in range(samples)]


def config(**changes: Any) -> TrainingConfig:
    given: dict[str, Any] = {"optimizer": Adam(), "scheduler": None, "per_device_batch_size": BATCH, "distributed": "none"}
    given |= {"device": "cpu", "max_duration": "2ep", "max_grad_norm": None, "precision": None}
    return TrainingConfig(**given | changes)


def planned(model: nn.Module | None = None, **changes: Any) -> Any:
    ranks = changes.pop("ranks", 1)
    given = {"model": net(nn.ReLU()) if model is None else model, "train_dataset": data(), "loss": nn.MSELoss()}
    return plan(config(**changes), ranks, "cpu", precision=Precision(), **given)


class TestMemory:
    def test_parameters_gradients_and_state_are_counted_to_the_byte(self) -> None:
        found, numbers = planned().simulation, 2 * (WIDTH * WIDTH + WIDTH)
        assert found.parameters == found.trainable == numbers
        assert found.largest["parameters"] == found.largest["gradients"] == 4 * numbers
        assert found.largest["optimizer state"] == 8 * numbers + 4 * 4  # two moments, and a step count for each of four tensors

    def test_frozen_parameters_have_neither(self) -> None:
        model = net(nn.ReLU())
        model[0].requires_grad_(False)
        found = planned(model).simulation
        assert found.largest["gradients"] * 2 == found.largest["parameters"]
        assert found.trainable * 2 == found.parameters

    def test_activations_are_what_autograd_keeps_in_a_real_run(self) -> None:
        model, kept = net(nn.GELU(), nn.LayerNorm(WIDTH), nn.Tanh()), {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        own = [p.untyped_storage().data_ptr() for p in model.parameters()]
        batch, targets = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            nn.MSELoss()(model(batch), targets)
        given = {batch.untyped_storage().data_ptr(), targets.untyped_storage().data_ptr(), *own}
        truth = sum(size for place, size in kept.items() if place not in given)
        estimate = planned(model).simulation.largest["activations"]
        assert estimate == pytest.approx(truth, rel=0.02), "beside them only the loss itself"

    def test_two_microbatches_keep_gradients_through_the_second_forward(self) -> None:
        one, two = planned().simulation, planned(gradient_accumulation_steps=4).simulation
        assert one.accumulation == 1 and (two.accumulation, two.microbatches) == (4, 2)
        assert two.peak > one.peak
        assert two.at_peak["gradients"] == one.largest["gradients"]

    def test_a_trainer_is_planned_as_its_configuration_is_and_trains_afterwards(self) -> None:
        model = net(nn.ReLU())
        before = [p.detach().clone() for p in model.parameters()]
        trainer = Trainer(model, config(standard_callbacks=False), data(), loss=nn.MSELoss(), precision=Precision())
        environment = dict(os.environ)
        assert plan(trainer, device="cpu").simulation.at_peak == planned().simulation.at_peak
        assert dict(os.environ) == environment and not dist.is_initialized()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert trainer.train().completed
        assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))

    def test_a_trainer_plans_itself(self) -> None:
        trainer = Trainer(net(nn.ReLU()), config(standard_callbacks=False), data(), loss=nn.MSELoss(), precision=Precision())
        assert trainer.plan(device="cpu").simulation.peak == planned().simulation.peak
        assert trainer.plan(1, "h100", price=2.0).cost > 0
        assert trainer.plan(device="h100", sweep=True).frontier["fewest devices"].ranks == 1

    def test_a_trainer_without_the_plugin_says_how_to_get_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DRIVETRAIN_PLUGINS", "off")
        trainer = Trainer(net(), config(standard_callbacks=False), data(), loss=nn.MSELoss())
        with pytest.raises(DrivetrainError, match="pip install drivetrain-plan"):
            trainer.plan()

    def test_a_trainer_in_the_middle_of_a_run_is_refused(self) -> None:
        trainer = Trainer(net(), config(standard_callbacks=False), data(), loss=nn.MSELoss())
        next(iter(trainer.steps()))
        with pytest.raises(DrivetrainError, match="has not trained yet"):
            plan(trainer)


class TestCourse:
    def test_steps_tokens_and_flops(self) -> None:
        found = planned(gradient_accumulation_steps=2)
        assert found.course.steps == 2 * math.ceil(200 / (2 * BATCH))
        assert found.tokens_per_step == 2 * BATCH and found.unit == "samples"
        # forward of both layers, weights' gradients of both, the input's of the second
        assert found.flops_per_token == 2 * 5 * WIDTH * WIDTH

    def test_cost_follows_from_time_and_price(self) -> None:
        found = plan(config(), 1, "h100", 3.0, model=net(), train_dataset=data(), loss=nn.MSELoss())
        assert found.cost == pytest.approx(found.hours[1] * 3.0)
        low, likely, high = found.step.total
        assert 0 < low <= likely <= high

    def test_a_negative_price_is_refused(self) -> None:
        for price in (-5.0, math.inf, math.nan):
            with pytest.raises(ConfigError, match="--price: must be at least 0"):
                plan(config(), 1, "h100", price, model=net(), train_dataset=data(), loss=nn.MSELoss())

    def test_model_flops_leave_recomputation_out(self) -> None:
        blocks = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)))
        plain = planned(net(copy.deepcopy(blocks)))
        again = planned(net(copy.deepcopy(blocks)), activation_checkpointing=True)
        assert again.model_flops_per_token == plain.model_flops_per_token == 3 * 5 * 2 * WIDTH * WIDTH
        assert again.flops_per_token > plain.flops_per_token

    def test_the_share_of_the_peak_follows_from_rate_and_flops(self) -> None:
        found = plan(config(), 1, "h100", model=net(), train_dataset=data(), loss=nn.MSELoss(), precision=Precision())
        assert found.mfu == pytest.approx(found.model_flops_per_token * found.rate(found.step.total.likely) / 66.9e12)

    def test_a_cosine_has_no_plateau_and_a_trapezoid_has_one(self) -> None:
        def turns(schedule: Any) -> list[tuple[float, str]]:
            return planned(scheduler=Shape(function=schedule)).course.milestones[:-1]

        steps = planned().course.steps
        assert turns(lambda at: 0.5 * (1 + math.cos(math.pi * at / steps))) == []
        warm = turns(lambda at: min(at / 4, 0.5 * (1 + math.cos(math.pi * max(0.0, at - 4) / (steps - 4)))))
        assert warm == [(4.0, "warm-up ends")]
        assert turns(lambda at: min(1.0, at / 4, (steps - at) / 6)) == [(4.0, "warm-up ends"), (steps - 6.0, "decay begins")]

    def test_evaluations_and_checkpoints_take_their_time(self) -> None:
        def hours(**changes: Any) -> Any:
            given = {"model": net(), "train_dataset": data(), "eval_dataset": data(50), "loss": nn.MSELoss()}
            return plan(config(**changes), 1, "h100", **given)

        without, found = hours(eval_interval=None), hours(eval_interval="1ep")
        assert (found.course.evaluations, found.course.eval_batches) == (2, math.ceil(50 / BATCH))
        assert without.course.evaluations == 0
        extra = [phase_seconds(found.simulation, found.device)["forward 0"][at] * 2 * 4 for at in (2, 1, 0)]
        assert [found.hours[i] - without.hours[i] for i in range(3)] == pytest.approx([x / 3600 for x in extra])

    def test_the_text_fits_a_terminal_and_the_data_is_plain(self) -> None:
        found = planned()
        assert max(map(len, str(found).splitlines())) <= 80
        assert "estimated" in str(found) and "fits" in str(found)
        assert json.loads(json.dumps(found.to_dict()))["memory"]["peak"] == found.simulation.peak


def simulated(samples: int, accumulation: int = 1, model: nn.Module | None = None) -> Simulation:
    changes = {"per_device_batch_size": samples, "gradient_accumulation_steps": accumulation}
    return simulate(
        config(**changes),
        model=net(nn.ReLU()) if model is None else model,
        train_dataset=data(),
        loss=nn.MSELoss(),
        precision=Precision(),
    )


class TestScaling:
    def test_the_peak_is_found_wherever_it_moves_to(self) -> None:
        """Of few samples the update takes most, of many the backward."""
        wide = [nn.Linear(WIDTH, 8 * WIDTH), *(nn.GELU() for _ in range(8)), nn.Linear(8 * WIDTH, WIDTH)]
        family = Family(simulated(2, model=net(*wide)), simulated(4, model=net(*wide)))
        mostly = set()
        for samples in (1, 4, 16, 64):
            for accumulation in (1, 3):
                real = simulated(samples, accumulation, net(*wide))
                assert family.peak(Size(1, 1, samples, accumulation)) == pytest.approx(real.peak, rel=0.05)
                mostly.add(max(real.at_peak, key=lambda kind: real.at_peak[kind]))
        assert len(mostly) > 1, "else this test could not fail"

    def test_scaling_one_peak_would_be_wrong(self) -> None:
        """The negative control: what was done before, every kind of the peak times the samples."""
        small, large = simulated(1), simulated(64)
        grown = sum(size * (64 if kind in ("activations", "temporary", "batch") else 1) for kind, size in small.at_peak.items())
        assert abs(grown / large.peak - 1) > 0.05

    def test_a_step_that_takes_another_course_is_not_taken_for_a_line(self) -> None:
        small, large = simulated(2), simulated(4)
        family = Family(evolve(small, trace=small.trace[:-3]), large)
        assert family.peak(Size(1, 1, 4, 1)) == large.peak
        assert family.peak(Size(1, 1, 16, 1)) > 0.99 * simulated(16).peak

    def test_the_time_is_on_the_line_too(self) -> None:
        family, device = Family(simulated(2), simulated(4)), load_profile("h100")
        assert family.time(Size(1, 1, 16, 1), device).total.likely == pytest.approx(
            step_time(simulated(16), device).total.likely, rel=0.05
        )

    def test_ddp_reduces_all_gradients_among_all(self) -> None:
        base = planned().simulation
        (collective,) = Family(base, base).collectives(Size(4, 1, BATCH, 1))
        assert (collective.name, collective.size, collective.ranks) == ("all-reduce", base.largest["gradients"], (0, 1, 2, 3))


class TestTimes:
    def test_a_ring_on_one_machine_and_among_several(self) -> None:
        device = DeviceProfile(
            name="x", rates={"fp32": 1.0}, memory=1, bandwidth=1, per_node=8, node_bandwidth=400.0, network_bandwidth=50.0,
            latency=0.0, links=(1, 1, 1),
        )  # fmt: skip
        here = Collective("backward 0", "all-reduce", 800, tuple(range(4)))
        assert collective_time(here, device) == pytest.approx(2 * 800 * 3 / 4 / 400)
        # one of each machine: alone on its network link; all of both machines: eight links at once
        assert collective_time(here._replace(name="all-gather", ranks=(0, 8)), device) == pytest.approx(800 / 2 / 50)
        assert collective_time(here._replace(name="all-gather", ranks=tuple(range(16))), device) == pytest.approx(
            800 * 15 / 16 / 400
        )
        assert collective_time(here._replace(ranks=(0,)), device) == 0

    def test_hops_around_a_ring_and_along_a_tree(self) -> None:
        device = DeviceProfile(name="x", rates={"fp32": 1.0}, memory=1, bandwidth=1, latency=1.0)
        among = Collective("backward 0", "all-gather", 0, tuple(range(64)))
        assert [collective_time(among, device, share) for share in range(3)] == [63, 63, 6]
        assert collective_time(among._replace(name="all-reduce"), device) == 6

    def test_between_measured_points(self) -> None:
        curve = [(10.0, 1.0), (1000.0, 10.0)]
        assert seconds_on(curve, 100) == pytest.approx(math.sqrt(10))
        assert (seconds_on(curve, 5), seconds_on(curve, 2000), seconds_on(curve, 0)) == (0.5, 20.0, 0.0)

    def test_the_best_case_has_to_launch_its_operations_too(self) -> None:
        slow = evolve(load_profile("h100"), launch=1.0)
        found = planned().simulation
        assert step_time(found, slow).total.low >= 0.5 * sum(found.operations.values())


class TestProfiles:
    @pytest.mark.parametrize("name", names())
    def test_each_says_where_its_numbers_are_from(self, name: str) -> None:
        profile = load_profile(name)
        assert profile.sources and profile.rates["fp32"] > 1e9 and profile.memory > 1e9
        assert name == "cpu" or any("https://" in source for source in profile.sources)

    def test_memory_is_what_torch_sees(self) -> None:
        """Bytes by torch's own messages on these cards, and what a run can have of them."""
        assert load_profile("h100").memory == pytest.approx(79.11 * 2**30)
        assert load_profile("h200").memory == pytest.approx(139.8 * 2**30)
        assert 0.93 < load_profile("h200").usable / load_profile("h200").memory < 0.97

    def test_those_that_were_asked_for_are_there(self) -> None:
        assert {"h100", "h200", "a100", "l40s", "4090", "mi300x", "cpu"} <= set(names())

    def test_an_unknown_one(self) -> None:
        with pytest.raises(ConfigError, match=r"no profile is called 'h1000'.*h100.*file\.toml"):
            load_profile("h1000")

    def test_a_file_with_mistakes_names_all_of_them(self) -> None:
        text = 'name = "x"\nbandwidth = -1\nproducts = [1, 0.5, 2]\ncolour = 3\n[rates]\nbf16 = 1\n'
        with pytest.raises(ConfigError) as caught:
            parse(text, "x.toml")
        for expected in ("memory", "bandwidth", "products", "colour", "fp32", "x.toml"):
            assert expected in str(caught.value)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(DrivetrainError, match="cannot be read"):
            load_profile(str(tmp_path / "none.toml"))

    def test_a_measured_one_survives_writing(self, tmp_path: Path) -> None:
        curves = {"products_fp32": [(1.0, 2.0), (4.0, 8.0)], "traffic": [(1.0, 1.0)], "heavy": [(1.0, 1.0)]}
        made = DeviceProfile(name="m", rates={"fp32": 2.5}, memory=7, bandwidth=3, waits=True, measured=curves, sources=["s"])
        read = load_profile(str(save(made, tmp_path / "deep" / "m.toml")))
        assert read.waits and read.product(2.0, "fp32", 1) == made.product(2.0, "fp32", 1)


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else x


class Selects(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x.sum(1) > 0]


@torch.library.custom_op("drivetrain_plan_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return twice(x)


@component
class Helpless(Component):
    """A strategy that cannot hold the model."""

    kind: ClassVar[str] = "strategy"

    def make_strategy(self, ctx: Any) -> Strategy:
        class Alone(Strategy):
            def wrap(self, model: nn.Module) -> nn.Module:
                raise DrivetrainError("the model has no blocks to divide")

        return Alone()


class TestAuto:
    """What the engine would choose on such devices is asked of the engine."""

    @pytest.mark.parametrize(
        ("times", "wanted"), [(1.3, "fsdp"), (1.5, "ddp")]
    )  # 0.7 of a device is for weights, gradients, state
    def test_the_engines_rule_decides(self, times: float, wanted: str) -> None:
        pytest.importorskip("drivetrain_ddp")
        pytest.importorskip("drivetrain_fsdp")
        model = net(nn.ReLU())
        held = 16 * sum(p.numel() for p in model.parameters())
        device = evolve(load_profile("h100"), memory=held * times, reserved=0.0)
        given = {"model": model, "train_dataset": data(), "loss": nn.MSELoss(), "precision": Precision()}
        found = plan(config(distributed="auto"), 2, device, **given)
        assert found.simulation.strategy == wanted
        assert any(text.startswith(f"distributed: auto is {wanted}, the model") for text in found.assumptions)

    def test_errors_afterwards_do_not_name_ranks_that_were_not_there(self) -> None:
        pytest.importorskip("drivetrain_ddp")
        hook = sys.excepthook
        planned(ranks=2, distributed="ddp")
        assert sys.excepthook is hook


class TestSweep:
    def given(self) -> dict[str, Any]:
        return {"model": net(nn.ReLU()), "train_dataset": data(), "loss": nn.MSELoss(), "precision": Precision()}

    def test_a_model_without_blocks_is_noted_and_the_rest_goes_on(self) -> None:
        found = sweep(config(), "h100", **self.given())
        assert any("no repeated blocks" in note for note in found.notes)
        assert found.frontier and found.frontier["cheapest"].plan.fits

    def test_a_plugin_that_breaks_is_noted(self) -> None:
        pytest.importorskip("drivetrain_fsdp")
        found = sweep(config(), "h100", **self.given() | {"model": net(Awkward())})
        assert any("RuntimeError: not among others" in note for note in found.notes)
        assert {c.strategy for c in found.tried} == {"single", "ddp"}

    def test_what_cannot_be_shared(self) -> None:
        with pytest.raises(ConfigError, match="--ranks"):
            sweep(config(global_batch_size=3), "h100", ranks=64, **self.given())

    def test_samples_that_ranks_do_not_divide_may_be_some_less(self) -> None:
        found = sweep(config(global_batch_size=100, per_device_batch_size=1), "h100", ranks=3, **self.given())
        assert {c.samples for c in found.tried} == {99}

    def test_it_says_what_it_decided(self) -> None:
        chosen = sweep(config(), "h100", **self.given()).chosen()
        assert chosen.origin("per_device_batch_size") == chosen.origin("distributed") == "plan"
        assert chosen.origin("seed") != "plan"

    def test_what_is_chosen_fits_when_it_is_planned_by_itself(self) -> None:
        """On a device where the microbatch has to be smaller than the step, which is where a peak that is scaled goes wrong."""
        wide = [nn.Linear(WIDTH, 8 * WIDTH), *(nn.GELU() for _ in range(8)), nn.Linear(8 * WIDTH, WIDTH)]
        given = {**self.given(), "model": net(*wide)}
        whole = plan(config(per_device_batch_size=64), 1, "h100", **given)
        device = evolve(load_profile("h100"), memory=0.75 * whole.simulation.peak, reserved=0.0)
        found = sweep(config(global_batch_size=64, per_device_batch_size=1), device, ranks=1, **given)
        chosen = plan(found.chosen(), 1, device, **given)
        assert chosen.fits and chosen.simulation.peak == found.frontier["cheapest"].peak
        assert any(c.peak > device.usable for c in found.tried), "else this test could not fail"
        assert plan(config(per_device_batch_size=64), 1, device, **given).fits is False

    def test_a_candidate_that_turns_out_too_large_is_dropped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The fit says that everything takes next to nothing; only what has been simulated whole is shown."""
        whole = planned(per_device_batch_size=64).simulation.peak
        device = evolve(load_profile("h100"), memory=1.05 * planned(per_device_batch_size=8).simulation.peak, reserved=0.0)
        monkeypatch.setattr(Family, "peak", lambda self, size: 1)
        found = sweep(config(global_batch_size=64, per_device_batch_size=1), device, ranks=1, **self.given())
        assert whole > device.usable
        assert all(c.plan.fits and c.peak == c.plan.simulation.peak for c in found.frontier.values())
        assert any(c.peak > device.usable for c in found.tried)

    def test_the_users_own_options_of_a_strategy_are_kept(self) -> None:
        pytest.importorskip("drivetrain_fsdp")
        own = config(global_batch_size=8, distributed={"use": "fsdp", "reshard_after_forward": False})
        divided = [c for c in sweep(own, "h100", ranks=2, **self.given()).tried if c.strategy == "fsdp"]
        assert divided and all(c.changes["distributed"]["reshard_after_forward"] is False for c in divided)

    def test_nothing_fits(self) -> None:
        found = sweep(config(), evolve(load_profile("h100"), memory=1000.0, reserved=0.0), **self.given())
        assert not found.frontier and "nothing fits" in str(found)
        with pytest.raises(DrivetrainError, match="nothing that was tried fits"):
            found.chosen()


class Awkward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if dist.is_initialized():
            raise RuntimeError("not among others")
        return x


class TestCalibration:
    def test_a_device_is_measured_by_its_own_clock(self) -> None:
        """The path of an accelerator, with the CPU in its place."""
        bench = _Bench(torch.device("cpu"))
        bench.sizes, bench.elements = (16, 32), (2**10, 2**12)
        (small, fast), (large, slow) = bench.products(torch.float32)
        assert (small, large) == (8.0 * 16**3, 8.0 * 32**3) and 0 < fast <= slow
        assert all(seconds > 0 for _, seconds in bench.curve(_added)) and bench.launch() > 0

    def test_a_device_that_is_not_there(self) -> None:
        with pytest.raises(ConfigError, match="no device is called 'tpu9'"):
            calibrate("tpu9")

    def test_operations_take_as_long_as_in_whole_steps_of_a_narrow_and_a_wide_model(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Three times as long in the narrow model, as long in the wide one: by size, twice as long half way between."""
        steps = {48: calibration._Step(3.0, 1e4, 1e2), 192: calibration._Step(1.0, 1e6, 1e4)}
        monkeypatch.setattr(calibration, "_step", lambda profile, bench, width: steps[width])
        curve = [(1e1, 1.0), (1e3, 1.0), (1e5, 1.0), (1e7, 1.0)]
        profile = DeviceProfile(
            name="mine",
            rates={"fp32": 1.0},
            memory=1,
            bandwidth=1,
            launch=2.0,
            measured={"products_fp32": curve, "traffic": curve},
        )
        found = calibration._as_in_a_step(profile, _Bench(torch.device("cpu")))
        factors = {name: [seconds for _, seconds in curve] for name, curve in found.measured.items()}
        assert factors["products_fp32"] == pytest.approx([3.0, 3.0, 2.0, 1.0])
        assert factors["traffic"] == pytest.approx([3.0, 2.0, 1.0, 1.0])
        assert found.launch == 6.0


class TestWhatCannotBeSimulated:
    def test_a_value_that_decides_is_named_with_its_line(self) -> None:
        found = planned(net(Reads()))
        (problem,) = found.simulation.problems
        assert f"{Path(__file__).name}:" in problem and "values are read" in problem
        assert found.simulation.complete and found.step.total.likely > 0

    @pytest.mark.parametrize(("part", "said"), [(Selects(), "depends on values"), (Custom(), "no fake implementation")])
    def test_the_rest_of_the_answer_is_given(self, part: nn.Module, said: str) -> None:
        found = planned(net(part))
        (problem,) = found.simulation.problems
        assert "the forward could not be simulated" in problem and said in problem and Path(__file__).name in problem
        whole = planned().simulation
        for kind in ("parameters", "gradients", "optimizer state"):
            assert found.simulation.largest[kind] == whole.largest[kind]
        assert found.course.steps == planned().course.steps
        assert found.fits is None and "cannot be said" in str(found)
        assert found.to_dict()["step_seconds"] is None

    def test_a_strategy_that_cannot_hold_the_model_leaves_one_process(self) -> None:
        found = planned(ranks=4, distributed=Helpless())
        assert "no blocks to divide" in found.simulation.problems[0] and "one process alone" in found.simulation.problems[0]
        assert found.ranks == 1 and found.simulation.peak == planned().simulation.peak

    def test_nothing_to_plan(self) -> None:
        with pytest.raises(DrivetrainError, match="model"):
            plan(config(), train_dataset=data(), device="cpu")
        with pytest.raises(ConfigError, match="at least 1"):
            planned(ranks=0)


def test_a_simulated_step_has_the_operations_of_a_real_one() -> None:
    """Fake tensors ask questions of their own (prim::device), which are no work."""
    model, (x, y) = net(nn.GELU()), data()[0]
    with Recorder() as recorder:
        nn.MSELoss()(model(torch.stack([x] * BATCH)), torch.stack([y] * BATCH)).backward()
    real = {operation.name: count for operation, count in recorder.operations.items() if operation.name != "stack"}
    simulated_ones = planned(model).simulation.operations
    for name in ("addmm", "gelu", "gelu_backward", "mm", "mse_loss", "mse_loss_backward"):
        assert sum(n for o, n in simulated_ones.items() if o.name == name) == sum(
            n for o, n in recorder.operations.items() if o.name == name
        )
    assert {o.name for o in simulated_ones if o.phase.startswith(("forward", "backward"))} - set(real) <= {
        "ones_like",
        "div",
        "mul",
        "sum",
    }


def test_the_recorder_sees_real_steps_too() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    with Recorder() as recorder:
        layer(x).sum().backward()
    assert sum(o.flops * n for o, n in recorder.operations.items()) == 2 * (2 * 4 * 8 * 8)
