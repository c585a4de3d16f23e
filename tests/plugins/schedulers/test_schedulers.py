"""Every schedule at every step: against torch.optim.lr_scheduler and against the definitions written out here."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from drivetrain import ConfigError, Duration, Problem, make_component
from drivetrain_schedulers import Cosine, Linear

Factor = Callable[[float], float]
T = 120


class Context:
    """A run of a known length, as the schedules see it."""

    def __init__(self, run_length: float = T, run_unit: str = "st") -> None:
        self.run_length, self.run_unit = float(run_length), run_unit

    def position_of(self, length: Duration | str | float) -> float:
        if isinstance(length, (int, float)):
            return length * self.run_length
        wanted = Duration.parse(length)
        if wanted.unit == "%":
            return self.run_length * wanted.value / 100
        if wanted.unit != self.run_unit:
            raise ConfigError([Problem("max_duration", f"{wanted} cannot be placed in a run measured in {self.run_unit}")])
        return wanted.value


def make(name: str, run_length: float = T, run_unit: str = "st", **options: Any) -> Factor:
    component = make_component("scheduler", {"use": name, **options}, "scheduler")
    assert component.kind == "scheduler"
    return component.make_schedule(Context(run_length, run_unit))


def at_every_step(factor: Factor, steps: int = T) -> list[float]:
    return [factor(step) for step in range(steps + 1)]


# -- torch.optim.lr_scheduler


def torchs(make_scheduler: Callable[[torch.optim.Optimizer], Any], steps: int) -> list[float]:
    """The learning rate that torch's scheduler sets for each step, from a base of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make_scheduler(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


TORCH: dict[str, tuple[dict[str, Any], Callable[[torch.optim.Optimizer], Any]]] = {
    "constant": ({"use": "constant"}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    "linear": ({"use": "linear", "min_factor": 0.1}, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=T)),
    "cosine": ({"use": "cosine"}, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=T)),
    "cosine with floor": ({"use": "cosine", "min_factor": 0.1}, lambda o: lr_scheduler.CosineAnnealingLR(o, T, eta_min=0.1)),
    "restarts": (
        {"use": "cosine_with_restarts", "cycles": 4, "min_factor": 0.05},
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=T // 4, eta_min=0.05),
    ),
    "polynomial": ({"use": "polynomial", "power": 2.5}, lambda o: lr_scheduler.PolynomialLR(o, total_iters=T, power=2.5)),
    "one cycle": ({"use": "one_cycle"}, lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=T)),
    "one cycle, lines": (
        {"use": "one_cycle", "anneal": "linear", "warmup": 0.4, "div_factor": 10.0, "final_div_factor": 100.0},
        lambda o: lr_scheduler.OneCycleLR(
            o, max_lr=1.0, total_steps=T, anneal_strategy="linear", pct_start=0.4, div_factor=10, final_div_factor=100
        ),
    ),
    "one cycle, odd": (
        {"use": "one_cycle", "warmup": 0.237},
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=T, pct_start=0.237),
    ),
    "trapezoid": (
        {"use": "wsd", "warmup": "20st", "decay": "40st"},
        lambda o: lr_scheduler.LambdaLR(o, lambda s: min(s / 20, 1.0, (T - s) / 40)),
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("case", TORCH)
def test_each_step_has_the_rate_of_torchs_scheduler(case: str) -> None:
    options, theirs = TORCH[case]
    factor = make(options["use"], **{k: v for k, v in options.items() if k != "use"})
    assert [factor(step) for step in range(T)] == pytest.approx(torchs(theirs, T), rel=1e-9, abs=1e-12)


# -- the definitions, as transformers.optimization states them: s steps done, w warm-up steps, t steps in all, r the floor


def warmed(s: int, w: int, then: float) -> float:
    return s / max(1, w) if s < w else then


def constant(s: int, w: int, t: int) -> float:
    return warmed(s, w, 1.0)


def linear(s: int, w: int, t: int) -> float:
    return warmed(s, w, max(0.0, (t - s) / max(1, t - w)))


def progress(s: int, w: int, t: int) -> float:
    return (s - w) / max(1, t - w)


def cosine(s: int, w: int, t: int, cycles: float = 0.5, r: float = 0.0) -> float:
    wave = 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * progress(s, w, t)))
    return warmed(s, w, max(0.0, wave * (1 - r) + r))


