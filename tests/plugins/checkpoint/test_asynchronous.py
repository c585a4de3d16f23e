"""Saving in the background: exact, one at a time, announced when durable, and never silent when it fails."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest
import torch

from drivetrain import Callback, CheckpointCallback, component
from drivetrain_checkpoint import CheckpointError, Files, find_checkpoints, read_checkpoint
from drivetrain_checkpoint.format import pack
from drivetrain_checkpoint.staging import Arena, Copies, Staged, Staging


class Held(Files):
    """A disk that lets nothing through until it is told to; `held` is set while something waits."""

    def __init__(self) -> None:
        self.go, self.held = threading.Event(), threading.Event()

    def write(self, path, chunks):
        if "saving" in path.parent.name:
            self.held.set()
            assert self.go.wait(20)
        super().write(path, chunks)


class Failing(Files):
    """A disk that is full for the checkpoints numbered in `bad`, counted from 1."""

    def __init__(self, *bad: int, number: int = errno.ENOSPC) -> None:
        self.bad, self.number, self.count = bad, number, 0

    def mkdir(self, path):
        if "saving" in path.name:
            self.count += 1
            if self.count in self.bad:
                raise OSError(self.number, os.strerror(self.number))
        super().mkdir(path)


def with_files(files: Files, **options) -> CheckpointCallback:
    callback = CheckpointCallback(**{"every": "3st", "keep_last": None, **options})
    callback.files = files
    return callback


@component
class Watch(Callback):
    """Notes the state after each step, and what is announced when and where."""

    def __attrs_post_init__(self) -> None:
        self.states, self.announced = {}, []

    def on_step_end(self, ctx):
        self.states[ctx.step] = {k: v.clone() for k, v in ctx.model.state_dict().items()}

    def on_checkpoint_saved(self, ctx):
        assert threading.current_thread() is threading.main_thread()
        self.announced.append((int(ctx.checkpoint_path.name[-8:]), ctx.step))


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def run_with_held_disk(trainer, tmp_path):
    """Steps 4 and 5 update everything in place while the checkpoint of step 3 waits for its disk."""
    files, watch = Held(), Watch()

    @component
    class LetGo(Callback):
        def on_step_end(self, ctx):
            if ctx.step == 5:
                assert files.held.wait(20) and not files.go.is_set()
                assert ctx.checkpoint_path is None and find_checkpoints(ctx.run_dir) == []
                files.go.set()

    trainer(watch, LetGo(), with_files(files)).train()
    return watch, {c.step: read_checkpoint(c.path) for c in find_checkpoints(tmp_path / "run")}


def test_what_is_saved_is_the_state_at_its_step_whatever_the_optimizer_does_meanwhile(trainer, tmp_path, diff):
    """Case 36."""
    watch, saved = run_with_held_disk(trainer, tmp_path)
    assert sorted(saved) == [3, 6, 8]
    assert all(equal(saved[step]["model"], watch.states[step]) for step in saved)
    trainer(with_files(Files(), asynchronous=False), name="synchronous").train()
    for found in find_checkpoints(tmp_path / "synchronous"):
        expected = read_checkpoint(found.path)
        for part in ("model", "optimizer", "precision", "rng"):
            assert diff(expected[part], saved[found.step][part]) == []


def test_control_without_the_copy_it_is_another_state(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(Staging, "copy", lambda self, packed, stepped: Staged(packed, []))
    watch, saved = run_with_held_disk(trainer, tmp_path)
    assert not equal(saved[3]["model"], watch.states[3])


def test_announced_once_durable_from_the_trainings_thread(trainer):
    watch, files = Watch(), Held()
    before = threading.active_count()  # other tests may have left threads of libraries behind

    @component
    class LetGo(Callback):
        def on_step_start(self, ctx):
            if ctx.step == 5:
                files.go.set()
                while threading.active_count() > before:
                    time.sleep(0.001)

    trainer(watch, LetGo(), with_files(files, save_at_end=False)).train()
    assert [step for step, _ in watch.announced] == [3, 6]
    assert watch.announced[0][1] == 6  # in the step that began when it became durable, not by the thread


@pytest.mark.parametrize("every", ["1st", "2st"])
def test_at_most_one_is_in_flight(trainer, tmp_path, every):
    """F7: a slow disk does not pile up, and every checkpoint that was due is made."""

    class Slow(Files):
        now = most = 0

        def write(self, path, chunks):
            Slow.now += 1
            Slow.most = max(Slow.most, Slow.now)
            time.sleep(0.01)
            super().write(path, chunks)
            Slow.now -= 1

    watch = Watch()
    trainer(watch, with_files(Slow(), every=every)).train()
    assert Slow.most == 1
    wanted = list(range(int(every[0]), 9, int(every[0])))
    assert [step for step, _ in watch.announced] == sorted(c.step for c in find_checkpoints(tmp_path / "run")) == wanted


def test_host_memory_is_used_again(trainer, monkeypatch):
    seen = []
    copy = Staging.copy

    def noting(self, *given):
        staged = copy(self, *given)
        seen.append({name: buffer.data_ptr() for name, buffer in staged.packed.tensors["model.safetensors"].items()})
        return staged

    monkeypatch.setattr(Staging, "copy", noting)
    callback = with_files(Files(), every="2st")
    trainer(callback).train()
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 9 and len(set(seen[0].values())) == 9
    assert callback._staging._arenas == {}  # not kept beyond the run


@pytest.mark.parametrize(("every", "ahead"), [("1st", 0), ("3st", 1)])
def test_the_memory_for_the_first_save_is_made_before_it(trainer, monkeypatch, every, ahead):
    """In a thread, as soon as the optimizer has its state; the first copy finds it large enough. One after a single step makes it."""
    made = []
    make, of = Arena._make, Arena.of
    monkeypatch.setattr(Arena, "_make", lambda *given: [made.append(threading.current_thread().name), make(*given)][1])
    monkeypatch.setattr(Arena, "of", lambda self, size: [of(self, 0), made.append(len(self.memory) >= size), of(self, size)][2])
    trainer(with_files(Files(), every=every)).train()
    assert made.count("drivetrain-checkpoint-memory") == ahead
    assert made.count(False) == 1 - ahead and made.count(True) >= 1


@pytest.mark.parametrize("given", [{"every": "8st"}, {"every": "100st"}, {"every": "3st", "asynchronous": False}])
def test_no_memory_is_made_when_nothing_is_copied(trainer, monkeypatch, given):
    monkeypatch.setattr(Arena, "_make", lambda *_: pytest.fail("made"))
    monkeypatch.setattr(Arena, "prepare", lambda *_: pytest.fail("made"))
    trainer(with_files(Files(), **given)).train()


# -- failures ----------------------------------------------------------------------------------------------------------------


def test_a_failure_is_raised_at_the_next_step(trainer, tmp_path):
    """Case 35: not at the next save, which is far away."""
    slow_steps = []

    @component
    class Slow(Callback):
        def on_step_end(self, ctx):
            slow_steps.append(ctx.step)
            time.sleep(0.05)

    run = trainer(Slow(), with_files(Failing(1)), steps=100)
    with pytest.raises(
        CheckpointError, match=r"the checkpoint of step 3 could not be written: No space left on device"
    ) as caught:
        run.train()
    assert slow_steps[-1] in (3, 4) and "of callback:CheckpointCallback" in caught.value.__notes__[0]
    assert find_checkpoints(tmp_path / "run") == []  # not saved at the end: the run failed


def test_a_failure_that_shows_late_is_raised_at_the_next_save(trainer, tmp_path):
    files = Failing(1)
    mkdir = files.mkdir
    files.mkdir = lambda path: [time.sleep(0.3), mkdir(path)][1]
    with pytest.raises(CheckpointError, match="the checkpoint of step 3 "):
        trainer(with_files(files)).train()


def test_a_failure_at_the_end_is_raised_and_the_end_is_saved_all_the_same(trainer, tmp_path):
    files = Failing(1)
    mkdir = files.mkdir
    files.mkdir = lambda path: [time.sleep(0.3), mkdir(path)][1]
    with pytest.raises(CheckpointError, match="the checkpoint of step 7 "):
        trainer(with_files(files, every="7st")).train()
    assert [c.step for c in find_checkpoints(tmp_path / "run")] == [8]


def test_a_run_that_fails_still_completes_the_save_in_flight(trainer, tmp_path):
    @component
    class Broken(Callback):
        def on_backward(self, ctx):
            if ctx.step == 3:
                raise ValueError("broken")

    files, watch = Files(), Watch()
    write = files.write
    files.write = lambda path, chunks: [time.sleep(0.05), write(path, chunks)][1]
    with pytest.raises(ValueError, match="broken"):
        trainer(Broken(), watch, with_files(files)).train()
    assert [c.step for c in find_checkpoints(tmp_path / "run")] == [3] and watch.announced == [(3, 3)]


def test_a_failed_rotation_in_the_background_is_a_warning_of_the_training(trainer):
    class Stuck(Files):
        def rename(self, source, target):
            if "removing" in target.name:
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            super().rename(source, target)

    with pytest.warns(UserWarning, match="an old checkpoint could not be removed"):
        trainer(with_files(Stuck(), keep_last=1)).train()


# -- the order of copies on a GPU, with events that a test completes -----------------------------------------------------------


class Event:
    """Stands for a CUDA event: complete when the test says so."""

    def __init__(self) -> None:
        self.done, self.waiting = threading.Event(), []

    def synchronize(self) -> None:
        assert self.done.wait(20)


class Stream:
    device = torch.device("cpu")


@pytest.fixture
def current(monkeypatch):
    """The training's stream, which notes the events that it is told to wait for."""

    class Current:
        waits = []  # noqa: RUF012

        def wait_event(self, event):
            self.waits.append(event)

    Current.waits = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Current)
    monkeypatch.setattr(Current, "wait_event", classmethod(lambda cls, event: cls.waits.append(event)))
    return Current


