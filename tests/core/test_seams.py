"""What watching plugins stand on: vetoed updates, windows left out, the way back, rehearsals, wrapped listeners."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from drivetrain import Callback, DataError, Precision, Trainer, TrainingConfig, at_hand, component, hook


def trainer(
    folder: Path, *callbacks: Any, fused: bool = False, optimizer: Any = None, data: Any = None, **options: Any
) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    rows = [(torch.randn(2), torch.randn(1)) for _ in range(24)]
    data = rows if data is None else data
    given = {
        "max_duration": "1ep",
        "per_device_batch_size": 2,
        "log_interval": "4st",
        "standard_callbacks": False,
        "device": "cpu",
    }
    config = TrainingConfig(**{**given, "output_dir": folder, **options})
    made = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused) if optimizer is None else optimizer(model.parameters())
    return Trainer(model, config, data, loss=nn.MSELoss(), optimizer=made, callbacks=callbacks, precision=Precision())


def weights(ctx: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in ctx.model.parameters()]).clone()


@component
class Veto(Callback):
    """Vetoes some steps; notes the weights after each."""

    steps: list[int]
    number: bool = False

    def __attrs_post_init__(self) -> None:
        self.after: dict[int, Tensor] = {}

    def on_run_start(self, ctx: Any) -> None:
        self.after[0] = weights(ctx)

    def on_clipped(self, ctx: Any) -> None:
        vetoed = ctx.step + 1 in self.steps
        ctx.veto = vetoed if self.number else torch.tensor(3.0 * vetoed)

    def on_step_end(self, ctx: Any) -> None:
        self.after[ctx.step] = weights(ctx)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("given", ["a bool", "at hand", "on a device"])
def test_a_vetoed_update_changes_nothing_and_counts(
    tmp_path: Path, fused: bool, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given == "on a device":
        monkeypatch.setattr(at_hand, "__code__", (lambda value: None).__code__)
    veto = Veto(steps=[1, 5], number=given == "a bool")
    run = trainer(tmp_path, veto, fused=fused)
    assert run.train().steps == 12
    assert {int(state["step"]) for state in run.ctx.optimizer.state.values()} == {10}
    assert {step for step in range(1, 13) if torch.equal(veto.after[step], veto.after[step - 1])} == {1, 5}


def test_a_window_left_out_is_no_step(tmp_path: Path) -> None:
    @component
    class Leave(Callback):
        def on_run_start(self, ctx: Any) -> None:
            ctx.left_out |= {(0, 0), (0, 4), (0, 11)}

    run = trainer(tmp_path, Leave())
    assert run.train().steps == 9
    assert (run.ctx.skipped_steps, run.ctx.samples, run.ctx.epoch) == (3, 18, 1)


@component
class Back(Callback):
    """Goes back once from a logging step to an earlier one."""

    at: int
    to: int

    def __attrs_post_init__(self) -> None:
        self.saved: Any = None
        self.seen: list[int] = []

    def on_step_end(self, ctx: Any) -> None:
        self.seen.append(ctx.step)
        if ctx.step == self.to and self.saved is None:
            self.saved = copy.deepcopy(ctx.state_dict())

    @hook(tryfirst=True)
    def on_log(self, ctx: Any) -> None:
        if ctx.step == self.at and self.seen.count(self.at) == 1:
            ctx.go_back(self.saved)


@pytest.mark.parametrize(("at", "to"), [(8, 4), (8, 8), (16, 8), (24, 8), (16, 12)])
def test_going_back_and_on_again_is_as_if_nothing_had_been(tmp_path: Path, at: int, to: int) -> None:
    """Within an epoch, over its end, to its end, and from the end of the run."""
    back, heard = Back(at=at, to=to), []

    @component
    class Hear(Callback):
        def on_log(self, ctx: Any) -> None:
            heard.append(ctx.step)

    run, alone = trainer(tmp_path, back, Hear(), max_duration="2ep"), trainer(tmp_path, max_duration="2ep")
    assert run.train().losses == alone.train().losses
    assert back.seen == [*range(1, at + 1), *range(to + 1, 25)]
    assert heard[at // 4 - 1] == at, "the others hear of the log before the way back"
    assert torch.equal(weights(run.ctx), weights(alone.ctx))
    assert (run.ctx.step, run.ctx.samples, run.output.completed) == (24, 48, True)


def test_a_rehearsal_leaves_no_trace(tmp_path: Path) -> None:
    @component
    class Rehearse(Callback):
        def on_run_start(self, ctx: Any) -> None:
            before = weights(ctx)
            with ctx.rehearsal() as step:
                losses = [step().item() for _ in range(15)]
                assert not torch.equal(weights(ctx), before)
            assert len(set(losses)) == 15
            assert torch.equal(weights(ctx), before) and ctx.step == 0

    run, alone = trainer(tmp_path, Rehearse()), trainer(tmp_path)
    assert run.train().losses == alone.train().losses


@dataclass
class _Record:
    updates: Tensor = field(default_factory=lambda: torch.zeros(()))


class _Inner(torch.optim.Optimizer):
    """Two optimizers behind one, whose state is theirs; it counts its steps itself, once more in a record, and draws numbers."""

    def __init__(self, parameters: Any) -> None:
        first, *others = list(parameters)
        self.parts = [torch.optim.AdamW([first], lr=0.1), torch.optim.SGD(others, lr=0.1, momentum=0.9)]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.updates, self.record, self.generator = 0, [_Record()], torch.Generator()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.updates += 1
        self.record[0].updates += 1.0
        for group in self.param_groups:
            group["lr"] = 0.1 * float(torch.rand((), generator=self.generator)) / self.updates / float(self.record[0].updates)
        for part in self.parts:
            part.step()
        for part in self.parts:
            self.state.update(part.state)


def test_a_rehearsal_puts_back_an_optimizer_that_keeps_its_state_elsewhere(tmp_path: Path) -> None:
    def run(rehearses: bool) -> Trainer:
        @component
        class Rehearse(Callback):
            def on_run_start(self, ctx: Any) -> None:
                for _ in range(2 * rehearses):
                    with ctx.rehearsal() as step:
                        step(), step()

        made = trainer(tmp_path, Rehearse(), optimizer=_Inner)
        made.train()
        made.train()
        return made

    assert torch.equal(weights(run(True).ctx), weights(run(False).ctx))


class _Stream(IterableDataset[Any]):
    """Samples that a new iterator gives anew, or one iterator for good."""

    def __init__(self, size: int, *, once: bool) -> None:
        self.size = size
        self.only = self._samples() if once else None

    def _samples(self) -> Iterator[Any]:
        return ((torch.full((2,), float(number)), torch.zeros(1)) for number in range(self.size))

    def __iter__(self) -> Iterator[Any]:
        return self._samples() if self.only is None else self.only


def rehearsed(folder: Path, data: Any, steps: int, **options: Any) -> list[float]:
    """The first number of each batch of a run of three steps, before which some others are rehearsed."""
    seen: list[float] = []

    @component
    class Rehearse(Callback):
        def on_run_start(self, ctx: Any) -> None:
            if steps:
                with ctx.rehearsal() as step:
                    for _ in range(steps):
                        step()

        def on_batch(self, ctx: Any) -> None:
            seen.append(float(ctx.batch[0][0, 0]))

    trainer(folder, Rehearse(), data=data, max_duration="3st", **options).train()
    return seen


@pytest.mark.parametrize("kind", ["an iterator", "a stream of one", "a loader of one"])
def test_a_rehearsal_does_not_take_samples_that_are_given_once(tmp_path: Path, kind: str) -> None:
    def once() -> Any:
        data = _Stream(24, once=True)
        return {"an iterator": data.only, "a stream of one": data, "a loader of one": DataLoader(data, batch_size=2)}[kind]

    assert rehearsed(tmp_path, once(), steps=0) == [0.0, 2.0, 4.0]
    with pytest.raises(DataError, match="an iterator gives each sample once"):
        rehearsed(tmp_path, once(), steps=2)


def test_a_rehearsal_reads_a_stream_that_begins_anew(tmp_path: Path) -> None:
    assert rehearsed(tmp_path, _Stream(24, once=False), steps=15) == [0.0, 2.0, 4.0], "over its end"
    worker = {"dataloader": {"num_workers": 1}}  # reads a copy
    assert rehearsed(tmp_path, _Stream(24, once=False), steps=2, **worker) == [0.0, 2.0, 4.0]
    with pytest.raises(DataError, match="gave no batch"):
        rehearsed(tmp_path, _Stream(0, once=False), steps=1)


def test_a_rehearsal_puts_back_a_learning_rate_that_is_a_tensor(tmp_path: Path) -> None:
    rate = torch.tensor(0.1)

    @component
    class Rehearse(Callback):
        def on_run_start(self, ctx: Any) -> None:
            with ctx.rehearsal() as step:
                ctx.optimizer.param_groups[0]["lr"].fill_(7.0)
                step()

    run = trainer(tmp_path, Rehearse(), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=rate), scheduler=None)
    run.train()
    assert run.ctx.optimizer.param_groups[0]["lr"] is rate, "whoever holds it goes on steering the optimizer"
    assert float(rate) == pytest.approx(0.1)


@pytest.mark.parametrize("event", ["on_gradients", "on_clipped"])
def test_a_run_that_goes_on_after_a_failed_step_has_nothing_left_of_it(tmp_path: Path, event: str) -> None:
    """Neither its gradients nor its veto."""

    @component
    class Fail(Callback):
        done: bool

        def _once(self, ctx: Any) -> None:
            if ctx.step == 2 and not self.done:
                self.done, ctx.veto = True, True
                raise ValueError("on purpose")

    setattr(Fail, event, Fail._once)
    failing, alone = trainer(tmp_path, Fail(done=False)), trainer(tmp_path, Fail(done=True))
    random: list[Any] = []
    with pytest.raises(ValueError, match="on purpose"):
        for step in failing.steps():
            if step.number == 2:
                random = [copy.deepcopy(failing.state_dict()["rng"])]
    failing.load_state_dict({**failing.state_dict(), "rng": random[0]})  # dropout has drawn in the step that failed
    failing.train()
    alone.train()
    assert torch.equal(weights(failing.ctx), weights(alone.ctx))


def test_a_wrapper_stands_between_the_loop_and_every_listener(tmp_path: Path) -> None:
    calls: list[tuple[str, str]] = []

    @component
    class Trace(Callback):
        def make_listener_wrapper(self, ctx: Any) -> Any:
            def wrap(call: Any, event: str, thing: Any) -> Any:
                def traced(ctx: Any) -> None:
                    calls.append((event, thing.plugin_name))
                    call(ctx)

                return traced

            return wrap

    trainer(tmp_path, Trace(), Veto(steps=[]), max_duration="1st").train()
    assert calls == [(event, "callback:Veto") for event in ("on_run_start", "on_clipped", "on_step_end")]


def test_a_wrapper_takes_the_place_of_forward_and_backward(tmp_path: Path) -> None:
    seen: list[tuple[int, list[int], int]] = []

    @component
    class Twice(Callback):
        """Makes gradients twice as large, as a factor and in place."""

        in_place: bool

        def make_gradients_wrapper(self, ctx: Any) -> Any:
            def wrap(gradients: Any) -> Any:
                def twice(window: Any) -> Any:
                    seen.append((len(window.batches), window.counts, window.total))
                    assert gradients(window) is None and ctx.loss_tensor is not None
                    if not self.in_place:
                        return torch.tensor(2.0)
                    torch._foreach_mul_([p.grad for p in ctx.model.parameters()], 2.0)
                    return None

                return twice

            return wrap

    options = {"max_duration": "3st", "max_grad_norm": 0.1, "gradient_accumulation_steps": 2}
    runs = [trainer(tmp_path, *more, **options) for more in ([], [Twice(in_place=True)], [Twice(in_place=False)])]
    norms = []
    for run in runs:
        for step in run.steps():
            if step.number == 1:
                norms.append(run.ctx.grad_norm)
    torch.testing.assert_close(norms[1], 2 * norms[0])  # type: ignore[operator]
    torch.testing.assert_close(norms[2], norms[1])
    torch.testing.assert_close(weights(runs[1].ctx), weights(runs[2].ctx))
    assert seen == [(2, [2, 2], 4)] * 6
