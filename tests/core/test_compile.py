"""`compile = true`, with compilers that take no time: what is compiled, what happens where it cannot be or has to be again, and where
compiled code is kept."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir, triton_cache_dir
from torch.utils.data import TensorDataset

from drivetrain import Precision, Trainer, TrainingConfig

CACHE = "TORCHINDUCTOR_CACHE_DIR"


def samples(count: int, *shape: int) -> TensorDataset:
    return TensorDataset(
        torch.randn(count, *shape, generator=torch.Generator().manual_seed(1)), torch.ones(count, *shape[:-1], 1)
    )


DATA = samples(32, 6)


class Blocks(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


class Mixed(Blocks):
    """Its first block gets fp32, the others bf16."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


class Stages(nn.Module):
    """Blocks of eight kinds, as convolutional networks have them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = [6, 7, 8, 9, 10]
        self.stages = nn.ModuleDict({str(i): self.stage(*widths[i : i + 2]) for i in range(4)})
        self.head = nn.Linear(10, 1)

    def stage(self, before: int, after: int) -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(width, after), nn.Tanh()) for width in (before, after, after)))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages.values():
            x = stage(x)
        return self.head(x)  # type: ignore[no-any-return]


def train(model: nn.Module, data: Any = DATA, eval_data: Any = None, **given: Any) -> Tensor:
    given = {"max_duration": "4st", **given}
    config = TrainingConfig(per_device_batch_size=8, standard_callbacks=False, device="cpu", **given)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Trainer(model, config, data, eval_data, loss=nn.MSELoss(), optimizer=optimizer, precision=Precision()).train()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache; the variable is put back as it was, whatever a run has made of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(CACHE, "")
    monkeypatch.delenv(CACHE)
    return tmp_path / "home"


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Choose the backend that torch.compile takes."""
    original = torch.compile

    def choose(backend: Any, **options: Any) -> None:
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", lambda function: original(function, backend=backend, **options))

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


# -- compiling again -------------------------------------------------------------------------------------------------------


def said(model: nn.Module, data: Any, eval_data: Any = None, **given: Any) -> list[str]:
    """What a compiled run warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, data, eval_data, compile=True, **{"max_duration": "3ep", **given})
    return [str(one.message) for one in caught if "compile:" in str(one.message)]


@pytest.mark.parametrize(("model", "log_interval"), [(Blocks, "1st"), (Blocks, "1000st"), (Mixed, "1st")])
def test_a_smaller_last_batch_is_told_once(compiler: Any, model: Callable[[], nn.Module], log_interval: str) -> None:
    compiler("eager")
    (message,) = said(model(), samples(20, 6), log_interval=log_interval)
    assert "compiled again" in message
    assert " s: tensor 'args[0]' size mismatch at index 0. expected 8, actual 4. " in message
    assert "drop_last" in message
    assert "compile = false" in message
    assert said(model(), samples(20, 6), dataloader={"drop_last": True}) == []


def test_each_cause_is_told(compiler: Any) -> None:
    compiler("eager")
    batches = [(torch.randn(8, length, 6), torch.ones(8, length, 1)) for length in (5, 5, 7, 9, 1)]
    lengths, single = said(
        Blocks(), [pair for x, y in batches for pair in zip(x, y, strict=True)], dataloader={"shuffle": False}
    )
    assert "size mismatch at index 1. expected 5, actual 7." in lengths  # and from then on the length is dynamic
    assert "2 <= args[0].size()[1]." in single


class Reads(nn.Linear):
    """A block with a number of Python that every step changes."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * y.sum().item()


def test_a_number_that_changes_is_not_taken_for_a_shape(compiler: Any) -> None:
    compiler("eager")
    messages = said(Reads(6, 1), samples(16, 6))
    assert messages
    for message in messages:
        assert " == " in message
        assert "(.item()) are compiled in: keep them in tensors, or set compile = false." in message
        assert "shape" not in message


