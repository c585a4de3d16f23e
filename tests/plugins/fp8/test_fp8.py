"""fp8 without the hardware: who is refused, which layers are converted, and torchao's own layers on the CPU where it is installed."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from drivetrain import ConfigError, Precision, TrainingConfig, make_component
from drivetrain_fp8 import Fp8Precision, convertible, why_no_fp8

CUDA = torch.device("cuda")


def context(device: str, compile: bool = True) -> Any:
    return SimpleNamespace(device=torch.device(device), config=TrainingConfig(compile=compile))


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None = None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 64)
        self.odd = nn.Linear(64, 60)
        self.up = nn.Linear(60, 128)
        self.blocks = nn.ModuleList(nn.Linear(128, 128) for _ in range(2))
        self.down = nn.Linear(128, 64)
        self.head = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.blocks[1](self.blocks[0](x)).relu()))


# -- the hardware


@pytest.mark.parametrize(
    ("capability", "hip", "works"),
    [
        ((8, 0), None, False),
        ((8, 6), None, False),
        ((8, 9), None, True),
        ((9, 0), None, True),
        ((10, 0), None, True),
        ((9, 0), "6.4", False),
        ((9, 4), "6.4", True),
    ],
)
def test_only_gpus_with_8_bit_products_are_taken(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, works: bool
) -> None:
    pretend(monkeypatch, capability, hip)
    problem = why_no_fp8(CUDA)
    assert (problem is None) == works
    if problem is not None:
        assert f"this GPU has {capability[0]}.{capability[1]}" in problem


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_other_devices_are_refused_with_a_remedy(device: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_component("precision", "fp8").make_precision(context(device))
    (problem,) = caught.value.problems
    assert problem.path == "precision"
    assert f"fp8 does not work on the device '{device}'" in problem.message
    assert problem.message.endswith("Use bf16.")


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_the_reason_says_the_recipe_and_warns_of_eager_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    made = make_component("precision", {"use": "fp8", "recipe": "rowwise"}, "precision")
    precision = made.make_precision(context("cuda"))
    assert isinstance(precision, Precision)
    assert (precision.name, precision.reason) == ("fp8", "fp8: rowwise scaling, bfloat16 autocast")
    assert made.make_precision(context("cuda", compile=False)).reason.endswith("slow without compile = true")
    assert not precision.scales


def test_an_unknown_recipe_is_named_with_its_path() -> None:
    with pytest.raises(ConfigError) as caught:
        make_component("precision", {"use": "fp8", "recipe": "delayed"}, "precision")
    assert caught.value.problems[0].path == "precision.fp8.recipe"


# -- the layers


def test_layers_of_fitting_sizes_are_converted_but_the_last() -> None:
    assert convertible(Model(), None) == {"blocks.0", "blocks.1", "down"}
    assert convertible(Model(), ["blocks.1"]) == {"blocks.0", "down", "head"}
    assert convertible(Model(), []) == {"blocks.0", "blocks.1", "down", "head"}


@pytest.mark.parametrize(
    ("model", "skip", "message"),
    [
        (nn.Sequential(nn.Linear(64, 64)), None, "no linear layer to convert"),
        (nn.Sequential(nn.Linear(10, 10)), [], "multiples of 16"),
        (Model(), ["layer.*"], r"'layer\.\*' matches no linear layer \(there are odd, up, blocks\.0\)"),
    ],
)
def test_nothing_to_convert_is_said_before_the_first_step(model: nn.Module, skip: list[str] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convertible(model, skip)


def test_torchao_is_asked_for_those_layers_with_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = ModuleType("torchao.float8")
    asked: dict[str, Any] = {}

    def convert(module: nn.Module, *, config: Any, module_filter_fn: Any) -> nn.Module:
        asked["config"] = config
        asked["names"] = {name for name, m in module.named_modules() if isinstance(m, nn.Linear) and module_filter_fn(m, name)}
        return module

    fake.convert_to_float8_training = convert
    fake.Float8LinearConfig = SimpleNamespace(from_recipe_name=lambda name: ("config of", name))
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", fake)
    model = Model()
    assert Fp8Precision(torch.device("cpu"), "rowwise_with_gw_hp", None, "").cast(model) is model
    assert asked == {"config": ("config of", "rowwise_with_gw_hp"), "names": {"blocks.0", "blocks.1", "down"}}


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])  # the third asks for CUDA's autocast
def test_torchaos_layers_train_as_float32_does_but_for_rounding(recipe: str) -> None:
    """torchao's layers run on CPUs too, only without any gain; gradients must point the way of float32's."""
    pytest.importorskip("torchao")
    exact, model = Model(), Model()
    precision = Fp8Precision(torch.device("cpu"), recipe, None, "")
    converted = precision.cast(model)
    assert type(converted.blocks[0]).__name__ == "Float8Linear"
    assert type(converted.head) is nn.Linear
    inputs = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    exact(inputs).square().mean().backward()
    with precision.forward():
        loss = converted(inputs).float().square().mean()
    loss.backward()
    for name in ("blocks.0.weight", "down.weight", "head.weight"):
        mine, theirs = converted.get_parameter(name).grad, exact.get_parameter(name).grad
        assert mine.dtype == torch.float32
        assert torch.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0) > 0.97
        assert not torch.equal(mine, theirs)