def on_their_way(tensor):
    event = Event()
    return event, Copies(Stream(), event, [tensor], [("w", tensor, tensor._version)])


def test_the_trainings_stream_waits_before_the_optimizer_changes_anything(current):
    weight = torch.zeros(3)
    event, copies = on_their_way(weight)
    copies.let_change()
    copies.let_change()
    assert current.waits == [event]  # on the device, and once
    weight.add_(1)
    event.done.set()
    copies.wait()
    assert copies.sources == []  # their memory may go


def test_a_change_in_between_is_found_before_or_after_the_copy_ends(current):
    for order in ("let", "wait"):
        weight = torch.zeros(3)
        event, copies = on_their_way(weight)
        weight.add_(1)  # by somebody who has not asked
        if order == "let":
            copies.let_change()
        event.done.set()
        with pytest.raises(CheckpointError, match="w was changed between two steps while it was being copied"):
            copies.wait()


def test_a_change_after_the_copy_has_ended_is_no_matter(current):
    weight = torch.zeros(3)
    event, copies = on_their_way(weight)
    event.done.set()
    copies.wait()
    weight.add_(1)
    copies.let_change()
    copies.wait()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_from_a_gpu_are_exact_and_let_the_host_go_on(diff):
    weight, statistics = torch.randn(1 << 26, device="cuda"), torch.randn(1 << 10, device="cuda")
    before = {"model": {"w": weight.cpu().clone(), "s": statistics.cpu().clone()}}
    staging = Staging()
    for _ in range(3):
        staged = staging.copy(pack({"model": {"w": weight, "s": statistics}}), [weight])
        statistics.add_(0.0).mul_(1.0)  # a forward may change these at once
        staged.let_change()
        weight.mul_(2.0)  # in place, right after
        staged.wait()
        found = staged.packed.tensors["model.safetensors"]
        assert diff(before["model"], dict(found)) == []
        weight.copy_(before["model"]["w"])
