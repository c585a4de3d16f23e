"""Without torch_xla: a package of that name stands in for it, found and imported as the real one would be."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import invalidate_caches
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from drivetrain import ConfigError, DeviceManager, make_component
from drivetrain_testing import run_processes, tiny_data, tiny_trainer, weights
from drivetrain_xla import Xla, XlaStrategy, tpu_device, xla_device

RELEASE = ".".join(torch.__version__.split(".")[:2])

STAND_IN = {
    "__init__.py": """
        import torch
        calls, seeds, found = [], {}, ["xla:0", "xla:1"]
        def devices(): return [torch.device(name) for name in found]
        def sync(): calls.append("sync")
        def manual_seed(seed, device=None): seeds[device] = seed
    """,
    "runtime.py": """
        kind, rank, size = "TPU", 0, 1
        def device_type(): return kind
        def global_ordinal(): return rank
        def world_size(): return size
    """,
    "core/__init__.py": "",
    "core/xla_model.py": """
        import torch_xla
        REDUCE_SUM = "sum"
        def get_rng_state(device=None): return torch_xla.seeds[device]
        def all_reduce(kind, values, scale=1.0):
            assert kind == "sum"
            torch_xla.calls.append(("all_reduce", scale))
            return torch_xla.reduce(values, scale)
        def broadcast_master_param(model): torch_xla.calls.append("broadcast")
        def rendezvous(tag, payload=b""):
            torch_xla.calls.append(("rendezvous", tag))
            return [payload, payload]
    """,
}


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_xla"]:
        del sys.modules[name]
    if hasattr(torch, "xla"):
        del torch.xla
        del sys.modules["torch.xla"]
    invalidate_caches()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Puts the stand-in on the path, as some version; returns the imported module."""

    def do(version: str = f"{RELEASE}.0", broken: str = "") -> Any:
        for name, code in STAND_IN.items():
            file = tmp_path / "torch_xla" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = (broken or code).splitlines()
            file.write_text("\n".join(line.removeprefix("        ") for line in lines))
        info = tmp_path / f"torch_xla-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_xla\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        forget()
        return None if broken else __import__("torch_xla.core.xla_model", fromlist=["x"]) and __import__("torch_xla.runtime")

    yield do
    forget()


def test_a_device_that_may_need_more_is_not_called_available() -> None:
    with pytest.raises(ConfigError, match=r"Available: cpu[^;]*'auto'; where there is what they need, also .*tpu, xla"):
        DeviceManager("foo")


class TestDevice:
    def test_by_name_and_index(self, install: Any) -> None:
        install()
        assert DeviceManager("tpu").device == DeviceManager("xla").device == torch.device("xla", 0)
        assert DeviceManager("xla", local_rank=1).device == DeviceManager("xla:1").device == torch.device("xla", 1)

    def test_a_process_that_sees_one_device_takes_it(self, install: Any) -> None:
        install().found[:] = ["xla:0"]
        assert xla_device(3) == torch.device("xla", 0)

    def test_torch_finds_the_random_generator(self, install: Any) -> None:
        """As the engine asks for it: `torch.get_device_module(device)`."""
        xla = install()
        device = xla_device(1)
        module = torch.get_device_module(device)
        module.manual_seed(5)
        module.set_rng_state(7, device)
        assert (module.get_rng_state(device), xla.seeds) == (7, {None: 5, "xla:1": 7})
        xla_device(0)
        assert torch.get_device_module(device) is module, "it is registered once"


