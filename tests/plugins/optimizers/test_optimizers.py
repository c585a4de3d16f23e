"""Each optimizer against its formula, written here in float64 without torch.optim, and the options they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from drivetrain import ConfigError, OptimizerComponent, make_component
from drivetrain_optimizers import Adam, AdamW

STEPS = 20


def gradient(parameter: Tensor, step: int) -> Tensor:
    """A gradient that depends on the parameter and on the step, so that every state of an optimizer matters."""
    return torch.sin(3 * parameter + step) + 0.1 * parameter


class Model(nn.Module):
    """A matrix, which decays, and a vector, which does not."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, 3, generator=generator, dtype=torch.float64).to(dtype))
        self.bias = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64).to(dtype))


def make(spec: dict[str, Any] | str, model: nn.Module) -> torch.optim.Optimizer:
    component = make_component("optimizer", spec, "optimizer")
    assert isinstance(component, OptimizerComponent)
    return component.make_optimizer(SimpleNamespace(model=model))


def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: range = range(STEPS)) -> None:
    for step in steps:
        for parameter in model.parameters():
            parameter.grad = gradient(parameter.detach(), step)
        optimizer.step()


# -- the formulas. Each takes parameter, gradient, step from 1, its own memory and the options, and returns the new parameter.

Reference = Callable[[Tensor, Tensor, int, dict[str, Any], dict[str, Any]], Tensor]


def adam_moments(g: Tensor, memory: dict[str, Any], o: dict[str, Any]) -> tuple[Tensor, Tensor]:
    b1, b2 = o["betas"]
    memory["m"] = b1 * memory.get("m", torch.zeros_like(g)) + (1 - b1) * g
    memory["v"] = b2 * memory.get("v", torch.zeros_like(g)) + (1 - b2) * g * g
    return memory["m"], memory["v"]


def adam(x: Tensor, g: Tensor, t: int, memory: dict[str, Any], o: dict[str, Any]) -> Tensor:
    m, v = adam_moments(g + o["weight_decay"] * x, memory, o)
    m, v = m / (1 - o["betas"][0] ** t), v / (1 - o["betas"][1] ** t)
    if o["amsgrad"]:
        v = memory["top"] = torch.maximum(memory.get("top", v), memory["v"]) if "top" in memory else memory["v"]
        v = v / (1 - o["betas"][1] ** t)
    return x - o["lr"] * m / (v.sqrt() + o["eps"])


def adamw(x: Tensor, g: Tensor, t: int, memory: dict[str, Any], o: dict[str, Any]) -> Tensor:
    return adam(x * (1 - o["lr"] * o["weight_decay"]), g, t, memory, o | {"weight_decay": 0.0})


def sgd(x: Tensor, g: Tensor, t: int, memory: dict[str, Any], o: dict[str, Any]) -> Tensor:
    g = g + o["weight_decay"] * x
    if o["momentum"] == 0:
        return x - o["lr"] * g
    memory["b"] = g if t == 1 else o["momentum"] * memory["b"] + (1 - o["dampening"]) * g
    return x - o["lr"] * (g + o["momentum"] * memory["b"] if o["nesterov"] else memory["b"])


def adagrad(x: Tensor, g: Tensor, t: int, memory: dict[str, Any], o: dict[str, Any]) -> Tensor:
    g = g + o["weight_decay"] * x
    memory["v"] = memory.get("v", torch.full_like(g, o["initial_accumulator"])) + g * g
    return x - o["lr"] / (1 + (t - 1) * o["lr_decay"]) * g / (memory["v"].sqrt() + o["eps"])


def rmsprop(x: Tensor, g: Tensor, t: int, memory: dict[str, Any], o: dict[str, Any]) -> Tensor:
    g, a = g + o["weight_decay"] * x, o["alpha"]
    v = memory["v"] = a * memory.get("v", torch.zeros_like(g)) + (1 - a) * g * g
    if o["centered"]:
        memory["mean"] = a * memory.get("mean", torch.zeros_like(g)) + (1 - a) * g
        v = v - memory["mean"] ** 2
    memory["b"] = o["momentum"] * memory.get("b", torch.zeros_like(g)) + g / (v.sqrt() + o["eps"])
    return x - o["lr"] * memory["b"]


