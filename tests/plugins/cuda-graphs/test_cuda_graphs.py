"""Recorded steps beside ordinary ones. Without a GPU, a recorder of torch's operations stands in for CUDA's: it repeats what was
recorded on the memory that was recorded, and runs no Python of the model, as a graph does."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import drivetrain_cuda_graphs
from drivetrain import Callback, CallbackContext, Loss, Precision, Trainer, TrainingConfig, component, make_component
from drivetrain_cuda_graphs import CudaGraphs
from drivetrain_cuda_graphs.recording import recorder_for
from drivetrain_testing import conformance

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Operations(TorchDispatchMode):
    """Notes every operation with its arguments and results, and repeats them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = function(*args, **(kwargs or {}))
        self.done.append((function, args, kwargs or {}, [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]))
        return result

    @torch.no_grad()
    def repeat(self) -> None:
        for function, args, kwargs, results in self.done:
            again = [x for x in tree_flatten(function(*args, **kwargs))[0] if isinstance(x, Tensor)]
            for old, new in zip(results, again, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)


class Recorder:
    """In place of the one for CUDA devices. What is recorded holds nothing before it is launched."""

    def __init__(self) -> None:
        self.warmed, self.recorded, self.launched = 0, 0, 0

    def warm_up(self, compute: Callable[[], Any]) -> Any:
        self.warmed += 1
        return compute()

    def record(self, compute: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.recorded += 1
        with Operations() as operations:
            result = compute()
        for _, _, _, results in operations.done:
            for tensor in results:
                if tensor._base is None and tensor.is_floating_point() and not tensor.is_leaf:
                    tensor.detach().fill_(float("nan"))

        def launch() -> None:
            self.launched += 1
            operations.repeat()

        return result, launch


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """A stand-in that records, and no run that falls back unnoticed."""
    made = Recorder()
    monkeypatch.setattr(drivetrain_cuda_graphs, "recorder_for", lambda device: made)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="cuda_graphs")
        yield made


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.last = nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 1)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.drop(torch.tanh(self.norm(self.first(x)))))
        return out


def rows(count: int = 24) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, generator=generator), torch.randn(1, generator=generator)) for _ in range(count)]


