"""The 8-bit optimizers against their formulas in double precision, and what they keep, refuse and remember."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit, GlobalOptimManager
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import drivetrain_bitsandbytes as plugin
from drivetrain import (
    Callback,
    CallbackContext,
    Component,
    ConfigError,
    Trainer,
    TrainingConfig,
    component,
    make_component,
    option,
)

NAMES = ["adamw_8bit", "adam_8bit", "lion_8bit", "ademamix_8bit", "sgd_8bit", "rmsprop_8bit"]
PAGED = ["paged_adamw_8bit", "paged_lion_8bit", "paged_ademamix_8bit"]


def context(model: nn.Module, device: str = "cpu") -> Any:
    return SimpleNamespace(model=model, device=torch.device(device))


def optimizer(model: nn.Module, name: str, **options: Any) -> torch.optim.Optimizer:
    return make_component("optimizer", {"use": name, **options}, "optimizer").make_optimizer(context(model))


def matrix(rows: int = 64, columns: int = 128, seed: int = 0) -> nn.Module:
    """A model of one matrix: 8192 elements, more than stay in 32 bits."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))
    return model


def gradients(steps: int, like: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(like.shape, generator=generator) * (0.1 + like.abs()) for _ in range(steps)]


def run(made: torch.optim.Optimizer, weight: nn.Parameter, steps: list[Tensor]) -> Tensor:
    for gradient in steps:
        weight.grad = gradient.clone()
        made.step()
    return weight.detach().double()


# -- the formulas of the docstrings, in float64