def nadam(x: Tensor, g: Tensor, t: int, memory: dict[str, Any], o: dict[str, Any]) -> Tensor:
    if o["decoupled_weight_decay"]:
        x = x * (1 - o["lr"] * o["weight_decay"])
    else:
        g = g + o["weight_decay"] * x
    m, v = adam_moments(g, memory, o)
    mu = [o["betas"][0] * (1 - 0.5 * 0.96 ** (i * o["momentum_decay"])) for i in range(1, t + 2)]
    ahead = mu[t] * m / (1 - math.prod(mu)) + (1 - mu[t - 1]) * g / (1 - math.prod(mu[:t]))
    return x - o["lr"] * ahead / ((v / (1 - o["betas"][1] ** t)).sqrt() + o["eps"])


def radam(x: Tensor, g: Tensor, t: int, memory: dict[str, Any], o: dict[str, Any]) -> Tensor:
    if o["decoupled_weight_decay"]:
        x = x * (1 - o["lr"] * o["weight_decay"])
    else:
        g = g + o["weight_decay"] * x
    m, v = adam_moments(g, memory, o)
    b1, b2 = o["betas"]
    limit = 2 / (1 - b2) - 1
    rho = limit - 2 * t * b2**t / (1 - b2**t)
    if rho <= 5:
        return x - o["lr"] * m / (1 - b1**t)
    r = math.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))
    return x - o["lr"] * m / (1 - b1**t) * r * math.sqrt(1 - b2**t) / (v.sqrt() + o["eps"])