def restarts(s: int, w: int, t: int, cycles: int = 1) -> float:
    p = progress(s, w, t)
    return warmed(s, w, 0.0 if p >= 1.0 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((cycles * p) % 1.0)))))


def polynomial(s: int, w: int, t: int, power: float = 1.0, first: float = 2.0, last: float = 0.0) -> float:
    """In learning rates, as transformers computes it, divided by the first one."""
    rate = last if s > t else (first - last) * (1 - (s - w) / (t - w)) ** power + last if s >= w else 0.0
    return warmed(s, w, rate / first)


def inverse_sqrt(s: int, w: int, t: int, timescale: int | None = None) -> float:
    timescale = timescale or w or 10_000
    shift = timescale - w
    return warmed(s, w, 1.0 / math.sqrt((s + shift) / timescale) if s >= w else 0.0)


def wsd(s: int, w: int, t: int, decay: int = 24, shape: str = "linear", r: float = 0.0) -> float:
    if s < t - decay:
        return warmed(s, w, 1.0)
    q = (s - (t - decay)) / decay
    fall = {"linear": 1 - q, "cosine": 0.5 * (1 + math.cos(math.pi * 0.5 * 2 * q)), "sqrt": 1 - math.sqrt(q)}[shape]
    return max(0.0, fall * (1 - r) + r) if s < t else r


DEFINED: list[tuple[str, dict[str, Any], Callable[[int, int, int], float]]] = [
    ("constant", {}, constant),
    ("linear", {}, linear),
    ("cosine", {}, cosine),
    ("cosine", {"min_factor": 0.1}, lambda s, w, t: cosine(s, w, t, r=0.1)),
    ("cosine", {"cycles": 1.75}, lambda s, w, t: cosine(s, w, t, cycles=1.75)),
    ("cosine_with_restarts", {}, restarts),
    ("cosine_with_restarts", {"cycles": 3}, lambda s, w, t: restarts(s, w, t, cycles=3)),
    ("polynomial", {}, polynomial),
    ("polynomial", {"power": 0.5, "min_factor": 0.25}, lambda s, w, t: polynomial(s, w, t, power=0.5, last=0.5)),
    ("polynomial", {"power": 3.0}, lambda s, w, t: polynomial(s, w, t, power=3.0)),
    ("inverse_sqrt", {}, inverse_sqrt),
    ("inverse_sqrt", {"timescale": "300st"}, lambda s, w, t: inverse_sqrt(s, w, t, timescale=300)),
    ("wsd", {}, wsd),
    ("wsd", {"decay": "40st", "shape": "cosine", "min_factor": 0.2}, lambda s, w, t: wsd(s, w, t, 40, "cosine", 0.2)),
    ("wsd", {"decay": 0.5, "shape": "sqrt"}, lambda s, w, t: wsd(s, w, t, 60, "sqrt")),
]


@pytest.mark.parametrize("warmup", [0, 1, 12, 57])
@pytest.mark.parametrize(("name", "options", "definition"), DEFINED, ids=lambda v: v if isinstance(v, str) else None)
def test_each_step_follows_the_definition(
    name: str, options: dict[str, Any], definition: Callable[[int, int, int], float], warmup: int
) -> None:
    factor = make(name, **options, **({"warmup": f"{warmup}st"} if warmup else {}))
    expected = [definition(step, warmup, T) for step in range(T + 1)]
    assert at_every_step(factor) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "wsd", "inverse_sqrt"])
