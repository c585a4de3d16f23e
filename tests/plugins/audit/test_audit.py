"""Deliberately bad plugins, models and losses: each is named, with its line; and what is allowed is not."""

from __future__ import annotations

import builtins
import inspect
import io
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import drivetrain
from drivetrain import Callback, DrivetrainError, Precision, Trainer, TrainingConfig, component, hook
from drivetrain_audit import AuditCallback, Finding
from drivetrain_audit.watch import cuda_sync_warnings

HERE = Path(__file__).name
STEPS = 12
LOGGED = (4, 8, 12)
ORDINARY = [step for step in range(2, STEPS + 1) if step not in LOGGED]  # the first is left out


class Net(nn.Module):
    def __init__(self, bad: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line, self.bad = nn.Linear(3, 1), bad

    def forward(self, x: Tensor) -> Tensor:
        if self.bad is not None and self.training:
            self.bad(x)
        out: Tensor = self.line(x)
        return out


def rows() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(3), torch.randn(1)) for _ in range(4 * STEPS)]


def trainer(folder: Path, *callbacks: Callback, model: nn.Module | None = None, data: Any = None, **given: Any) -> Trainer:
    options = {name: given.pop(name) for name in list(given) if name in ("eval_interval", "log_interval", "max_duration")}
    config = TrainingConfig(
        **{"max_duration": "1ep", "log_interval": "4st", "eval_interval": False, **options},
        output_dir=folder,
        run_name="a",
        per_device_batch_size=4,
        standard_callbacks=False,
        device="cpu",
    )
    model = Net() if model is None else model
    given = {"loss": nn.MSELoss(), "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), **given}
    return Trainer(model, config, rows() if data is None else data, callbacks=callbacks, **given)


def audited(folder: Path, *callbacks: Callback, **given: Any) -> list[Finding]:
    audit = AuditCallback(show=False)
    trainer(folder, audit, *callbacks, **given).train()
    return audit.findings


def source_of(finding: Finding) -> str:
    assert Path(finding.place.file).name == HERE, finding
    return Path(__file__).read_text().splitlines()[finding.place.line - 1]


VALUE = torch.ones(3)
READS: dict[str, Callable[[], Any]] = {
    "item": lambda: VALUE[0].item(),
    "float": lambda: float(VALUE[0]),
    "bool": lambda: bool(VALUE[0]),
    "int": lambda: int(VALUE[0]),
    "range": lambda: range(VALUE.long()[0]),  # type: ignore[call-overload]
    "if": lambda: 1 if VALUE[0] > 0 else 0,
    "tolist": lambda: VALUE.tolist(),
    "cpu": lambda: VALUE.cpu(),
    "to_cpu": lambda: VALUE.to("cpu"),
    "to_cpu_by_name": lambda: VALUE.to(device="cpu"),
    "print": lambda: print(VALUE, file=io.StringIO()),
    "format": lambda: f"{VALUE[0]:.3f}",
    "mask": lambda: VALUE[VALUE > 0],
    "mask_assign": lambda: VALUE.clone().__setitem__(VALUE > 9, 0.0),
    "nonzero": lambda: VALUE.nonzero(),
    "where": lambda: torch.where(VALUE > 0),
    "equal": lambda: torch.equal(VALUE, VALUE),
    "unique": lambda: VALUE.unique(),
    "cuda_warning": lambda: warnings.warn("called a synchronizing CUDA operation", stacklevel=1),  # what torch says on a GPU
}
FINE: dict[str, Callable[[], Any]] = {
    "arithmetic": lambda: (VALUE * 2).sum().sqrt(),
    "index": lambda: VALUE[torch.tensor([0, 1])],
    "to_type": lambda: VALUE.to(torch.float64),
    "to_device": lambda: VALUE.to(torch.device("cpu"), non_blocking=True),
    "shape": lambda: (VALUE.shape[0], len(VALUE), VALUE.numel()),
    "masked": lambda: torch.where(VALUE > 0, VALUE, -VALUE).any(),
    "memory": lambda: io.StringIO().write("x"),
    "reading a file": lambda: Path(__file__).read_bytes()[:0],
    "nowhere": lambda: open(os.devnull, "w").close(),
    "terminal": lambda: print("x"),
}


@component
class Does(Callback):
    """Does one thing in one event, on the steps given."""

    what: Any
    event: str = "on_step_end"
    steps: Any = None

    def _do(self, event: str, ctx: Any) -> None:
        if event == self.event and (self.steps is None or ctx.step in self.steps):
            self.what()

    def on_step_start(self, ctx: Any) -> None:
        self._do("on_step_start", ctx)

    def on_gradients(self, ctx: Any) -> None:
        self._do("on_gradients", ctx)

    def on_step_end(self, ctx: Any) -> None:
        self._do("on_step_end", ctx)

    def on_log(self, ctx: Any) -> None:
        self._do("on_log", ctx)

    def on_evaluate_end(self, ctx: Any) -> None:
        self._do("on_evaluate_end", ctx)


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("event", ["on_step_start", "on_gradients", "on_step_end"])
def test_a_reading_is_named(tmp_path: Path, name: str, event: str) -> None:
    (found,) = audited(tmp_path, Does(what=READS[name], event=event))
    assert (found.kind, found.place.plugin, found.place.event) == ("reads a tensor", "callback:Does", event)
    assert source_of(found).strip().startswith(f'"{name}":')
    assert (found.times, found.steps, found.first, found.last) == (len(ORDINARY), len(ORDINARY), ORDINARY[0], ORDINARY[-1])


def test_numpy_is_a_reading(tmp_path: Path) -> None:
    pytest.importorskip("numpy")
    (found,) = audited(tmp_path, Does(what=lambda: VALUE.numpy()))
    assert found.what == "numpy()"


@pytest.mark.parametrize("name", FINE)
def test_what_does_not_wait_is_not_named(tmp_path: Path, name: str) -> None:
    assert audited(tmp_path, Does(what=FINE[name])) == []


def test_the_loss_of_the_context(tmp_path: Path) -> None:
    @component
    class Reads(Callback):
        def on_step_end(self, ctx: Any) -> None:
            _ = ctx.loss_tensor, ctx.lr, ctx.step, ctx.position
            assert ctx.loss > 0  # this line

    (found,) = audited(tmp_path, Reads())
    assert "# this line" in source_of(found)


@pytest.mark.parametrize("event", ["on_log", "on_evaluate_end"])
def test_where_reading_is_allowed(tmp_path: Path, event: str) -> None:
    done: list[int] = []
    what = lambda: done.append(int(VALUE[0].item()))  # noqa: E731
    options = {"eval_interval": "3st", "eval_dataset": rows()}
    assert audited(tmp_path, Does(what=what, event=event), **options) == []
    assert len(done) >= 3


def test_a_period_of_its_own_is_allowed(tmp_path: Path) -> None:
    done: list[int] = []

    @component
    class Now(Callback):
        every: str = "2st"

        def on_every(self, ctx: Any) -> None:
            done.append(int(ctx.loss > 0))
            (ctx.run_dir / "x").write_text("x")

    assert audited(tmp_path, Now()) == []
    assert len(done) == STEPS // 2


def test_a_step_that_logs_saves_or_evaluates_is_not_ordinary(tmp_path: Path) -> None:
    @component
    class Saves(Callback):
        every: str = "5st"

        def on_every(self, ctx: Any) -> None:
            ctx.checkpoint_saved(tmp_path)

    busy = {*LOGGED, 5, 10, 3, 6, 9}
    options = {"eval_interval": "3st", "eval_dataset": rows()}
    (found,) = audited(tmp_path, Saves(), Does(what=READS["item"]), **options)
    assert found.steps == STEPS - 1 - len(busy)
    assert audited(tmp_path, Saves(), Does(what=READS["item"], steps={*busy, 1}), **options) == []


def test_no_ordinary_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, AuditCallback(), Does(what=READS["item"]), log_interval="1st").train()
    assert "no ordinary step was seen" in capsys.readouterr().err