def adafactor(x: Tensor, g: Tensor, t: int, memory: dict[str, Any], o: dict[str, Any]) -> Tensor:
    keep, square = 1 - t ** o["beta2_decay"], g * g
    scale = max(o["eps2"], x.square().mean().sqrt().item()) * min(o["lr"], 1 / math.sqrt(t))
    if x.ndim == 2:
        memory["r"] = keep * memory.get("r", 0.0) + (1 - keep) * square.mean(1, keepdim=True)
        memory["c"] = keep * memory.get("c", 0.0) + (1 - keep) * square.mean(0, keepdim=True)
        v = memory["r"] @ memory["c"] / max(memory["r"].mean().item(), o["eps1"])
    else:
        v = memory["v"] = keep * memory.get("v", 0.0) + (1 - keep) * square
    update = g / v.clamp(min=o["eps1"] ** 2).sqrt()
    update = update / max(1.0, update.square().mean().sqrt().item() / o["clip"])
    return x * (1 - o["lr"] * o["weight_decay"]) - scale * update


ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}
DEFAULTS: dict[str, tuple[Reference, dict[str, Any]]] = {
    "adamw": (adamw, ADAM | {"lr": 1e-3, "weight_decay": 0.01}),
    "adam": (adam, ADAM | {"lr": 1e-3, "weight_decay": 0.0}),
    "sgd": (sgd, {"lr": 1e-2, "weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False}),
    "adafactor": (
        adafactor,
        {
            "lr": 1e-2,
            "weight_decay": 0.0,
            "beta2_decay": -0.8,
            "clip": 1.0,
            "eps1": torch.finfo(torch.float64).eps,
            "eps2": 1e-3,
        },
    ),
    "adagrad": (adagrad, {"lr": 1e-2, "weight_decay": 0.0, "lr_decay": 0.0, "initial_accumulator": 0.0, "eps": 1e-10}),
    "rmsprop": (rmsprop, {"lr": 1e-2, "weight_decay": 0.0, "alpha": 0.99, "eps": 1e-8, "momentum": 0.0, "centered": False}),
    "nadam": (nadam, ADAM | {"lr": 2e-3, "weight_decay": 0.0, "momentum_decay": 4e-3, "decoupled_weight_decay": False}),
    "radam": (radam, ADAM | {"lr": 1e-3, "weight_decay": 0.0, "decoupled_weight_decay": False}),
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in DEFAULTS),
    *((name, {"lr": 0.05, "weight_decay": 0.1}) for name in DEFAULTS),
    ("adamw", {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "amsgrad": True}),
    ("adam", {"lr": 0.05, "betas": (0.8, 0.95), "amsgrad": True}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    ("adafactor", {"lr": 0.1, "beta2_decay": -0.5, "clip": 1.5, "eps2": 1.5}),
    ("adafactor", {"lr": 0.1, "eps1": 0.9, "clip": 1.5}),
    ("adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator": 0.5}),
    ("rmsprop", {"momentum": 0.9, "centered": True, "alpha": 0.9}),
    ("nadam", {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True, "momentum_decay": 0.1}),
    ("radam", {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda v: v if isinstance(v, str) else ",".join(v) or "defaults")
def test_twenty_steps_follow_the_formula(name: str, options: dict[str, Any]) -> None:
    model = Model()
    formula, defaults = DEFAULTS[name]
    settings = defaults | options
    expected = {}
    for key, parameter in model.named_parameters():
        x, memory = parameter.detach().clone(), {}
        for t in range(1, STEPS + 1):
            own = settings | ({} if x.ndim >= 2 else {"weight_decay": 0.0})
            x = formula(x, gradient(x, t - 1), t, memory, own)
        expected[key] = x
    train(make({"use": name, **options}, model), model)
    tolerance = 1e-7 if name == "nadam" else 1e-10  # torch keeps NAdam's product of μ in float32
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[key], rtol=tolerance, atol=tolerance / 100)


def test_the_formula_test_would_notice_a_wrong_option() -> None:
    """Control: settings that differ a little give weights that differ far more than the tolerance above."""
    first, second = Model(), Model()
    train(make({"use": "adamw", "eps": 1e-8}, first), first)
    train(make({"use": "adamw", "eps": 1e-5}, second), second)
    assert (first.weight - second.weight).abs().max() > 1e-9


# -- what decays, and groups


@pytest.mark.parametrize("name", DEFAULTS)
def test_only_matrices_decay_unless_asked_otherwise(name: str) -> None:
    def decays(**options: Any) -> dict[str, float]:
        groups = make({"use": name, "weight_decay": 0.1, **options}, Model()).param_groups
        return {name: group["weight_decay"] for group in groups for name in group["param_names"]}

    assert decays() == {"weight": 0.1, "bias": 0.0}
    assert decays(decay="all") == {"weight": 0.1, "bias": 0.1}


def test_groups_by_pattern_set_rate_and_decay() -> None:
    model = Model()
    optimizer = make({"use": "adamw", "groups": [{"match": "b*", "lr": 0.5, "weight_decay": 0.2}]}, model)
    found = {name: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for name in g["param_names"]}
    assert found == {"weight": (1e-3, 0.01), "bias": (0.5, 0.2)}


def test_frozen_parameters_are_left_out() -> None:
    model = Model()
    model.bias.requires_grad_(False)
    assert [g["param_names"] for g in make("sgd", model).param_groups] == [["weight"]]


# -- fused

FUSIBLE = ("adamw", "adam", "sgd", "adagrad")


class Wide(Model):
    """More numbers than a processor takes at once, and some left over."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.more = nn.Parameter(torch.linspace(-1, 1, 87, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUSIBLE)
def test_fused_is_chosen_on_a_cpu_and_agrees_with_unfused(name: str, dtype: torch.dtype) -> None:
    fused, plain = Wide(dtype), Wide(dtype)
    extra = {"momentum": 0.9} if name == "sgd" else {}
    optimizer, reference = make({"use": name, **extra}, fused), make({"use": name, "fused": False, **extra}, plain)
    if name != "sgd" or dtype == torch.float32:
        assert {group["fused"] for group in optimizer.param_groups} == {True}
    assert {group["fused"] for group in reference.param_groups} == {None}
    train(optimizer, fused)
    train(reference, plain)
    rounding = torch.finfo(dtype).eps
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=8 * rounding, atol=8 * rounding)


def test_a_kernel_of_torch_that_is_wrong_is_not_used() -> None:
    weights = [nn.Parameter(torch.linspace(-1, 1, 64, dtype=torch.bfloat16)) for _ in range(2)]
    for weight, fused in zip(weights, (True, False), strict=True):
        weight.grad = torch.linspace(1, -1, 64, dtype=torch.bfloat16)
        torch.optim.SGD([weight], lr=0.25, fused=fused, foreach=False).step()
    if torch.allclose(*weights, atol=0.02):
        pytest.skip("this release of torch computes it right")
    model = Wide(torch.bfloat16)
    assert {group["fused"] for group in make("sgd", model).param_groups} == {None}
    with pytest.raises(ConfigError, match=r"a fused SGD is impossible here: .* something else with torch.bfloat16 on cpu"):
        make({"use": "sgd", "fused": True}, model)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 2, sparse=True)

    def backward(self) -> None:
        self.table(torch.tensor([1, 4])).sum().backward()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch.optim.Adagrad
@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_sparse_gradients_work_where_torch_has_them(name: str) -> None:
    model = Sparse()
    before = model.table.weight.detach().clone()
    optimizer = make(name, model)
    model.backward()
    optimizer.step()
    changed = (model.table.weight != before).any(dim=1)
    assert changed.tolist() == [False, True, False, False, True, False]


@pytest.mark.parametrize("name", ["adamw", "adam", "adafactor", "nadam", "radam", "rmsprop"])
def test_sparse_gradients_give_torchs_error_elsewhere(name: str) -> None:
    model = Sparse()
    optimizer = make(name, model)
    model.backward()
    with pytest.raises(RuntimeError, match="sparse grad"):
        optimizer.step()


@pytest.mark.parametrize("name", FUSIBLE)
def test_a_fused_optimizer_that_is_impossible_is_a_problem_of_its_option(name: str) -> None:
    with pytest.raises(ConfigError, match="'table' gives sparse gradients") as caught:
        make({"use": name, "fused": True}, Sparse())
    assert [p.path for p in caught.value.problems] == [f"optimizer.{name}.fused"]
    with pytest.raises(ConfigError, match=r"fused .* is impossible here: torch says: .*floating point"):
        make({"use": name, "fused": True}, Model(torch.complex64))


def test_on_a_device_without_fused_kernels_the_plain_one_is_taken() -> None:
    model = Model().to("meta")
    optimizer = make("adamw", model)
    assert [g["fused"] for g in optimizer.param_groups] == [None, None]


@pytest.mark.parametrize("name", FUSIBLE)
def test_a_simulation_without_numbers_takes_the_fused_kernel(name: str) -> None:
    with FakeTensorMode():
        optimizer = make(name, Model(torch.float32))
    assert {group["fused"] for group in optimizer.param_groups} == {True}


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("name", FUSIBLE)
def test_sharded_parameters_are_fused_only_where_torch_shards_the_kernel(name: str, process_group: None) -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(4, 4)
    fully_shard(model)
    optimizer = make(name, model)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()  # fused SGD and Adagrad have no sharding rule: choosing them would fail here
    if name in ("adam", "adamw"):
        assert optimizer.param_groups[0]["fused"] is True


# -- options


@pytest.mark.parametrize(
    ("options", "path", "message"),
    [
        ({"lr": -1.0}, ".lr", "must be at least 0, got -1.0"),
        ({"lr": float("nan")}, ".lr", "must be at least 0, got nan"),
        ({"lr": "1e-3"}, ".lr", "expected a number, got the text '1e-3' (remove the quotes)"),
        ({"weight_decay": -0.1}, ".weight_decay", "must be at least 0, got -0.1"),
        ({"betas": [0.9, 1.0]}, ".betas", "must be at least 0 and below 1, got 1.0"),
        ({"betas": [0.9]}, ".betas", "expected a list of 2 values, got 1"),
        ({"eps": -1e-8}, ".eps", "must be at least 0, got -1e-08"),
        ({"learning_rate": 0.1}, ".learning_rate", "unknown key."),
    ],
)
def test_wrong_options_are_named_with_their_path(options: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make({"use": "adamw", **options}, Model())
    (problem,) = caught.value.problems
    assert problem.path == f"optimizer.adamw{path}"
    assert problem.message.startswith(message)


def test_options_that_torch_refuses_together_are_a_problem_too() -> None:
    with pytest.raises(ConfigError, match="Nesterov momentum requires a momentum") as caught:
        make({"use": "sgd", "nesterov": True}, Model())
    assert [p.path for p in caught.value.problems] == ["optimizer.sgd"]


def test_options_in_python_are_checked_like_those_of_a_file() -> None:
    with pytest.raises(ConfigError, match="lr: must be at least 0"):
        AdamW(lr=-1.0)
    with pytest.raises(ConfigError, match=r"betas: .*below 1, got 1\.5"):
        Adam(betas=(1.5, 0.9))
    with pytest.raises(ConfigError, match="expected a number, got the text"):
        make_component("optimizer", AdamW(lr="fast"))


# -- state


@pytest.mark.parametrize("name", [*DEFAULTS])
def test_a_restored_state_goes_on_bit_equal(name: str) -> None:
    straight, first, second = Model(torch.float32), Model(torch.float32), Model(torch.float32)
    train(make(name, straight), straight)

    optimizer = make(name, first)
    train(optimizer, first, range(8))
    saved = deepcopy((first.state_dict(), optimizer.state_dict()))
    restored = make(name, second)
    second.load_state_dict(saved[0])
    restored.load_state_dict(saved[1])
    train(restored, second, range(8, STEPS))
    assert torch.equal(second.weight, straight.weight)
    assert torch.equal(second.bias, straight.bias)

    forgetful = Model(torch.float32)
    forgetful.load_state_dict(saved[0])
    train(make(name, forgetful), forgetful, range(8, STEPS))
    if name != "sgd":  # plain SGD has no state
        assert not torch.equal(forgetful.weight, straight.weight), "control: the state matters"
