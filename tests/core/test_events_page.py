"""The written contract of events and of the context, docs/events.md, against what runs do."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drivetrain import Callback, CallbackContext, Strategy, Trainer, TrainingConfig, component
from drivetrain.hookspecs import EVENTS, OF_EACH_STEP

DOCS = Path(__file__).parents[2] / "docs"
COLLECTIVES = ("sum", "gather", "barrier", "reduce_gradients")
COLLECTIVES += ("model_state", "load_model_state", "optimizer_state", "load_optimizer_state")  # of sharded weights


@pytest.fixture(scope="module")
def made() -> Any:
    spec = importlib.util.spec_from_file_location("make_events", DOCS / "make_events.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Counting(Strategy):
    """One process that counts what is, or may be, a collective."""

    def __init__(self) -> None:
        self.calls = 0

    def __getattribute__(self, name: str) -> Any:
        if name in COLLECTIVES:
            self.calls += 1
        return super().__getattribute__(name)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    rows = [(torch.randn(3), torch.randn(1)) for _ in range(32)]
    given = {"max_duration": "2ep", "log_interval": "4st", "per_device_batch_size": 2, "gradient_accumulation_steps": 2}
    config = TrainingConfig(**{**given, **options}, output_dir=folder, run_name="a", standard_callbacks=False, device="cpu")
    return Trainer(
        model,
        config,
        rows,
        rows[:6],
        loss=nn.MSELoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
        callbacks=callbacks,
        strategy=Counting(),
    )


def test_the_page_is_what_the_code_says(made: Any) -> None:
    assert made.PAGE.read_text(encoding="utf-8") == made.page(), "run: python docs/make_events.py"


def test_the_page_names_everything(made: Any) -> None:
    events, context = made.page().split("## What `ctx` has")
    assert re.findall(r"^\| `(on_\w+)` \|", events, re.MULTILINE) == list(EVENTS)
    ctx = trainer(Path()).ctx
    public = {name for name in [*dir(CallbackContext), *vars(ctx), *CallbackContext.__annotations__] if name[0] != "_"}
    assert set(re.findall(r"^\| `(\w+)", context, re.MULTILINE)) == public - set(made.NOT_SHOWN)
    assert not re.findall(r"^\| `\w+\S*` \|  \|", context, re.MULTILINE), "each has a word about it"


def test_events_come_in_the_order_of_the_page(tmp_path: Path, made: Any) -> None:
    seen: list[str] = []

    def listener(event: str) -> Callable[[Any, Any], None]:
        return lambda self, ctx: seen.append(event)

    recorder = component(type("Recorder", (Callback,), {name: listener(name) for name in EVENTS} | {"every": "4st"}))()
    trainer(tmp_path, recorder, eval_interval="4st", max_duration="1ep").train()
    step = [*OF_EACH_STEP[:1], *OF_EACH_STEP[1:5] * 2, *OF_EACH_STEP[5:]]  # two microbatches
    due = ["on_log", "on_evaluate_start", *["on_evaluate_batch"] * 3, "on_evaluate_end", "on_every"]
    expected = ["on_restore", "on_run_start", "on_epoch_start", *(step * 4 + due) * 2, "on_epoch_end", "on_run_end"]
    assert seen == expected
    block = re.search(r"```text\n(.*?)```", made.page(), re.DOTALL)
    assert block is not None
    written = list(dict.fromkeys(re.findall(r"on_\w+", block[1])))
    assert [event for event in written if event in seen] == list(dict.fromkeys(expected))
    assert set(written) == set(EVENTS)


# How each method is called, in on_step_end unless said otherwise; attributes are read.
CALLS: dict[str, Callable[[Any], Any]] = {
    "position_in": lambda ctx: ctx.position_in("ep"),
    "position_of": lambda ctx: ctx.position_of("50%"),
    "log": lambda ctx: ctx.log({"a": ctx.loss_tensor}),
    "show": lambda ctx: ctx.show("text", "a", "b"),
    "stop": lambda ctx: ctx.stop("enough"),
    "go_back": lambda ctx: setattr(ctx, "_back_to", ctx.go_back({})),
    "checkpoint_saved": lambda ctx: ctx.checkpoint_saved(Path("x")),
    "state_dict": lambda ctx: ctx.state_dict(),
    "load_state_dict": lambda ctx: ctx.load_state_dict(ctx.state_dict()),
    "gradients_of": lambda ctx: ctx.gradients_of(),
    "loss_of": lambda ctx: ctx.loss_of(ctx.batch),
    "rehearsal": lambda ctx: _rehearse(ctx),
    "resize": lambda ctx: ctx.resize(1),
}
EVENT_OF = {"rehearsal": "on_run_start", "resize": "on_run_start", "gradients_of": "on_optimizer_step"}


def _rehearse(ctx: Any) -> None:
    with ctx.rehearsal() as step:
        step()


def _names() -> list[str]:
    return [name for name in dict.fromkeys([*CallbackContext.__annotations__, *vars(CallbackContext)]) if name[0] != "_"]


@pytest.mark.parametrize("name", _names())
def test_what_the_context_costs(tmp_path: Path, made: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Reading or calling it waits for the device (reads a tensor) or calls a collective exactly where the page says so."""
    reads: list[str] = []
    found: list[tuple[int, int, bool]] = []
    for reader in ("item", "tolist", "__float__", "__bool__", "__int__", "__index__", "cpu", "numpy"):
        original = getattr(Tensor, reader)

        def spy(self: Tensor, *args: Any, _original: Any = original, _name: str = reader) -> Any:
            reads.append(_name)
            return _original(self, *args)

        monkeypatch.setattr(Tensor, reader, spy)

    def look(self: Any, ctx: Any) -> None:
        if found:
            return
        reads.clear()
        ctx.strategy.calls, had = 0, ctx.trainer.has_run_dir
        CALLS.get(name, lambda ctx: getattr(ctx, name))(ctx)
        found.append((len(reads), ctx.strategy.calls, ctx.trainer.has_run_dir and not had))

    looker = component(type("Looker", (Callback,), {EVENT_OF.get(name, "on_step_end"): look}))()
    trainer(tmp_path, looker, max_duration="4st").train()
    cost = made.COSTS.get(name, "free")
    ((waits, collectives, folder),) = found
    assert bool(waits) == cost.startswith(made.SYNC)
    assert bool(collectives) == (made.COLLECTIVE in cost)
    assert folder == (name == "run_dir")


def test_the_loss_is_read_once_a_step_and_a_rate_only_from_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    for reader in ("item", "__float__"):
        original = getattr(Tensor, reader)
        monkeypatch.setattr(Tensor, reader, lambda self, _original=original: (reads.append("x"), _original(self))[1])

    @component
    class Reads(Callback):
        def on_step_end(self, ctx: Any) -> None:
            for counted, value in ((1, "loss"), (0, "loss"), (0, "lr")):
                reads.clear()
                getattr(ctx, value)
                assert len(reads) == counted

    run = trainer(tmp_path, Reads())
    assert run.train().steps == 16
    run.ctx.optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    assert run.ctx.lr == 0.5
    assert reads