def test_files(tmp_path: Path) -> None:
    kept = (tmp_path / "kept").open("w")
    (tmp_path / "moved").touch()

    def moves() -> None:
        os.replace(tmp_path / "moved", tmp_path / "moved")

    for what, name in (
        (lambda: (tmp_path / "new").write_text("x"), "open new"),
        (lambda: open(tmp_path / "more", "ab").close(), "open more"),
        (lambda: os.close(os.open(tmp_path / "raw", os.O_WRONLY | os.O_CREAT)), "open raw"),
        (lambda: kept.write("x"), "write()"),
        (lambda: print("x", file=kept), "print(file=…)"),
        (moves, "rename moved"),
    ):
        found = audited(tmp_path, Does(what=what))
        assert [f.what for f in found][:1] == [name]
        assert {(f.kind, f.place.plugin, Path(f.place.file).name) for f in found} == {("writes a file", "callback:Does", HERE)}
    kept.close()


def test_another_threads_work_is_not_the_steps(tmp_path: Path) -> None:
    def elsewhere() -> None:
        def work() -> None:
            (tmp_path / "x").write_text("x")
            VALUE.tolist()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    assert audited(tmp_path, Does(what=elsewhere)) == []


def test_collectives(tmp_path: Path) -> None:
    @component
    class Talks(Callback):
        def on_step_end(self, ctx: Any) -> None:
            ctx.strategy.sum(VALUE)  # sum
            ctx.strategy.gather(1)  # gather
            ctx.strategy.barrier()  # barrier

    found = audited(tmp_path, Talks())
    assert {(f.kind, f.what) for f in found} == {("collective", f"strategy.{n}()") for n in ("sum", "gather", "barrier")}
    assert all(f"# {f.what[9:-2]}" in source_of(f) for f in found)