def adamw(w: Tensor, gs: list[Tensor], lr: float, decay: float) -> Tensor:
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(gs, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w * (1 - lr * decay) - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return w


def lion(w: Tensor, gs: list[Tensor], lr: float, decay: float) -> Tensor:
    m = torch.zeros_like(w)
    for g in gs:
        w = w * (1 - lr * decay) - lr * torch.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
    return w


def ademamix(w: Tensor, gs: list[Tensor], lr: float, decay: float) -> Tensor:
    m1, m2, v = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(gs, 1):
        m1, m2, v = 0.9 * m1 + 0.1 * g, 0.9999 * m2 + 0.0001 * g, 0.999 * v + 0.001 * g * g
        w = w * (1 - lr * decay) - lr * (m1 / (1 - 0.9**t) + 5.0 * m2) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return w


def sgd(w: Tensor, gs: list[Tensor], lr: float, decay: float) -> Tensor:
    b = torch.zeros_like(w)
    for g in gs:
        b = 0.9 * b + g + decay * w
        w = w - lr * b
    return w


def rmsprop(w: Tensor, gs: list[Tensor], lr: float, decay: float) -> Tensor:
    v = torch.zeros_like(w)
    for g in gs:
        h = g + decay * w
        v = 0.99 * v + 0.01 * h * h
        w = w - lr * h / (v.sqrt() + 1e-8)
    return w


FORMULAS = [("adamw_8bit", adamw), ("adam_8bit", adamw), ("lion_8bit", lion), ("ademamix_8bit", ademamix), ("sgd_8bit", sgd)]
FORMULAS.append(("rmsprop_8bit", rmsprop))


@pytest.mark.parametrize(("name", "formula"), FORMULAS)
def test_each_follows_its_formula_exactly_in_32_bits_and_closely_in_8(name: str, formula: Callable[..., Tensor]) -> None:
    lr, decay = 1e-3, 0.1
    start = matrix().weight.detach()
    steps = gradients(20, start)
    wanted = formula(start.double(), [g.double() for g in steps], lr, decay)
    moved = (wanted - start).norm()

    def error(**options: Any) -> float:
        model = matrix()
        made = optimizer(model, name, lr=lr, weight_decay=decay, **options)
        return float((run(made, model.weight, steps) - wanted).norm() / moved)

    assert error(min_8bit_size=10**9) < 1e-4
    assert error() < 0.1, "the 8-bit state gives the same way, nearly"
    assert error() > 1e-4, "control: the state really is rounded"
    wrong = formula(start.double(), [g.double() for g in steps], lr, 0.0)
    assert (wrong - wanted).norm() / moved > 1e-3, "control: the formula without weight decay would be seen"


@pytest.mark.parametrize("size", [(64, 128), (512, 512)])
def test_adamw_8bit_is_near_float32_adamw_after_20_steps_and_other_settings_are_not(size: tuple[int, int]) -> None:
    """The weights differ by less than 1e-3 of their norm, as the requirement has it; but in 20 steps they move by 0.6 % of it only.

    So the difference is also measured against the movement, where 8 bits cost 2.6 % (0.015 to 0.027 for other gradients), and other
    settings are tried, which must be further away. β2 = 0.99 would be 0.3 % away: that the 32-bit state tells, to 1e-4 of the movement.
    """
    lr, decay = 1e-3, 0.1
    model, reference, exact = matrix(*size), matrix(*size), matrix(*size)
    start = model.weight.detach().double()
    steps = gradients(20, model.weight.detach())
    ours = run(optimizer(model, "adamw_8bit", lr=lr, weight_decay=decay), model.weight, steps)
    in_32 = run(optimizer(exact, "adamw_8bit", lr=lr, weight_decay=decay, min_8bit_size=10**9), exact.weight, steps)
    theirs = run(torch.optim.AdamW(reference.parameters(), lr=lr, weight_decay=decay), reference.weight, steps)
    moved = (theirs - start).norm()

    def away(found: Tensor) -> float:
        return float((found - theirs).norm() / moved)

    def other(**settings: Any) -> float:
        changed = matrix(*size)
        made = torch.optim.AdamW(changed.parameters(), **{"lr": lr, "weight_decay": decay, **settings})
        return away(run(made, changed.weight, steps))

    assert (ours - theirs).norm() / theirs.norm() < 3e-4
    assert away(ours) < 0.03
    assert away(in_32) < 1e-4 < 1e-3 < away(ours), "control: 8 bits really are fewer"
    assert other(betas=(0.8, 0.999)) > 0.1
    assert other(betas=(0.95, 0.999)) > 0.06
    assert other(betas=(0.9, 0.9)) > 0.03
    assert other(lr=1.05 * lr) > 0.04
    assert other(betas=(0.9, 0.99)) > 2e-3, "told from β2 = 0.999 by the 32-bit state"
    assert other(weight_decay=0.0) > 2e-3


@pytest.mark.parametrize(
    ("name", "most"), [("adamw_8bit", 2.1), ("lion_8bit", 1.05), ("sgd_8bit", 1.05), ("ademamix_8bit", 3.1)]
)
def test_bytes_of_state_for_each_parameter(name: str, most: float) -> None:
    model = matrix(512, 512)
    made = optimizer(model, name)
    run(made, model.weight, gradients(1, model.weight.detach()))
    tensors = [t for t in made.state[model.weight].values() if isinstance(t, Tensor)]
    assert sum(t.nbytes for t in tensors) / model.weight.numel() <= most


@pytest.mark.parametrize("size", [10, 10_000])
@pytest.mark.parametrize("name", ["adamw_8bit", "adam_8bit", "lion_8bit", "ademamix_8bit"])
def test_weight_decay_is_decoupled(name: str, size: int) -> None:
    """Without gradients the weights shrink by 1 − ηλ in each step, whatever the moments would make of it."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(size, 1))
    made = optimizer(model, name, lr=0.01, weight_decay=0.5)
    after = run(made, model.weight, [torch.zeros(size, 1)] * 10)
    torch.testing.assert_close(after, torch.full_like(after, (1 - 0.01 * 0.5) ** 10), rtol=1e-5, atol=0)


# -- what stays in 32 bits


class Language(nn.Module):
    """An embedding tied to the head, a second embedding, a norm, a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(128, 64)
        self.positions = nn.Embedding(64, 64)
        self.norm = nn.LayerNorm(64)
        self.hidden = nn.Linear(64, 64)
        self.head = nn.Linear(64, 128, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.hidden(self.tokens(ids) + self.positions(ids % 64))))


