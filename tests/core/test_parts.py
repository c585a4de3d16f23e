"""Devices, gradient synchronisation, optimizer groups, model preparation, and what importing costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from drivetrain import ConfigError, DeviceManager, DrivetrainError, OptimizerComponent, Trainer, TrainingConfig
from drivetrain.prepare import repeated_blocks


def test_device_manager_on_this_machine() -> None:
    devices = DeviceManager()
    assert devices.device == torch.ones(1, device=devices.device).device
    assert DeviceManager("cpu").count == 1
    moved = DeviceManager("cpu").to({"a": torch.ones(2), "b": [torch.ones(1), "text"], "c": (1, torch.zeros(3))})
    assert moved["b"][1] == "text"
    assert moved["c"][0] == 1


@pytest.mark.parametrize("name", ["gpu", "cdua", "hpu", "cuda:99", "cuda:x", "cpu:7"])
def test_unknown_or_missing_devices_name_those_that_exist(name: str) -> None:
    with pytest.raises(ConfigError, match=r"device: .*Available: cpu"):
        DeviceManager(name)


@pytest.mark.parametrize(
    ("part", "given", "remedy"),
    [
        ("model", nn.Linear, "an nn.Module"),
        ("args", {}, "load_training_config"),
        ("loss", nn.MSELoss, "a function"),
        ("step", "step", "a function"),
        ("optimizer", torch.optim.SGD, "a torch optimizer"),
        ("optimizer", lambda model: torch.optim.SGD(model.parameters()), "of a function, give what it makes"),
        ("scheduler", 0.1, "a torch scheduler, a function"),
        ("data_collator", [torch.stack], "a function"),
        ("compute_metrics", ["accuracy"], "a mapping of names"),
        ("precision", "bf16", r"TrainingConfig\(precision="),
        ("strategy", "ddp", r"TrainingConfig\(distributed="),
        ("callbacks", "progress", "in brackets"),
        ("callbacks", nn.Identity(), "in brackets"),
    ],
)
def test_a_part_of_another_type_is_refused_by_name(part: str, given: Any, remedy: str) -> None:
    """None of them may be left out without a word, as an optimizer of an unknown kind once was."""
    data = TensorDataset(torch.ones(8, 4), torch.ones(8, 1))
    config = TrainingConfig(standard_callbacks=False)
    parts = {"model": nn.Linear(4, 1), "args": config, "train_dataset": data, "loss": nn.MSELoss(), part: given}
    with pytest.raises(DrivetrainError, match=rf"(?s)^{part} must be (?=.*not ).*{remedy}"):
        Trainer(**parts)


class Plain(OptimizerComponent):
    def make_optimizer(self, ctx: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameter_groups(ctx.model))


def groups(**given: Any) -> dict[str, dict[str, Any]]:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    found = Plain(lr=0.1, weight_decay=0.01, **given).parameter_groups(model)
    return {name: group for group in found for name in group["param_names"]}


def test_only_matrices_decay_unless_told_otherwise() -> None:
    by_name = groups()
    assert {name: g["weight_decay"] for name, g in by_name.items()} == {
        "0.weight": 0.01,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": 0.01,
        "2.bias": 0.0,
    }
    assert {g["weight_decay"] for g in groups(decay="all").values()} == {0.01}


def test_settings_by_name() -> None:
    by_name = groups(groups=[{"match": "2.*", "lr": 1e-3}, {"match": "0.weight", "weight_decay": 0}])
    assert by_name["2.bias"]["lr"] == 1e-3
    assert by_name["0.weight"]["weight_decay"] == 0
    assert by_name["0.bias"]["lr"] == 0.1


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"match": "*.wieght"}], "matches no parameter"),
        ([{"match": "0.*"}, {"match": "*.weight"}], "matched by groups"),
        ([{"match": "*", "momentum": 0.9}], "cannot be set for a group"),
        ([{"lr": 1e-3}], "is missing"),
        ([{"match": "*", "lr": "1e-3"}], "expected a number"),
    ],
)
def test_wrong_groups(rules: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        groups(groups=rules)


def test_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match="no trainable parameter"):
        Plain().parameter_groups(nn.Linear(2, 2).requires_grad_(False))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh()) for _ in range(3))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **kwargs or {})


def test_activation_checkpointing_changes_memory_not_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVETRAIN_PLUGINS", "off")
    results, forwards, products = [], [], []
    for recompute in (False, True, "selective"):
        torch.manual_seed(0)
        model, count = Blocks(), [0]
        model.layers[0][0].register_forward_hook(lambda *_, c=count: c.__setitem__(0, c[0] + 1))
        config = TrainingConfig(max_duration="3st", activation_checkpointing=recompute, standard_callbacks=False)
        data = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
        with Products() as counted:
            Trainer(model, config, list(data), optimizer=torch.optim.SGD(model.parameters(), lr=0.1)).train()
        results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
        forwards.append(count[0])
        products.append(counted.count)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert forwards == [3, 6, 6]
    assert products[1] > products[0] == products[2]
    assert len(list(repeated_blocks(Blocks()))) == 3


def test_channels_last_changes_the_layout_of_convolutions_not_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVETRAIN_PLUGINS", "off")
    results, layouts = [], []
    for channels_last in (False, True):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 1)]
        model = nn.Sequential(*layers).double()
        layers[1].register_forward_hook(lambda *a: layouts.append(a[2].is_contiguous(memory_format=torch.channels_last)))
        config = TrainingConfig(max_duration="3st", channels_last=channels_last, standard_callbacks=False)
        images = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        data = TensorDataset(images, images.mean((1, 2, 3)).unsqueeze(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        Trainer(model, config, data, loss=nn.MSELoss(), optimizer=optimizer).train()
        results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert layouts == [False] * 3 + [True] * 3
    assert torch.allclose(results[0], results[1], rtol=1e-12, atol=1e-14)
    assert not torch.equal(results[0], torch.zeros_like(results[0]))


@pytest.mark.parametrize("model", [nn.Linear(4, 1), nn.Sequential(nn.Sequential(nn.Linear(4, 1)))])
def test_activation_checkpointing_needs_blocks(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    """One is not enough: all of it would be recomputed at once."""
    monkeypatch.setenv("DRIVETRAIN_PLUGINS", "off")
    with pytest.raises(ConfigError, match=r"no repeated blocks .*several modules of one class"):
        Trainer(
            model,
            TrainingConfig(activation_checkpointing=True, standard_callbacks=False),
            TensorDataset(torch.ones(8, 4), torch.ones(8, 1)),
            loss=nn.MSELoss(),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        )


def fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_drivetrain_does_not_import_torch() -> None:
    assert (
        fresh("import sys; from drivetrain import registry; registry.candidates('optimizer'); print('torch' in sys.modules)")
        == "False"
    )
    assert (
        fresh("import sys; from drivetrain import TrainingConfig, component, Duration; print('torch' in sys.modules)")
        == "False"
    )


IMPORTS = """
import json, sys, time, torch, torch.utils.data
before, times = set(sys.modules), []
for _ in range(5):
    for name in set(sys.modules) - before:
        del sys.modules[name]
    began = time.perf_counter()
    STATEMENT
    times.append(time.perf_counter() - began)
