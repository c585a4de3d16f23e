"""What blocks keep for backward, moved to host memory: on a machine without a GPU, with the CPU in the place of one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from drivetrain import Precision, Trainer, TrainingConfig
from drivetrain.activations import Offload


class Streams:
    """Stands in for torch.cuda and writes down what is done on which stream."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.current = "compute"

        class Stream:
            def __init__(self, device: Any, name: str = "copies") -> None:
                self.name = name

            def wait_stream(this, other: Any) -> None:
                self.said.append(f"{this.name} waits for {other.name}")

        self.Stream = Stream

    def current_stream(self, device: Any) -> Any:
        return self.Stream(device, self.current)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before


class Moving(Offload):
    """From a CPU to itself."""

    hosts = ()
    asynchronous = ()
    moved: ClassVar[list[tuple[int, ...]]]

    def _out(self, tensor: Tensor) -> Any:
        kept = super()._out(tensor)
        if isinstance(kept, tuple):
            self.moved.append(tuple(tensor.shape))
            kept = (kept[0].clone(), *kept[1:])  # to the CPU it already is on
        return kept


class Ahead(Moving):
    asynchronous = ("cpu",)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        loss: Tensor = self.head(x).square().mean()
        return loss


def trained(how: Any, compiled: bool = False, model: nn.Module | None = None) -> Tensor:
    data = list(torch.randn(128, 32, generator=torch.Generator().manual_seed(1)))
    config = TrainingConfig(
        max_duration="3st",
        per_device_batch_size=32,
        activation_checkpointing=how,
        compile=compiled,
        standard_callbacks=False,
        device="cpu",
    )
    model = model or Blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Trainer(model, config, data, optimizer=optimizer, precision=Precision()).train()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    found = Streams()
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: found.said.append(f"memory kept for {stream.name}"))
    return found


@pytest.mark.parametrize("kind", [Moving, Ahead])
def test_moved_activations_give_the_same_training(
    kind: type[Moving], streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trained(False)
    kind.moved = []
    monkeypatch.setattr("drivetrain.prepare.Offload", lambda: kind(streams))
    assert torch.equal(trained("offload"), plain)
    # of each block in each step: the layer's input, the dropout's mask, the tanh's output; the weight stays
    assert kind.moved == [(32, 32)] * 3 * 3 * 3
    if kind is Ahead:
        assert streams.said[:3] == ["copies waits for compute", "memory kept for copies", "copies waits for compute"]
        assert streams.said.count("compute waits for copies") == len(kind.moved)


def test_what_compiled_code_keeps_is_moved(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: original(function, backend="aot_eager"))
    plain, Moving.moved = trained(False, compiled=True), []
    monkeypatch.setattr("drivetrain.prepare.Offload", lambda: Moving(streams))
    assert torch.equal(trained("offload", compiled=True), plain)
    assert len(Moving.moved) >= 3 * 3 * 2


def test_a_number_that_comes_back_changed_is_seen(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""

    class Rounding(Moving):
        moved: ClassVar[list[tuple[int, ...]]] = []

        def _back(self, kept: Any) -> Tensor:
            return super()._back(kept).bfloat16().float()

    monkeypatch.setattr("drivetrain.prepare.Offload", lambda: Rounding(streams))
    assert not torch.equal(trained("offload"), trained(False))


def test_weights_views_of_them_and_small_tensors_stay() -> None:
    Moving.moved = []
    weight, offload = nn.Parameter(torch.randn(64, 64)), Moving()

    def forward(x: Tensor, scale: Tensor) -> Tensor:
        return x @ weight.t() * scale

    offload.around(forward)(torch.randn(64, 64, requires_grad=True), torch.ones(64, requires_grad=True)).sum().backward()
    assert Moving.moved == [(64, 64)] * 2, "the input and the product"


def test_on_a_cpu_nothing_moves() -> None:
    assert torch.equal(trained("offload"), trained(False))
    saved: list[Any] = []

    class Watched(Offload):
        def _out(self, tensor: Tensor) -> Any:
            saved.append(super()._out(tensor))
            return saved[-1]

    Watched().around(torch.tanh)(torch.randn(64, 64, requires_grad=True))
    assert [type(kept) for kept in saved] == [Tensor]


@pytest.mark.parametrize("how", [True, "selective", "offload"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_copy_of_the_model_computes_with_its_own_weights(
    how: Any, copied: Any, compiled: bool, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: original(function, backend="aot_eager"))
    monkeypatch.setattr("drivetrain.prepare.Offload", lambda: Moving(streams))
    Moving.moved, model = [], Blocks()
    trained(how, compiled, model)
    model.eval()
    x, other = torch.randn(4, 32), copied(model)
    expected = model(x)
    assert [type(block.forward) for block in other.layers] == [type(block.forward) for block in model.layers]
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.zero_()
    found = other(x)
    found.backward()
    assert torch.equal(found, expected)
    assert all(parameter.grad is not None for parameter in other.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_memory_is_saved_and_the_gradients_are_the_same() -> None:
    def gradients(offload: bool) -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        block = nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(16))).cuda()
        x = torch.randn(8192, 1024, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        forward = Offload().around(block) if offload else block
        out = forward(x).square().mean()
        held = torch.cuda.memory_allocated()
        out.backward()
        return [p.grad for p in block.parameters() if p.grad is not None], held

    (plain, before), (moved, after) = gradients(False), gradients(True)
    assert all(map(torch.equal, plain, moved))
    assert after < before / 2