@pytest.mark.filterwarnings("ignore")
def test_collectives_of_torch(tmp_path: Path) -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        (found,) = audited(tmp_path, Does(what=lambda: dist.all_reduce(VALUE)))
        assert (found.kind, found.what, found.place.plugin) == ("collective", "allreduce", "callback:Does")
        assert audited(tmp_path, model=Net(lambda x: dist.all_reduce(x.clone()))) == [], "the model's own are the training"
    finally:
        dist.destroy_process_group()


def test_model_and_loss_and_step_function(tmp_path: Path) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        value = (outputs - targets).square().mean()
        assert value.item() >= 0  # the loss
        return value

    def whole(model: Any, batch: Any) -> Tensor:
        value: Tensor = (model(batch[0]) - batch[1]).square().mean()
        assert value < 1e9  # the step
        return value

    model = Net(lambda x: x.sum().item())  # the model
    by_plugin = {f.place.plugin: f for f in audited(tmp_path, model=model, loss=loss)}
    assert set(by_plugin) == {"model", "loss"}
    assert "# the model" in source_of(by_plugin["model"])
    assert "# the loss" in source_of(by_plugin["loss"])
    (found,) = audited(tmp_path, step=whole, loss=None)
    assert found.place.plugin == "model"
    assert "# the step" in source_of(found)


def test_a_hook_of_autograd_is_the_models(tmp_path: Path) -> None:
    model = Net()
    model.line.weight.register_hook(lambda grad: print(grad.norm().item(), file=io.StringIO()))
    (found,) = audited(tmp_path, model=model)
    assert (found.place.plugin, found.what) == ("model", "item()")


def test_optimizer_precision_and_scheduler(tmp_path: Path) -> None:
    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            assert self.param_groups[0]["params"][0].grad.norm() < 1e9  # the optimizer
            return super().step(closure)

    class Scaled(Precision):
        scales = True

        def scale(self, loss: Tensor) -> Tensor:
            loss.tolist()  # the precision
            return loss * 2

        def unscale(self, optimizer: Any) -> None:
            pass

        def step(self, optimizer: Any) -> bool:
            optimizer.step()
            return True

    model = Net()
    optimizer = Own(model.parameters(), lr=0.01)
    found = audited(
        tmp_path, model=model, optimizer=optimizer, precision=Scaled(), scheduler=lambda position: VALUE.sum().item()
    )
    by_plugin = {f.place.plugin: source_of(f) for f in found}
    assert set(by_plugin) == {"optimizer", "precision", "scheduler"}
    assert all(f"# the {name}" in line for name, line in by_plugin.items() if name != "scheduler")


def test_the_step_counters_of_torchs_optimizers_are_on_the_host(tmp_path: Path) -> None:
    model = Net()
    found = audited(tmp_path, model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False))
    assert found == []


def test_the_data_may_read(tmp_path: Path) -> None:
    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 4 * STEPS

        def __getitem__(self, index: int) -> Any:
            VALUE.tolist()
            return rows()[index]

    assert audited(tmp_path, data=Rows()) == []


def test_a_run_under_audit_has_the_same_bits_and_leaves_nothing_behind(tmp_path: Path) -> None:
    before = {name: inspect.getattr_static(Tensor, name) for name in ("item", "tolist", "__float__", "__repr__", "to")}
    printer, shower, filters = builtins.print, warnings.showwarning, list(warnings.filters)
    plain = trainer(tmp_path)
    plain.train()
    run = trainer(tmp_path, AuditCallback(show=False), Does(what=READS["item"]))
    steps = run.steps()
    next(steps)
    assert inspect.getattr_static(Tensor, "item") is not before["item"], "negative control"
    for _ in steps:
        pass
    assert torch.equal(run.model.line.weight, plain.model.line.weight)  # type: ignore[union-attr, arg-type]
    assert {name: inspect.getattr_static(Tensor, name) for name in before} == before
    assert (builtins.print, warnings.showwarning, list(warnings.filters)) == (printer, shower, filters)
    assert sys.getprofile() is None and not any(map(callable, vars(run.ctx.strategy).values()))