@pytest.mark.parametrize("model", [Blocks, Mixed, Stages, lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))])
def test_what_any_run_compiles_is_not_told(
    compiler: Any, model: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    """Evaluation, with batches of its own size, and blocks that are not alike: nor does torch give up on them."""
    compiler("eager")
    assert said(model(), DATA, samples(12, 6), eval_interval="1ep", per_device_eval_batch_size=6, log_interval="1st") == []
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_runs_do_not_count_for_one_another(compiler: Any, caplog: pytest.LogCaptureFixture) -> None:
    compiler("eager")
    assert said(Blocks(), samples(20, 6))
    assert [said(Blocks(width), samples(16, width), max_duration="1ep") for width in range(6, 11)] == [[]] * 5
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_that_torch_gives_up_is_told(compiler: Any) -> None:
    compiler("eager", dynamic=False)
    batches = [(torch.randn(8, length, 6), torch.ones(8, length, 1)) for length in range(2, 14)]
    messages = said(Blocks(), [pair for x, y in batches for pair in zip(x, y, strict=True)], dataloader={"shuffle": False})
    assert len(messages) == 4
    assert "gives up and runs it uncompiled wherever no compiled version fits: tensor 'args[0]' size mismatch" in messages[-1]


def test_a_torch_without_such_records_trains_as_well(compiler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler("eager")
    monkeypatch.delattr("torch._dynamo.utils.get_compilation_metrics")
    assert said(Blocks(), samples(20, 6)) == []


# -- the cache -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, os.path.abspath(default_cache_dir())], ids=["unset", "torch's own"])
def test_compiled_code_is_kept_in_the_users_cache(compiler: Any, home: Path, before: str | None) -> None:
    compiler("eager")
    train(Blocks())
    assert not home.exists()
    os.environ.pop(CACHE, None)
    if before is not None:
        os.environ[CACHE] = before
    train(Blocks(), compile=True)
    kept = Path(os.environ[CACHE])
    assert kept.is_dir()
    assert kept.parent == home / "drivetrain" / "compile"
    assert kept.name.startswith(f"{torch.__version__}-")
    assert kept in Path(triton_cache_dir(0)).parents


def test_the_users_own_place_is_left(compiler: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(home.parent / "mine"))
    compiler("eager")
    train(Blocks(), compile=True)
    assert os.environ[CACHE] == str(home.parent / "mine")
    assert not home.exists()


def test_a_cache_that_cannot_be_written(compiler: Any, home: Path) -> None:
    home.write_text("no directory")
    compiler("eager")
    (message,) = said(Blocks(), DATA)
    assert str(home / "drivetrain" / "compile") in message
    assert "Not a directory" in message
    assert os.environ.get(CACHE, default_cache_dir()) == default_cache_dir()


TWICE = """
import json, torch
from torch._dynamo.utils import counters
from drivetrain import Precision, Trainer, TrainingConfig
torch.manual_seed(0)
blocks = (torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh()) for _ in range(2))
model = torch.nn.Sequential(torch.nn.Sequential(*blocks), torch.nn.Linear(6, 1))
data = torch.utils.data.TensorDataset(torch.ones(8, 6), torch.ones(8, 1))
config = TrainingConfig(max_duration="2st", per_device_batch_size=8, standard_callbacks=False, device="cpu", compile=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
Trainer(model, config, data, loss=torch.nn.MSELoss(), optimizer=optimizer, precision=Precision()).train()
found = counters["aot_autograd"]
print(json.dumps([found["autograd_cache_hit"], found["autograd_cache_miss"] + found["autograd_cache_bypass"]]))
"""


@pytest.mark.timeout(400)  # a C++ compiler takes its time
def test_another_process_compiles_nothing_anew(tmp_path: Path) -> None:
    def hits_and_misses(place: str) -> list[int]:
        environment = {name: value for name, value in os.environ.items() if name != CACHE}
        environment |= {"XDG_CACHE_HOME": str(tmp_path / place), "DRIVETRAIN_PLUGINS": "off"}
        done = subprocess.run([sys.executable, "-c", TWICE], env=environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    assert hits_and_misses("here") == [0, 2]
    assert hits_and_misses("here") == [2, 0]
    assert hits_and_misses("elsewhere") == [0, 2]