def trainer(*callbacks: Callback, model: nn.Module | None = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    given = {
        "max_duration": "12st",
        "standard_callbacks": False,
        "log_interval": "2st",
        "per_device_batch_size": 4,
        "device": "cpu",
    }
    parts = {name: options.pop(name) for name in ("precision", "loss", "data") if name in options}
    parts.setdefault("precision", Precision())
    config = TrainingConfig(**{**given, **options})
    optimizer = make_component("optimizer", {"use": "adamw", "lr": 0.01})
    data = parts.pop("data", None) or rows()
    parts.setdefault("loss", nn.MSELoss())
    return Trainer(model or Net(), config, data, optimizer=optimizer, callbacks=callbacks, **parts)


def assert_same(one: Trainer, other: Trainer) -> None:
    torch.testing.assert_close(dict(one.model.state_dict()), dict(other.model.state_dict()), rtol=0, atol=0)
    assert one.output.losses == other.output.losses


def both(recorder: Recorder, *callbacks: Callback, **options: Any) -> tuple[Trainer, Trainer]:
    """An ordinary run, and the same with graphs, which end alike."""
    plain, graphed = trainer(**options), trainer(*callbacks or (CudaGraphs(),), **options)
    plain.train()
    graphed.train()
    assert_same(plain, graphed)
    return plain, graphed


@conformance(CudaGraphs())
@pytest.mark.filterwarnings("ignore:cuda_graphs")
def test_conformance(check: Any) -> None:
    check()


class TestBits:
    def test_equal_those_of_ordinary_steps(self, recorder: Recorder) -> None:
        both(recorder)
        # three to warm up, two compared (one of which is recorded), seven launched
        assert (recorder.recorded, recorder.warmed, recorder.launched) == (1, 5, 9)

    def test_it_can_be_seen_when_they_are_not(self, recorder: Recorder) -> None:
        """The negative control: a graph that is given no batch repeats the one that was recorded."""
        plain, graphed = trainer(), trainer(CudaGraphs())
        plain.train()
        for step in graphed.steps():
            if step.number == 5:
                (recording,) = graphed.ctx.run.components[-1]._recordings.values()  # type: ignore[attr-defined]
                recording._inputs = [tensor.clone() for tensor in recording._inputs]
        with pytest.raises(AssertionError):
            assert_same(plain, graphed)

    @pytest.mark.parametrize("accumulation", [1, 3])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_microbatches(self, recorder: Recorder, accumulation: int, weighted: bool) -> None:
        def loss(outputs: Tensor, targets: Tensor) -> Loss:
            weights = (targets > 0).float() + 0.5
            return Loss((weights * (outputs - targets) ** 2).sum(), weights.sum())

        options: dict[str, Any] = {"loss": loss} if weighted else {}
        both(recorder, gradient_accumulation_steps=accumulation, per_device_batch_size=2, **options)
        assert recorder.recorded == 1

    def test_clipping_a_schedule_averages_and_a_metric(self, recorder: Recorder) -> None:
        ema = [make_component("callback", {"use": "ema", "use_at_end": True}) for _ in range(2)]
        plain = trainer(ema[0], max_grad_norm=0.1, scheduler="cosine", eval_interval=False)  # type: ignore[arg-type]
        graphed = trainer(ema[1], CudaGraphs(), max_grad_norm=0.1, scheduler="cosine", eval_interval=False)  # type: ignore[arg-type]
        plain.train()
        graphed.train()
        assert_same(plain, graphed)
        assert recorder.launched == 9

    def test_a_dictionary_in_bf16(self, recorder: Recorder) -> None:
        class Autocast(Precision):
            name, dtype = "bf16", torch.bfloat16

            def forward(self) -> Any:
                return torch.autocast("cpu", torch.bfloat16)

        class Named(Net):
            def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
                return {"loss": nn.functional.mse_loss(super().forward(x).float(), y)}

        torch.manual_seed(0)
        data = [{"x": x, "y": y} for x, y in rows()]
        plain, graphed = (
            trainer(*callbacks, model=model, data=data, precision=Autocast(), loss=None)
            for callbacks, model in (((), _seeded(Named)), ((CudaGraphs(),), _seeded(Named)))
        )
        plain.train()
        graphed.train()
        assert_same(plain, graphed)
        assert recorder.recorded == 1

    def test_each_shape_has_its_own(self, recorder: Recorder) -> None:
        both(recorder, data=rows(22), max_duration="30st", dataloader={"drop_last": False})
        assert recorder.recorded == 2

    def test_no_more_shapes_than_asked_for(self, recorder: Recorder) -> None:
        both(recorder, CudaGraphs(most=1), data=rows(22), max_duration="30st", dataloader={"drop_last": False})
        assert recorder.recorded == 1

    def test_a_second_sitting_and_a_resume(self, recorder: Recorder) -> None:
        whole = trainer()
        whole.train()
        graphed = trainer(CudaGraphs())
        for step in graphed.steps():
            if step.number == 7:
                break
        saved = graphed.state_dict()
        second = trainer(CudaGraphs())
        second.load_state_dict({**saved})
        second.train()
        torch.testing.assert_close(dict(second.model.state_dict()), dict(whole.model.state_dict()), rtol=0, atol=0)

    def test_moved_weights_are_recorded_anew(self, recorder: Recorder) -> None:
        @component
        class Move(Callback):
            def on_step_end(self, ctx: CallbackContext) -> None:
                if ctx.step == 8:
                    for parameter in ctx.model.parameters():
                        parameter.data = parameter.data.clone()

        both(recorder, CudaGraphs(), Move())
        assert recorder.recorded == 2

    def test_frozen_weights_are_recorded_anew(self, recorder: Recorder) -> None:
        @component
        class Freeze(Callback):
            def on_step_end(self, ctx: CallbackContext) -> None:
                if ctx.step == 8:
                    ctx.trainer.model.get_parameter("first.bias").requires_grad_(False)

        plain, graphed = trainer(Freeze()), trainer(CudaGraphs(), Freeze())
        plain.train()
        graphed.train()
        assert_same(plain, graphed)
        assert recorder.recorded == 2


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def fallen_back(recorder: Recorder, reason: str, *callbacks: Callback, **options: Any) -> None:
    """A run with graphs says why it has none, and ends as an ordinary one."""
    models = [options.pop("model", Net)] * 2
    plain, graphed = (
        trainer(*given, model=_seeded(make), **options)
        for given, make in zip((callbacks, (CudaGraphs(), *callbacks)), models, strict=True)
    )
    plain.train()
    with pytest.warns(UserWarning, match=rf"cuda_graphs: steps are launched kernel by kernel, since {reason}"):
        graphed.train()
    assert_same(plain, graphed)


class TestFallingBack:
    def test_without_a_cuda_device(self) -> None:
        fallen_back(Recorder(), "the device is cpu, not CUDA")

    def test_somebody_listens_in_between(self, recorder: Recorder) -> None:
        @component
        class Listener(Callback):
            def on_forward(self, ctx: CallbackContext) -> None: ...

        fallen_back(recorder, "callback:Listener listens to on_forward", Listener())
        assert recorder.warmed == 0

    def test_a_choice_by_a_value(self, recorder: Recorder) -> None:
        class Choosing(Net):
            def forward(self, x: Tensor) -> Tensor:
                out = super().forward(x)
                return out * 2 if x.sum() > 0 else out

        fallen_back(recorder, "recording failed: RuntimeError: operation not permitted", model=Choosing)

    @pytest.mark.parametrize("draw", [random.random, numpy.random.rand], ids=["python", "numpy"])
    def test_a_number_of_the_host(self, recorder: Recorder, draw: Callable[[], float]) -> None:
        """That a graph repeats: the second batch shows it."""

        class Drawing(Net):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * (1 + draw())

        fallen_back(recorder, r"a graph gave other gradients than the ordinary step, by 0\.\d+ of their size", model=Drawing)
        assert (recorder.recorded, recorder.launched) == (1, 2)

    def test_a_batch_that_is_read_on_the_host(self, recorder: Recorder) -> None:
        class Reading(Net):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * float(x.detach().numpy().std() + 1)

        fallen_back(recorder, "a graph gave other gradients", model=Reading)

    def test_gradients_that_are_no_numbers_say_nothing(self, recorder: Recorder) -> None:
        class Late(Net):
            calls = 0

            def forward(self, x: Tensor) -> Tensor:
                out = super().forward(x)
                return out * self.factor

            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("factor", torch.ones(()))

        @component
        class Spoil(Callback):
            def on_step_start(self, ctx: CallbackContext) -> None:
                ctx.trainer.model.factor.fill_(float("nan") if ctx.step in (3, 4) else 1.0)  # type: ignore[union-attr,operator]

            def on_clipped(self, ctx: CallbackContext) -> None:
                ctx.veto = bool(ctx.loss_tensor is not None and ctx.loss_tensor.isnan())

        plain, graphed = trainer(Spoil(), model=_seeded(Late)), trainer(CudaGraphs(), Spoil(), model=_seeded(Late))
        plain.train()
        graphed.train()
        torch.testing.assert_close(dict(plain.model.state_dict()), dict(graphed.model.state_dict()), rtol=0, atol=0)
        assert (recorder.recorded, recorder.warmed) == (1, 7)  # compared until two batches have given numbers


class Cuda:
    """Stands in for torch.cuda. As in torch, a recording that cannot be ended leaves its stream current and its pool open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
        self.ends, self.open, self.used = ends, False, 0
        self.device = torch.device("cuda", 3)
        self.current: Any = SimpleNamespace(name="compute", device=self.device)
        names = {"Stream": lambda device: SimpleNamespace(name="recording", device=device), "graph_pool_handle": lambda: (0, 7)}
        names |= {"CUDAGraph": SimpleNamespace, "current_stream": lambda device: self.current}
        names |= {"stream": self.stream, "graph": self.graph}
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        before, self.current, self.open, self.used = self.current, stream, True, self.used + 1
        try:
            yield
        finally:
            if not self.ends:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.end(3, pool)
            self.current = before
            graph.replay = lambda: None

    def end(self, device: int, pool: Any) -> None:
        if not self.open:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        assert (device, pool) == (3, (0, 7))
        self.open = False

    def release(self, device: int, pool: Any) -> None:
        self.used -= 1


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_a_recording_that_fails_leaves_stream_and_pool_as_they_were(
    ends: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute() -> int:
        assert made.current.name == "recording"
        if fails:
            raise ArithmeticError
        return 1

    made = Cuda(monkeypatch, ends)
    recorder: Any = recorder_for(made.device)
    if ends and not fails:
        assert recorder.record(compute)[0] == 1
    else:
        with pytest.raises(ArithmeticError if ends else RuntimeError):
            recorder.record(compute)
    assert made.current.name == "compute" and not made.open
    assert made.used == (1 if ends else 0), "torch counts those that have been ended, until the graph is gone"


def test_memory_is_given_back(recorder: Recorder) -> None:
    graphs = CudaGraphs()
    trainer(graphs).train()
    assert not graphs._recordings


@pytest.mark.parametrize("options", [{"warmup": 0}, {"most": 0}])
def test_options(options: dict[str, int]) -> None:
    with pytest.raises(Exception, match="must be at least 1, got 0"):
        CudaGraphs(**options)


@cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_on_a_gpu(precision: str, accumulation: int) -> None:
    ends = []
    for callbacks in ((), (CudaGraphs(),)):
        options = {"device": "cuda", "precision": make_component("precision", precision), "max_duration": "30st"}
        made = trainer(*callbacks, model=_seeded(Net), gradient_accumulation_steps=accumulation, **options)
        made.train()
        ends.append(made)
    torch.testing.assert_close(dict(ends[0].model.state_dict()), dict(ends[1].model.state_dict()), rtol=1e-4, atol=1e-4)
