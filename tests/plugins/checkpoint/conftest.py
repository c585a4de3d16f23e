"""What these tests share: exact comparison of state trees, and a disk without the cost of fsync."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drivetrain import Trainer, TrainingConfig
from drivetrain_checkpoint import Files


def tensor_bytes(tensor: Tensor) -> bytes:
    """The elements, bit for bit, by a way that shares nothing with the writer's."""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two trees differ in a type, a key, the order of keys, or a single bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and tensor_bytes(a) == tensor_bytes(b)
        return [] if same else [f"{path}: {a} != {b}"]
    plain = {dict: dict, list: list, tuple: tuple}
    kind_a = next((k for k in plain if isinstance(a, k)), type(a))
    if kind_a is not type(b):
        return [f"{path}: {type(a)} became {type(b)}"]
    if isinstance(a, dict):
        if [(type(k), k) for k in a] != [(type(k), k) for k in b]:
            return [f"{path}: keys {list(a)} != {list(b)}"]
        return [d for k in a for d in differences(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: {len(a)} items != {len(b)}"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}[{i}]")]
    same = struct.pack("d", a) == struct.pack("d", b) if isinstance(a, float) else a == b
    return [] if same else [f"{path}: {a!r} != {b!r}"]


class QuickFiles(Files):
    """The same files, not made durable: for tests that write hundreds of checkpoints and pull no plug."""

    def fsync(self, path: Any) -> None:
        pass

    def fsync_dir(self, path: Any) -> None:
        pass


@pytest.fixture(scope="session")
def diff() -> Callable[[Any, Any], list[str]]:
    return differences


@pytest.fixture
def quick() -> Files:
    return QuickFiles()


def small_trainer(output_dir: Path, *callbacks: Any, name: str | None = "run", steps: int = 8, **given: Any) -> Trainer:
    """A run of some milliseconds; plain SGD with momentum updates every parameter in place."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    generator = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(32, 4, generator=generator), torch.randn(32, 1, generator=generator))
    config = TrainingConfig(
        max_duration=f"{steps}st",
        per_device_batch_size=4,
        output_dir=output_dir,
        run_name=name,
        standard_callbacks=False,
        log_interval="1st",
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = {"loss": nn.MSELoss(), "optimizer": optimizer, "scheduler": lambda position: 1.0, "device": "cpu"}
    return Trainer(model, config, data, callbacks=callbacks, **settings | given)


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """`small_trainer` in the test's own directory; whatever else is installed takes no part, and nothing is synced."""
    monkeypatch.setenv("DRIVETRAIN_PLUGINS", "drivetrain-checkpoint")
    monkeypatch.setattr(Files, "fsync", lambda self, path: None)
    monkeypatch.setattr(Files, "fsync_dir", lambda self, path: None)
    return lambda *callbacks, **given: small_trainer(given.pop("output_dir", tmp_path), *callbacks, **given)