def test_a_warm_up_rises_from_zero_in_a_straight_line(name: str) -> None:
    factor = make(name, warmup="10st")
    assert [factor(step) for step in range(11)] == pytest.approx([step / 10 for step in range(11)])
    assert make(name)(0) == 1.0, "without a warm-up the first step has the whole rate"


@pytest.mark.parametrize("cycles", [3, 7, 49])
def test_a_restart_on_a_whole_step_is_met_exactly(cycles: int) -> None:
    """(1/49)·49 is below 1 in floating point: computed carelessly, the restart comes a step late."""
    factor = make("cosine_with_restarts", run_length=cycles * 10, cycles=cycles)
    assert [factor(turn * 10) for turn in range(cycles)] == [1.0] * cycles


# -- lengths


@pytest.mark.parametrize("warmup", ["12st", "10%", 0.1, Duration(12, "st"), Duration(10, "%")])
def test_a_warm_up_is_a_duration_or_a_fraction(warmup: Any) -> None:
    assert at_every_step(make("linear", warmup=warmup)) == pytest.approx([linear(s, 12, T) for s in range(T + 1)])


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "wsd", "inverse_sqrt", "constant", "one_cycle"])
def test_in_tokens_the_factor_is_continuous_and_follows_the_same_curve(name: str) -> None:
    """A run of 120 steps of 4096 tokens; only one_cycle knows of steps, as torch's does, and differs by less than one."""
    size = 4096
    extra = {"timescale": 0.5} if name == "inverse_sqrt" else {}
    in_tokens = make(name, T * size, "tok", warmup=0.25, **extra)
    in_steps = make(name, warmup=0.25, **extra)
    slack = 0.1 if name == "one_cycle" else 1e-12
    assert [in_tokens(step * size) for step in range(T + 1)] == pytest.approx(at_every_step(in_steps), abs=slack)
    fine = [in_tokens(position) for position in range(0, T * size + 1, 64)]
    assert max(abs(a - b) for a, b in pairwise(fine)) < 0.01
    assert min(fine) >= 0.0
    assert max(fine) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "wsd", "inverse_sqrt", "one_cycle"])
def test_the_factor_depends_on_the_position_alone(name: str) -> None:
    """A resumed run makes the schedule anew and asks in the middle; asking changes nothing."""
    factor = make(name, warmup=0.1)
    whole = at_every_step(factor)
    assert [make(name, warmup=0.1)(step) for step in (0, 5, 12, 50, 117, T)] == [whole[step] for step in (0, 5, 12, 50, 117, T)]
    assert [factor(step) for step in reversed(range(T + 1))] == whole[::-1]


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "wsd"])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_past_the_end_the_floor_holds(name: str, floor: float) -> None:
    factor = make(name, min_factor=floor, warmup=0.1)
    assert [factor(T), factor(T + 1), factor(10 * T)] == [floor] * 3
    assert min(at_every_step(factor)[12:]) == floor


def test_inverse_sqrt_stops_at_its_floor() -> None:
    factor = make("inverse_sqrt", warmup="10st", min_factor=0.5)
    assert factor(39) > 0.5
    assert factor(41) == factor(T) == 0.5


def test_a_warm_up_as_long_as_the_run_is_only_a_warm_up() -> None:
    factor = make("cosine", warmup=1.0)
    assert [factor(s) for s in range(T)] == [s / T for s in range(T)]
    assert factor(T) == 0.0


@pytest.mark.parametrize("run_length", [1, 2, 3])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "wsd", "one_cycle"])
def test_the_shortest_runs_have_finite_rates(name: str, run_length: int) -> None:
    for warmup in (0.0, 0.5):
        assert all(0 <= f <= 1 for f in at_every_step(make(name, run_length, warmup=warmup), run_length))