def bits(model: nn.Module, **options: Any) -> dict[str, int]:
    made = optimizer(model, "adamw_8bit", **options)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    return {name: 8 * made.state[p]["state1"].element_size() for name, p in model.named_parameters()}


def test_embeddings_and_small_tensors_keep_a_32_bit_state() -> None:
    torch.manual_seed(0)
    small = {"norm.weight": 32, "norm.bias": 32, "hidden.bias": 32}
    assert bits(Language()) == {"tokens.weight": 32, "positions.weight": 32, "hidden.weight": 8, **small}
    assert bits(Language(), quantize_embeddings=True) == {
        "tokens.weight": 8,
        "positions.weight": 8,
        "hidden.weight": 8,
        **small,
    }
    assert bits(Language(), min_8bit_size=4097)["hidden.weight"] == 32
    assert bits(Language(), min_8bit_size=0)["norm.bias"] == 8


def test_nothing_is_left_in_the_manager_that_all_of_bitsandbytes_shares() -> None:
    shared = GlobalOptimManager.get_instance()
    before = deepcopy((shared.pid2config, shared.index2config))
    model = Language()
    first, second = optimizer(model, "adamw_8bit"), optimizer(model, "adamw_8bit", quantize_embeddings=True)
    assert (shared.pid2config, shared.index2config) == before
    for made, dtype in ((first, torch.float32), (second, torch.uint8)):
        model.tokens.weight.grad = torch.ones_like(model.tokens.weight)
        made.step()
        assert made.state[model.tokens.weight]["state1"].dtype == dtype, "two runs in one process do not meet"


# -- in whole runs


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.Sequential(nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs)


def trainer(made: Any, *callbacks: Callback, steps: int = 24) -> Trainer:
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(4))
    config = TrainingConfig(
        max_duration=f"{steps}st", per_device_batch_size=16, optimizer=made, log_interval="1st", standard_callbacks=False
    )
    data = TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
    return Trainer(
        Small(), config, data, loss=nn.functional.mse_loss, callbacks=callbacks, scheduler=lambda step: 1 - step / 100
    )


@component
class Restore(Callback):
    """Hands a run the state of another."""

    saved: dict[str, Any] = option()

    def on_restore(self, ctx: CallbackContext) -> None:
        ctx.load_state_dict(self.saved)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_learns_and_a_resumed_one_ends_bit_equal(name: str) -> None:
    spec = {"use": name, "lr": 3e-4 if "lion" in name else 3e-3 if name != "rmsprop_8bit" else 1e-3}
    straight = trainer(spec)
    losses = [loss for _, loss in straight.train().losses]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])

    first = trainer(spec)
    for step in first.steps():
        if step.number == 9:
            saved = deepcopy(first.state_dict())
            break
    second = trainer(spec, Restore(saved=saved))
    second.train()
    mine, theirs = second.state_dict(), straight.state_dict()
    assert all(torch.equal(mine["model"][key], value) for key, value in theirs["model"].items())
    assert_equal_state(mine["optimizer"]["state"], theirs["optimizer"]["state"])


def assert_equal_state(mine: Any, theirs: Any) -> None:
    if isinstance(theirs, dict):
        assert list(mine) == list(theirs)
        for key in theirs:
            assert_equal_state(mine[key], theirs[key])
    elif isinstance(theirs, Tensor):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    else:
        assert mine == theirs


def test_a_loaded_state_still_shares_its_quantile_maps() -> None:
    """One table of 1 KiB for all parameters, not one for each."""
    first = trainer("adamw_8bit", steps=3)
    first.train()
    second = trainer("adamw_8bit", Restore(saved=deepcopy(first.state_dict())), steps=4)
    second.train()
    maps = {state["qmap1"].data_ptr() for state in second.ctx.optimizer.state.values() if "qmap1" in state}
    assert len(maps) == 1