class TestRefusals:
    def test_missing(self) -> None:
        for ask in (lambda: DeviceManager("tpu"), lambda: xla_device(0), lambda: XlaStrategy().setup(torch.device("cpu"))):
            with pytest.raises(
                ConfigError, match=rf"device: torch_xla is not installed: pip install 'torch_xla\[tpu\]=={RELEASE}"
            ):
                ask()

    def test_another_release_is_not_even_imported(self, install: Any) -> None:
        install(version="1.5.2", broken="raise SystemError('undefined symbol')")
        with pytest.raises(
            ConfigError, match=r"torch_xla 1\.5\.2 works with torch 1\.5 only, and torch .* is installed; pip install"
        ):
            xla_device(0)

    def test_one_that_cannot_be_loaded(self, install: Any) -> None:
        install(broken="raise ImportError('libpython3.so is missing')")
        with pytest.raises(ConfigError, match=r"cannot be imported: libpython3\.so is missing"):
            xla_device(0)

    def test_no_device(self, install: Any) -> None:
        xla = install()
        xla.found.clear()
        with pytest.raises(ConfigError, match="finds no device; is PJRT_DEVICE set"):
            xla_device(0)

        def fails() -> None:
            raise RuntimeError("Bad StatusOr access\nmore")

        xla.devices = fails
        with pytest.raises(ConfigError, match=r"finds no device: Bad StatusOr access$"):
            xla_device(0)

    @pytest.mark.parametrize("kind", ["CPU", None])
    def test_what_is_no_tpu(self, install: Any, kind: Any) -> None:
        install().runtime.kind = kind
        with pytest.raises(ConfigError, match="no TPU; set PJRT_DEVICE=TPU"):
            tpu_device(0)
        assert xla_device(0).type == "xla"


class TestStrategy:
    def test_by_name(self) -> None:
        assert isinstance(make_component("strategy", "xla"), Xla)

    def test_each_step_and_evaluation_batch_is_one_program(self, install: Any) -> None:
        """On the CPU: the numbers are those of a run without it, and nothing is reduced for one process."""
        xla = install()
        config = {"distributed": "xla", "eval_interval": "1ep"}
        trainer = tiny_trainer(steps=12, eval_dataset=tiny_data(seed=2), **config)
        trainer.train()
        plain = tiny_trainer(steps=12, eval_dataset=tiny_data(seed=2), eval_interval="1ep")
        plain.train()
        assert torch.equal(weights(trainer), weights(plain))
        assert xla.calls == ["sync"] * (12 + 2 * 6)
        assert trainer.ctx.strategy.reason == "1 PJRT process"

    def test_two_processes_reduce_once_a_step_and_count_missing_gradients_as_zero(self, install: Any) -> None:
        xla = install()
        xla.runtime.size = 2

        def reduce(values: Any, scale: float) -> Any:
            """What two processes with the same values do, in place for lists, as the real one."""
            if isinstance(values, torch.Tensor):
                return values * 2 * scale
            for value in values:
                value.mul_(2 * scale)
            return values

        xla.reduce = reduce
        strategy = XlaStrategy()
        strategy.setup(torch.device("cpu"))
        assert (strategy.rank, strategy.world_size, strategy.reason) == (0, 2, "2 PJRT processes")
        model = nn.Linear(2, 1)
        assert strategy.wrap(model) is model
        model.weight.grad = torch.tensor([[1.0, 2.0]])
        strategy.reduce_gradients(list(model.parameters()))
        assert torch.equal(model.weight.grad, torch.tensor([[1.0, 2.0]])) and torch.equal(model.bias.grad, torch.zeros(1))
        value = torch.tensor(3.0)
        assert strategy.sum(value) == 6 and value == 3
        assert strategy.gather({"a": 1}) == [{"a": 1}] * 2
        strategy.barrier()
        rendezvous = ("rendezvous", "drivetrain")
        assert xla.calls == ["broadcast", ("all_reduce", 0.5), ("all_reduce", 1.0), rendezvous, rendezvous]


def imported() -> bool:
    import drivetrain_xla

    assert drivetrain_xla.Xla(), "made without it"
    return "torch_xla" in sys.modules


def test_the_package_is_imported_and_made_without_torch_xla() -> None:
    assert run_processes(imported, [()]) == [False]