# -- mistakes


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "wsd", "one_cycle"])
@pytest.mark.parametrize(("run_length", "unit"), [(math.inf, "st"), (3.0, "ep")])
def test_a_run_of_unknown_length_is_refused_by_those_that_need_its_end(name: str, run_length: float, unit: str) -> None:
    with pytest.raises(ConfigError, match=f"scheduler.{name} must know how many steps the run has") as caught:
        make(name, run_length, unit)
    assert [p.path for p in caught.value.problems] == ["max_duration"]


def test_a_run_of_unknown_length_suits_the_others_as_long_as_nothing_is_a_fraction_of_it() -> None:
    assert make("constant", math.inf)(10**9) == 1.0
    assert make("constant", 3.0, "ep")(0) == 1.0
    assert make("inverse_sqrt", math.inf, warmup="100st")(400) == 0.5
    for length in (0.1, "10%"):
        with pytest.raises(ConfigError, match="must know how many steps"):
            make("constant", math.inf, warmup=length)
    with pytest.raises(ConfigError, match="must know how many steps"):  # whole epochs at factor 0 would follow
        make("constant", 3.0, "ep", warmup="1ep")


@pytest.mark.parametrize(
    ("name", "options", "path", "message"),
    [
        ("cosine", {"warmup": "121st"}, "warmup", "121st is longer than the run of 120st"),
        ("one_cycle", {"warmup": "200st"}, "warmup", "200st is longer than the run of 120st"),
        ("wsd", {"decay": "200st"}, "decay", "200st is longer than the run"),
        (
            "wsd",
            {"warmup": 0.5, "decay": "61st"},
            "decay",
            "warm-up 0.5 and decay 61st together are longer than the run of 120",
        ),
        (
            "linear",
            {"warmup": 100},
            "warmup",
            "a number is a fraction of the run, from 0 to 1, got 100.0; for steps write '100st'",
        ),
        ("linear", {"warmup": -0.1}, "warmup", "from 0 to 1, got -0.1"),
        ("linear", {"warmup": "100"}, "warmup", "expected a duration, got '100'"),
        ("linear", {"warmup": "1e6tok"}, "warmup", "1000000tok cannot be placed in a run measured in st"),
        ("linear", {"min_factor": 1.5}, "min_factor", "must be at least 0 and at most 1, got 1.5"),
        ("cosine", {"cycles": 0.0}, "cycles", "must be above 0, got 0.0"),
        ("cosine_with_restarts", {"cycles": 0}, "cycles", "must be at least 1, got 0"),
        ("cosine_with_restarts", {"cycles": 1.5}, "cycles", "expected a whole number"),
        ("polynomial", {"power": -1.0}, "power", "must be above 0, got -1.0"),
        ("wsd", {"shape": "sqr"}, "shape", "Did you mean 'sqrt'?"),
        ("inverse_sqrt", {"timescale": 0.0}, "timescale", "got 0.0"),
        ("one_cycle", {"div_factor": 0.5}, "div_factor", "must be at least 1, got 0.5"),
        ("constant", {"min_factor": 0.1}, "min_factor", "unknown key"),
    ],
)
def test_wrong_options_are_named_with_their_path(name: str, options: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(name, **options)
    (problem,) = caught.value.problems
    assert problem.path == f"scheduler.{name}.{path}"
    assert message in problem.message


def test_inverse_sqrt_without_warm_up_needs_a_timescale_outside_steps() -> None:
    with pytest.raises(ConfigError, match="is needed without a warm-up: the run is measured in tokens"):
        make("inverse_sqrt", 1e6, "tok")
    assert make("inverse_sqrt", 1e6, "tok", timescale="1000tok")(3000) == 0.5


def test_options_in_python_are_checked_like_those_of_a_file() -> None:
    with pytest.raises(ConfigError, match="warmup: a number is a fraction of the run"):
        Linear(warmup=500)
    made = make_component("scheduler", Cosine(warmup="12st"))
    assert at_every_step(made.make_schedule(Context())) == at_every_step(make("cosine", warmup="12st"))
