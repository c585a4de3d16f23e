"""Every schedule at every step against the one of transformers, where it has one; torch's are in the plugin's own tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from drivetrain import Duration, make_component

T, W = 120, 15


class Context:
    """A run of T steps, as the schedules see it."""

    run_length, run_unit = float(T), "st"

    def position_of(self, length: Duration | str | float) -> float:
        return length * T if isinstance(length, (int, float)) else Duration.parse(length).value


def ours(name: str, **options: Any) -> list[float]:
    component: Any = make_component("scheduler", {"use": name, "warmup": f"{W}st", **options}, "scheduler")
    factor = component.make_schedule(Context())
    return [factor(step) for step in range(T + 1)]


def theirs(name: str, end: bool = True, **options: Any) -> list[float]:
    """The learning rate that transformers sets for each step, from a base of 1."""
    make: Callable[..., Any] = getattr(transformers, name, None) or getattr(transformers.optimization, name)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer, W, **({"num_training_steps": T} if end else {}), **options)
    rates = []
    for _ in range(T + 1):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


CASES = {
    "constant": (ours("constant"), lambda: theirs("get_constant_schedule_with_warmup", end=False)),
    "linear": (ours("linear"), lambda: theirs("get_linear_schedule_with_warmup")),
    "cosine": (ours("cosine"), lambda: theirs("get_cosine_schedule_with_warmup")),
    "cosine, two and a half waves": (
        ours("cosine", cycles=2.5),
        lambda: theirs("get_cosine_schedule_with_warmup", num_cycles=2.5),
    ),
    "cosine with a floor": (
        ours("cosine", min_factor=0.1),
        lambda: theirs("get_cosine_with_min_lr_schedule_with_warmup", min_lr_rate=0.1),
    ),
    "cosine_with_restarts": (
        ours("cosine_with_restarts", cycles=3),
        lambda: theirs("get_cosine_with_hard_restarts_schedule_with_warmup", num_cycles=3),
    ),
    "polynomial": (
        ours("polynomial", power=2.0, min_factor=0.05),
        lambda: theirs("get_polynomial_decay_schedule_with_warmup", lr_end=0.05, power=2.0),
    ),
    "inverse_sqrt": (
        ours("inverse_sqrt", timescale="40st"),
        lambda: theirs("get_inverse_sqrt_schedule", end=False, timescale=40),
    ),
    "wsd, linear": (
        ours("wsd", decay="30st"),
        lambda: theirs("get_wsd_schedule", num_decay_steps=30, decay_type="linear"),
    ),
    "wsd, cosine": (
        ours("wsd", decay="30st", shape="cosine"),
        lambda: theirs("get_wsd_schedule", num_decay_steps=30, decay_type="cosine"),
    ),
    "wsd, 1 − √q": (
        ours("wsd", decay="30st", shape="sqrt"),
        lambda: theirs("get_wsd_schedule", num_decay_steps=30, decay_type="1-sqrt"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_has_their_rate(case: str) -> None:
    mine, reference = CASES[case]
    assert mine == pytest.approx(reference(), abs=1e-12)


def test_control_another_length_is_noticed() -> None:
    assert ours("wsd", decay="29st") != pytest.approx(theirs("get_wsd_schedule", num_decay_steps=30, decay_type="linear"))
