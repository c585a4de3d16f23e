"""`compile = true`, with compilers that take no time: what is compiled, and what happens where it cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drivetrain import Precision, Trainer, TrainingConfig

DATA = TensorDataset(torch.randn(32, 6, generator=torch.Generator().manual_seed(1)), torch.ones(32, 1))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def train(model: nn.Module, **given: Any) -> Tensor:
    config = TrainingConfig(max_duration="4st", per_device_batch_size=8, standard_callbacks=False, device="cpu", **given)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Trainer(model, config, DATA, loss=nn.MSELoss(), optimizer=optimizer, precision=Precision()).train()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Choose the backend that torch.compile takes."""
    original = torch.compile

    def choose(backend: Any) -> None:
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", lambda function: original(function, backend=backend))

    return choose


@pytest.mark.parametrize("model", [Blocks, lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))])
def test_blocks_are_compiled_and_train_as_before(compiler: Any, model: Callable[[], nn.Module]) -> None:
    """Each repeated block, or the model where there are none; blocks of one class share the compiled code."""
    graphs: list[int] = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    compiler(backend)
    torch.manual_seed(0)
    plain = model()
    compiled = model()
    compiled.load_state_dict(plain.state_dict())
    expected = train(plain)
    assert not graphs
    assert torch.equal(train(compiled, compile=True), expected)
    assert 1 <= len(graphs) <= 3


def test_what_the_compiler_cannot_take_runs_as_it_is(compiler: Any) -> None:
    def broken(graph: Any, example_inputs: Any) -> Any:
        raise NotImplementedError("no such operation")

    compiler(broken)
    expected = train(Blocks())
    with pytest.warns(UserWarning, match=r"compile: Sequential runs uncompiled, BackendCompilerFailed.*") as said:
        found = train(Blocks(), compile=True)
    assert torch.equal(found, expected)
    assert len([w for w in said if "uncompiled" in str(w.message)]) == 3


def test_errors_of_the_model_itself_are_not_taken_for_the_compilers(compiler: Any) -> None:
    class Wrong(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, :5])

    compiler("eager")
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="mat1 and mat2"):
        warnings.simplefilter("ignore")
        train(Wrong(), compile=True)