@pytest.mark.parametrize("event", ["on_run_start", "on_gradients", "on_step_end"])
def test_a_run_that_fails_leaves_nothing_behind(tmp_path: Path, event: str) -> None:
    @component
    class Fails(Callback):
        def on_run_start(self, ctx: Any) -> None:
            assert event != "on_run_start"

        def on_gradients(self, ctx: Any) -> None:
            assert event != "on_gradients" or ctx.step < 3

        def on_step_end(self, ctx: Any) -> None:
            assert event != "on_step_end" or ctx.step < 3

    before = vars(Tensor).get("item")
    with pytest.raises(AssertionError):
        trainer(tmp_path, AuditCallback(show=False, fail=True), Fails(), Does(what=READS["item"])).train()
    assert vars(Tensor).get("item") is before
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0
    assert sys.getprofile() is None


def test_two_runs_in_turn_do_not_meet(tmp_path: Path) -> None:
    good, bad = AuditCallback(show=False), AuditCallback(show=False)
    one, other = trainer(tmp_path, good), trainer(tmp_path, bad, Does(what=READS["item"]))
    for _ in zip(one.steps(), other.steps(), strict=True):
        pass
    assert good.findings == []
    assert [f.steps for f in bad.findings] == [len(ORDINARY)]
    assert "item" not in vars(Tensor)


def test_the_sync_debug_mode_is_on_within_a_step_on_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for torch's two functions; what it reports is a warning, as in `READS` above."""
    modes: list[Any] = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with cuda_sync_warnings(torch.device("cpu")):
        assert modes == [0]
    with cuda_sync_warnings(torch.device("cuda")):
        assert modes == [0, "warn"]
    assert modes == [0, "warn", 0]


def test_the_callers_own_loop_may_read(tmp_path: Path) -> None:
    audit = AuditCallback(show=False)
    for step in trainer(tmp_path, audit).steps():
        assert step.loss >= 0
    assert audit.findings == []


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    trainer(tmp_path, AuditCallback(), Does(what=READS["item"])).train()
    title, header, row = capsys.readouterr().err.splitlines()
    assert title == f"audit: 1 finding on {len(ORDINARY)} ordinary steps, which neither log nor evaluate nor save"
    assert header.split() == ["plugin", "where", "what", "times", "on", "steps"]
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if text.strip().startswith('"item":'))
    assert row.split() == f"callback:Does {HERE}:{line} in on_step_end reads a tensor: item() 8 2–11 (8)".split()
    trainer(tmp_path, AuditCallback()).train()
    assert capsys.readouterr().err == (
        f"audit: nothing waited for the device, wrote a file or called a collective on {len(ORDINARY)} ordinary steps\n"
    )


def test_fail(tmp_path: Path) -> None:
    run = trainer(tmp_path, AuditCallback(show=False, fail=True), Does(what=READS["tolist"]))
    with pytest.raises(
        DrivetrainError, match=r"the audit has 1 finding:\n  callback:Does \(.*reads a tensor, tolist\(\); 8 times"
    ):
        run.train()
    assert run.ctx.step == STEPS, "the run was complete"
    trainer(tmp_path, AuditCallback(show=False, fail=True)).train()


def test_several_wrappers_of_listeners(tmp_path: Path) -> None:
    """Another component that times listeners takes part as well."""
    calls: list[str] = []

    @component
    class Times(Callback):
        def make_listener_wrapper(self, ctx: Any) -> Any:
            def wrap(call: Any, event: str, thing: Any) -> Any:
                def timed(ctx: Any) -> None:
                    calls.append(f"{thing.plugin_name}.{event}")
                    call(ctx)

                return timed

            return wrap

        @hook(trylast=True)
        def on_step_end(self, ctx: Any) -> None:
            pass

    for order in (0, 1):
        calls.clear()
        audit = AuditCallback(show=False)
        first = [Times(), audit] if order else [audit, Times()]
        trainer(tmp_path, *first, Does(what=READS["item"])).train()
        assert [f.place.plugin for f in audit.findings] == ["callback:Does"]
        assert calls.count("callback:Does.on_step_end") == STEPS
    assert drivetrain.registry.is_installed("callback", "audit")