print(json.dumps([sorted(set(sys.modules) - before), sorted(times)[2]]))
"""


def test_importing_drivetrain_adds_little_to_torch(record_property: Any) -> None:
    """Modules are counted, which is free of noise; the median time is that of a machine that may be busy."""
    modules, seconds = json.loads(fresh(IMPORTS.replace("STATEMENT", "import drivetrain")))
    record_property("import_drivetrain_ms", 1000 * seconds)
    assert modules == ["drivetrain"]
    assert seconds < 0.05

    modules, seconds = json.loads(fresh(IMPORTS.replace("STATEMENT", "from drivetrain import Trainer, TrainingConfig")))
    record_property("import_trainer_ms", 1000 * seconds)
    packages = {name.partition(".")[0] for name in modules if not name.endswith("__mypyc")}  # tomli's compiled part
    packages -= sys.stdlib_module_names
    assert packages == {"drivetrain", "attr", "attrs", "cattrs", "pluggy", "tomli"}, "nothing but the core and its dependencies"
    assert len(modules) <= 120


def test_the_core_makes_no_output_and_no_file(tmp_path: Path) -> None:
    code = (
        "import torch; from drivetrain import Trainer, TrainingConfig\n"
        "m = torch.nn.Linear(2, 1); d = torch.utils.data.TensorDataset(torch.ones(8, 2), torch.ones(8, 1))\n"
        "Trainer(m, TrainingConfig(), d, d, loss=torch.nn.MSELoss(), optimizer=torch.optim.SGD(m.parameters(), lr=0.1)).train()\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"DRIVETRAIN_PLUGINS": "off", "PATH": ""},
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert list(tmp_path.iterdir()) == []