def test_groups_set_their_own_rate_and_the_schedule_reaches_them() -> None:
    made = trainer({"use": "adamw_8bit", "lr": 1e-3, "groups": [{"match": "*.4.*", "lr": 1e-4}]}, steps=3)
    made.train()
    assert [g["lr"] for g in made.ctx.optimizer.param_groups] == pytest.approx([0.98e-3, 0.98e-3, 0.98e-4, 0.98e-4])


# -- refusals


def refused(name: str, model: nn.Module, device: str = "cpu", **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make_component("optimizer", {"use": name, **options}, "optimizer").make_optimizer(context(model, device))
    (problem,) = caught.value.problems
    assert problem.path == f"optimizer.{name}"
    return problem.message


@pytest.mark.parametrize("name", PAGED)
def test_paged_state_needs_cuda(name: str) -> None:
    message = refused(name, matrix())
    assert "CUDA" in message
    assert message.endswith(f"Use {name.removeprefix('paged_')}.")


def test_what_bitsandbytes_cannot_do_is_refused_before_the_first_step() -> None:
    assert "'0' gives sparse gradients" in refused("adamw_8bit", nn.Sequential(nn.Embedding(10, 4, sparse=True)))
    assert "'weight' is float64" in refused("lion_8bit", matrix().double())


def test_a_device_without_its_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Any) -> None:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(AdamW8bit, "step", step)
    assert "does not work on 'cpu' here (it says: no kernel)" in refused("lion_8bit", matrix())


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"lr": -1.0}, "lr"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"betas": [0.9]}, "betas"),
        ({"min_8bit_size": -1}, "min_8bit_size"),
        ({"amsgrad": True}, "amsgrad"),
    ],
)
def test_a_wrong_option_is_named_with_its_path(options: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_component("optimizer", {"use": "adamw_8bit", **options}, "optimizer")
    assert caught.value.problems[0].path.startswith(f"optimizer.adamw_8bit.{path}")


@pytest.mark.parametrize("name", [*NAMES, *PAGED])
def test_every_name_is_a_described_component(name: str) -> None:
    made = make_component("optimizer", name)
    assert isinstance(made, Component)
    assert made.kind == "optimizer"
    assert type(made).__name__ in plugin.__all__
    assert re.search(r"(19|20)\d\d|see `", str(type(made).__doc__)), "its source is cited"


@pytest.mark.parametrize("broken", ["", "raise RuntimeError('no CUDA library')"])
def test_without_a_working_bitsandbytes_the_error_says_what_to_repair(tmp_path: Path, broken: str) -> None:
    """In a process of its own, where a package of that name that fails stands in for a missing or a broken one."""
    package = tmp_path / "bitsandbytes"
    package.mkdir()
    package.joinpath("__init__.py").write_text(broken or "raise ModuleNotFoundError(\"No module named 'bitsandbytes'\")")
    program = (
        "from drivetrain import ConfigError, TrainingConfig\n"
        "try:\n    TrainingConfig(optimizer='adamw_8bit').components()\n"
        "except ConfigError as error:\n    print(error)"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=100)
    assert "optimizer" in done.stdout, done.stderr
    assert "need the package bitsandbytes" in done.stdout
    assert ("no CUDA library" if broken else "No module named 'bitsandbytes'") in done.stdout
    assert "pip install --force-reinstall --no-deps bitsandbytes" in done.stdout
    assert "uninstall" not in done.stdout


def test_without_the_plugin_the_error_says_which_one_to_install() -> None:
    program = (
        "from drivetrain import ConfigError, TrainingConfig\n"
        "try:\n    TrainingConfig(optimizer='adamw_8bit').components()\n"
        "except ConfigError as error:\n    print(error)"
    )
    env = os.environ | {"DRIVETRAIN_PLUGINS": "drivetrain-optimizers"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=100)
    assert "no plugin named 'adamw_8bit'" in done.stdout, done.stderr
    assert "pip install drivetrain-bitsandbytes" in done.stdout
