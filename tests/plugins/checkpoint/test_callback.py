"""The callback in real runs: what is saved and kept, where a run goes on, and that it goes on exactly."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from drivetrain import (
    Callback,
    CheckpointCallback,
    ConfigError,
    DrivetrainError,
    Trainer,
    TrainingConfig,
    component,
    option,
    state,
)
from drivetrain_checkpoint import CheckpointError, Files, find_checkpoints, read_checkpoint, verify, write_checkpoint

STEPS = 15  # 3 epochs of 5 steps: 38 samples in microbatches of 4, 2 to a step, the last one partial


@pytest.fixture(autouse=True)
def this_plugin_alone_and_no_sync(monkeypatch):
    """Whatever else is installed takes no part; no plug is pulled here, and a disk is slow."""
    monkeypatch.setenv("DRIVETRAIN_PLUGINS", "drivetrain-checkpoint")
    monkeypatch.setattr(Files, "fsync", lambda self, path: None)
    monkeypatch.setattr(Files, "fsync_dir", lambda self, path: None)


class Samples(torch.utils.data.Dataset):
    """Distinct rows; `noise` is drawn anew whenever a sample is fetched, as augmentation is."""

    def __init__(self, noise: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x, self.y = torch.randn(38, 6, generator=generator), torch.randn(38, 2, generator=generator)
        self.noise = noise

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + self.noise * torch.randn(6), self.y[index]


@component
class StopAt(Callback):
    """Ends the run after a step, as an interruption does."""

    step: int = option()

    def on_step_end(self, ctx):
        if ctx.step == self.step:
            ctx.trainer.stop("interrupted")


@component
class Scripted(Callback):
    """Puts given values in the place of an evaluation's."""

    values: list = option()
    seen: int = state(default=0)

    def on_evaluate_end(self, ctx):
        ctx.eval_metrics["eval/score"] = self.values[self.seen]
        self.seen += 1


@component
class Saved(Callback):
    """Notes when checkpoints are announced."""

    steps: list = option(factory=list)

    def on_checkpoint_saved(self, ctx):
        (found,) = [c for c in find_checkpoints(ctx.run_dir) if c.path == ctx.checkpoint_path]
        assert verify(found.path) == [] and found.step <= ctx.step
        self.steps.append(found.step)


def make(tmp_path, *callbacks, name="run", resume="auto", dropout=0.5, noise=0.1, evaluate=False, **config) -> Trainer:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 2))
    settings = {
        "max_duration": "3ep",
        "per_device_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "output_dir": tmp_path / "runs",
        "run_name": name,
        "resume": resume,
        "eval_interval": None,
        "standard_callbacks": False,
    }
    return Trainer(
        model,
        TrainingConfig(**settings | config),
        Samples(noise),
        Samples(0.0) if evaluate else None,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        scheduler=lambda position: 1 - position / STEPS,
        loss=nn.MSELoss(),
        callbacks=callbacks,
        device="cpu",
    )


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def reference(tmp_path, **settings) -> dict[str, torch.Tensor]:
    trainer = make(tmp_path, name="reference", **settings)
    trainer.train()
    return weights(trainer)


def equal(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(a[name], b[name]) for name in a)


def steps_of(tmp_path, name="run") -> list[int]:
    return sorted(c.step for c in find_checkpoints(tmp_path / "runs" / name))


# -- exactness ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", ["1st", "500st"])  # saved within the last step of an epoch, or after the epoch has ended
@pytest.mark.parametrize("stops", [[1], [4], [5], [7], [10], [14], [2, 3], [6, 8, 11], [5, 10]], ids=str)
def test_stopped_and_gone_on_equals_uninterrupted(tmp_path, stops, every):
    """Shuffle, dropout, augmentation, accumulation with a partial last window; in mid-epoch, at its end, several times."""
    wanted = reference(tmp_path)
    for stop in stops:
        output = make(tmp_path, CheckpointCallback(every=every), StopAt(step=stop)).train()
        assert output.steps == stop and output.checkpoint.name == f"step-{stop:08d}"
    trainer = make(tmp_path, CheckpointCallback(every=every))
    assert trainer.train().steps == STEPS and trainer.ctx.resumed
    assert equal(wanted, weights(trainer))


@pytest.mark.parametrize(
    "settings",
    [
        {"dataloader": {"shuffle": False}},
        {"dropout": 0.0, "noise": 0.0},
        {"gradient_accumulation_steps": 1, "max_duration": "15st"},
        {"gradient_accumulation_steps": 3, "max_duration": "15st"},
        {"dataloader": {"num_workers": 2}},
        {"max_grad_norm": None},
    ],
    ids=str,
)
def test_other_settings_are_as_exact(tmp_path, settings):
    wanted = reference(tmp_path, **settings)
    make(tmp_path, CheckpointCallback(), StopAt(step=7), **settings).train()
    trainer = make(tmp_path, CheckpointCallback(), **settings)
    assert trainer.train().steps == STEPS and trainer.ctx.resumed
    assert equal(wanted, weights(trainer))


def test_a_file_asks_for_a_checkpoint(tmp_path):
    """At the next logging step, whose evaluation is in it; the file is taken away, and the run goes on."""

    @component
    class Ask(Callback):
        def on_step_end(self, ctx):
            if ctx.step == 3:
                (ctx.run_dir / "SAVE").touch()

    settings = {"log_interval": "2st", "evaluate": True, "eval_interval": "4st"}
    trainer = make(tmp_path, Saved(), Ask(), CheckpointCallback(every="10st"), **settings)
    trainer.train()
    assert steps_of(tmp_path) == [4, 10, 15]
    assert not (tmp_path / "runs/run/SAVE").exists()


def test_with_evaluation_and_best_saving_it_is_as_exact(tmp_path):
    settings = {"evaluate": True, "eval_interval": "2st"}
    values = [5.0, 4.0, float("nan"), 3.0, 6.0, 2.0, 7.0, 1.0, 9.0, 8.0]
    wanted = reference(tmp_path, **settings)
    for stop in (5, 9, 99):
        callback = CheckpointCallback(every="4st", best="eval/score", keep_last=1)
        trainer = make(tmp_path, callback, Scripted(values=values), StopAt(step=stop), **settings)
        trainer.train()
    assert equal(wanted, weights(trainer))


def test_others_that_are_due_at_the_same_step_come_first(tmp_path):
    """Case 19: what they do at that step is in the checkpoint, whatever the order of the configuration."""

    @component
    class Counter(Callback):
        every: str = option(default="4st")
        count: int = state(default=0)

        def on_every(self, ctx):
            self.count += 1

    for stop in (4, 99):
        counter = Counter()
        make(tmp_path, CheckpointCallback(every="4st"), counter, StopAt(step=stop)).train()
    assert counter.count == STEPS // 4


def test_what_others_do_at_the_end_is_not_saved(tmp_path):
    """Cases 20 and 21: weights that are swapped for their averages when the run ends are not those to train on with."""

    @component
    class Swap(Callback):
        def on_run_end(self, ctx):
            with torch.no_grad():
                for parameter in ctx.model.parameters():
                    parameter.zero_()

    make(tmp_path, Swap(), CheckpointCallback(), StopAt(step=7)).train()
    trainer = make(tmp_path, CheckpointCallback())
    trainer.train()
    assert equal(reference(tmp_path), weights(trainer))


def rewrite(path: Path, change) -> None:
    """A checkpoint with a changed tree, whole in every other way."""
    tree = read_checkpoint(path)
    change(tree)
    shutil.rmtree(path)
    write_checkpoint(path.parent.parent, tree, tree["progress"]["step"])


def fresh_rng(tree) -> None:
    tree["rng"] = make(Path("unused")).state_dict()["rng"]


@pytest.mark.parametrize(
    ("change", "dropout", "same"),
    [
        (fresh_rng, 0.5, False),
        (fresh_rng, 0.0, True),  # nothing else in the loop depends on the generators
        (lambda tree: tree["progress"].update(step_in_epoch=1), 0.0, False),
        (lambda tree: tree["progress"].update(epoch=0), 0.0, False),
        (lambda tree: tree["progress"].update(step=6), 0.0, False),
        (lambda tree: tree["optimizer"]["state"].clear(), 0.0, False),
        (lambda tree: tree["optimizer"]["state"][0]["step"].add_(1), 0.0, False),
        (lambda tree: tree["model"]["0.bias"].view(torch.int32)[0].bitwise_xor_(1), 0.0, False),
        (lambda tree: None, 0.5, True),
    ],
    ids=[
        "rng with dropout",
        "rng without",
        "position",
        "epoch",
        "schedule",
        "optimizer",
        "optimizer step",
        "one bit",
        "nothing",
    ],
)
def test_control_each_part_of_the_state_is_needed(tmp_path, change, dropout, same):
    wanted = reference(tmp_path, dropout=dropout)
    output = make(tmp_path, CheckpointCallback(), StopAt(step=7), dropout=dropout).train()
    rewrite(output.checkpoint, change)
    trainer = make(tmp_path, CheckpointCallback(), dropout=dropout)
    trainer.train()
    assert equal(wanted, weights(trainer)) is same


@pytest.mark.parametrize("part", ["progress", "model", "optimizer", "rng", "components"])
def test_a_missing_part_is_an_error_and_says_where(tmp_path, part):
    """Case 28."""
    output = make(tmp_path, CheckpointCallback(), StopAt(step=7)).train()
    tree = read_checkpoint(output.checkpoint)
    del tree[part]
    shutil.rmtree(output.checkpoint)
    write_checkpoint(output.run_dir, tree, 7)
    with pytest.raises(DrivetrainError, match=part) as caught:
        make(tmp_path, CheckpointCallback()).train()
    assert str(output.checkpoint) in caught.value.__notes__[0]


def test_a_changed_model_is_an_error_not_a_walk_back(tmp_path):
    output = make(tmp_path, CheckpointCallback(), StopAt(step=7)).train()
    rewrite(output.checkpoint, lambda tree: tree["model"].pop("3.bias"))
    with pytest.raises(DrivetrainError, match=r"3\.bias") as caught:
        make(tmp_path, CheckpointCallback()).train()
    assert "give another run_name" in caught.value.__notes__[0]


# -- what is saved when ------------------------------------------------------------------------------------------------------


def test_saves_by_its_period_and_at_the_end(tmp_path):
    saved = Saved()
    output = make(tmp_path, CheckpointCallback(every="4st"), saved).train()
    assert saved.steps == [4, 8, 12, 15]
    assert (
        steps_of(tmp_path) == [8, 12, 15] and output.checkpoint == tmp_path / "runs" / "run" / "checkpoints" / "step-00000015"
    )


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every": "5st"}, [5, 10, 15]),  # the end has just been saved
        ({"every": "1ep"}, [5, 10, 15]),
        ({"every": "50%"}, [8, 15]),
        ({"every": "7st", "save_at_end": False}, [7, 14]),
        ({"every": "6st", "keep_last": None}, [6, 12, 15]),
        ({"every": "1st", "keep_last": 1}, [15]),
        ({}, [15]),
    ],
    ids=str,
)
def test_which_checkpoints_remain(tmp_path, options, steps):
    make(tmp_path, CheckpointCallback(**options)).train()
    assert steps_of(tmp_path) == steps


def test_a_second_sitting_and_a_finished_run_save_nothing_twice(tmp_path):
    saved = Saved()
    trainer = make(tmp_path, CheckpointCallback(), saved)
    for step in trainer.steps():
        if step.number == 6:
            break
    trainer.train()
    again = make(tmp_path, CheckpointCallback(), saved)
    assert again.train().steps == STEPS
    assert saved.steps == [6, 15]


def test_leaving_the_callers_loop_saves(tmp_path):
    for step in make(tmp_path, CheckpointCallback()).steps():
        if step.number == 3:
            break
    assert steps_of(tmp_path) == [3]


@component
class Failing(Callback):
    step: int = option()
    event: str = option()
    error: type = option()

    def on_backward(self, ctx):
        self._fail(ctx, "backward")

    def on_step_end(self, ctx):
        self._fail(ctx, "step_end")

    def _fail(self, ctx, event):
        if event == self.event and ctx.step == self.step:
            raise self.error("broken")


@pytest.mark.parametrize("event", ["backward", "step_end"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_run_is_not_saved(tmp_path, event, error):
    """Half a step must not become the newest checkpoint; Ctrl-C in its middle ends `train` without an error."""
    with pytest.raises(error) if error is ValueError else nullcontext():
        make(tmp_path, CheckpointCallback(every="4st"), Failing(step=6, event=event, error=error)).train()
    assert steps_of(tmp_path) == [4]
    trainer = make(tmp_path, CheckpointCallback(every="4st"))
    trainer.train()
    assert equal(reference(tmp_path), weights(trainer))


@component
class Preempted(Callback):
    callback: Callback = option()

    def on_step_end(self, ctx):
        if ctx.step == 3:
            self.callback.on_preempt(ctx)
            ctx.trainer.stop("preempted")


def test_a_preempted_run_is_saved_whatever_the_options(tmp_path):
    callback = CheckpointCallback(save_at_end=False)
    make(tmp_path, callback, Preempted(callback=callback)).train()
    assert steps_of(tmp_path) == [3]


def test_a_run_that_never_steps_leaves_no_checkpoint(tmp_path):
    trainer = make(tmp_path, CheckpointCallback())

    @component
    class Refusal(Callback):
        def on_run_start(self, ctx):
            ctx.stop("nothing to do")

    trainer = make(tmp_path, CheckpointCallback(), Refusal())
    trainer.train()
    assert not (tmp_path / "runs").exists()


# -- the best ----------------------------------------------------------------------------------------------------------------

EVALUATED = {"evaluate": True, "eval_interval": "2st"}  # at 2, 4, …, 14 and at the end


@pytest.mark.parametrize(
    ("values", "mode", "best"),
    [
        ([9, 1, 8, 7, 6, 5, 4, 3], "min", 4),  # the oldest of all is the best: case 39
        ([9, 1, 8, 7, 6, 5, 4, 3], "max", 2),
        ([9, 8, 7, 6, 5, 4, 3, 1], "min", 15),  # the evaluation at the end, after the last step
        ([float("nan"), 3, float("nan"), 3, 5, 6, 7, 8], "min", 4),  # NaN never, equal not: case 44
        ([float("inf"), 3, 4, 5, float("-inf"), 6, 7, 8], "min", 10),
    ],
    ids=str,
)
def test_the_best_is_kept_beside_the_newest(tmp_path, values, mode, best):
    """Case 40: every = 5st and evaluation every 2 steps do not meet."""
    callback = CheckpointCallback(every="5st", keep_last=1, best="eval/score", best_mode=mode)
    trainer = make(tmp_path, Scripted(values=[float(v) for v in values]), callback, **EVALUATED)
    trainer.train()
    assert steps_of(tmp_path) == sorted({best, 15})
    assert callback.best_step == best and callback.best_value == values[[2, 4, 6, 8, 10, 12, 14, 15].index(best)]
    recorded = read_checkpoint(find_checkpoints(tmp_path / "runs" / "run")[0].path)["components"][callback.plugin_name]
    assert recorded["best_step"] == best


def test_the_best_checkpoint_holds_the_weights_that_were_evaluated(tmp_path):
    seen = {}

    @component
    class Look(Callback):
        def on_evaluate_end(self, ctx):
            seen[ctx.step] = {k: v.clone() for k, v in ctx.model.state_dict().items()}

    callback = CheckpointCallback(best="eval/score")
    make(tmp_path, Scripted(values=[9.0, 1.0, *[8.0] * 6]), Look(), callback, **EVALUATED).train()
    assert equal(seen[4], read_checkpoint(tmp_path / "runs/run/checkpoints/step-00000004")["model"])


def test_the_best_is_known_after_a_resume(tmp_path):
    values = [9.0, 1.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]
    for stop in (5, 9, 99):
        callback = CheckpointCallback(every="1st", keep_last=1, best="eval/score")
        make(tmp_path, Scripted(values=values), callback, StopAt(step=stop), **EVALUATED).train()
        assert steps_of(tmp_path) == [4, min(stop, 15)]


def test_a_best_that_is_gone_is_a_warning(tmp_path):
    """Case 43."""
    values = [9.0, 1.0, *[8.0] * 9]
    output = make(tmp_path, Scripted(values=values), CheckpointCallback(best="eval/score"), StopAt(step=9), **EVALUATED).train()
    shutil.rmtree(output.checkpoint.parent / "step-00000004")
    with pytest.warns(UserWarning, match="the best checkpoint, of step 4, is gone"):
        make(tmp_path, Scripted(values=values), CheckpointCallback(best="eval/score"), **EVALUATED).train()


def test_a_metric_that_does_not_exist_names_those_that_do(tmp_path):
    with pytest.raises(CheckpointError, match=r"no metric 'eval/los'.*gives eval/loss\. Did you mean 'eval/loss'\?"):
        make(tmp_path, CheckpointCallback(best="eval/los"), **EVALUATED).train()


def test_the_best_of_a_run_that_is_never_evaluated_is_refused_at_its_start(tmp_path: Path) -> None:
    for options in ({"eval_interval": False}, {"evaluate": False}):
        run = make(tmp_path, CheckpointCallback(best="eval/loss"), **{**EVALUATED, **options})
        with pytest.raises(DrivetrainError, match="tells the best by eval/loss, but the run"):
            run.train()
        assert run.ctx.step == 0


def test_a_metric_that_is_missing_once_is_a_warning(tmp_path):
    """Case 45."""

    @component
    class Forgetful(Callback):
        def on_evaluate_end(self, ctx):
            if ctx.step != 6:
                ctx.eval_metrics["eval/score"] = float(ctx.step) if ctx.step > 6 else float("nan")

    with pytest.warns(UserWarning, match="the evaluation at step 6 gave no 'eval/score', only eval/loss"):
        make(tmp_path, Forgetful(), CheckpointCallback(best="eval/score", best_mode="max"), **EVALUATED).train()
    assert 15 in steps_of(tmp_path)


def test_an_evaluation_outside_a_run_saves_nothing(tmp_path):
    callback = CheckpointCallback(best="eval/loss", keep_last=1)
    trainer = make(tmp_path, callback, **EVALUATED)
    trainer.evaluate()
    assert callback.best_value is None
    assert not (tmp_path / "runs").exists() and trainer.train().steps == STEPS
    assert 0 not in steps_of(tmp_path)


# -- where a run goes on -----------------------------------------------------------------------------------------------------


def stopped(tmp_path, step=7, name="run", **settings) -> Path:
    return make(tmp_path, CheckpointCallback(every="3st"), StopAt(step=step), name=name, **settings).train().run_dir


def damage(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


def test_a_damaged_newest_one_is_passed_over_with_a_warning(tmp_path):
    """Cases 30 to 32, in a run; the damaged one is neither counted nor removed, nor written over."""
    run_dir = stopped(tmp_path)
    damage(run_dir / "checkpoints" / "step-00000007")
    trainer = make(tmp_path, CheckpointCallback(every="1st", keep_last=2))
    with pytest.warns(UserWarning, match=r"step-00000007 was rejected: model\.safetensors is damaged"):
        trainer.train()
    assert equal(reference(tmp_path), weights(trainer))
    assert steps_of(tmp_path) == [7, 14, 15]


def test_none_whole_is_an_error_that_names_each(tmp_path):
    run_dir = stopped(tmp_path)
    for checkpoint in find_checkpoints(run_dir):
        damage(checkpoint.path)
    with pytest.raises(CheckpointError, match="none of its checkpoints can be used") as caught:
        make(tmp_path, CheckpointCallback()).train()
    assert all(f"step-0000000{step}: model.safetensors is damaged" in str(caught.value) for step in (3, 6, 7))


def test_never_refuses_a_directory_with_checkpoints(tmp_path):
    stopped(tmp_path)
    with pytest.raises(CheckpointError, match=r"has checkpoints \(the newest: step-00000007\), and resume is 'never'"):
        make(tmp_path, CheckpointCallback(), resume="never").train()
    assert steps_of(tmp_path) == [3, 6, 7]
    assert make(tmp_path, CheckpointCallback(), resume="never", name="other").train().steps == STEPS


@pytest.mark.parametrize("where", ["runs/run", "runs/run/checkpoints", "runs/run/checkpoints/step-00000007"])
@pytest.mark.parametrize("name", ["run", "branch"])
def test_a_path_names_a_run_or_a_checkpoint(tmp_path, where, name):
    stopped(tmp_path)
    trainer = make(tmp_path, CheckpointCallback(keep_last=1), resume=str(tmp_path / where), name=name)
    trainer.train()
    assert equal(reference(tmp_path), weights(trainer))
    if name == "branch":  # case 41: what it came from is not touched
        assert steps_of(tmp_path) == [3, 6, 7] and steps_of(tmp_path, "branch") == [15]


def test_a_path_again_after_an_interruption_goes_on_in_the_new_run(tmp_path):
    """The same command, as often as it takes."""
    stopped(tmp_path)
    settings = {"resume": str(tmp_path / "runs/run/checkpoints/step-00000006"), "name": "branch"}
    for stop in (8, 11):
        assert make(tmp_path, CheckpointCallback(), StopAt(step=stop), **settings).train().steps == stop
    trainer = make(tmp_path, CheckpointCallback(), **settings)
    trainer.train()
    assert equal(reference(tmp_path), weights(trainer)) and steps_of(tmp_path, "branch") == [8, 11, 15]


def test_a_path_does_not_mix_runs(tmp_path):
    stopped(tmp_path)
    stopped(tmp_path, name="other")
    with pytest.raises(CheckpointError, match=r"runs/run has checkpoints of a run that did not begin at .*runs/other"):
        make(tmp_path, CheckpointCallback(), resume=str(tmp_path / "runs/other")).train()
    with pytest.raises(CheckpointError, match="has checkpoints beyond step-00000003: step-00000007, step-00000006"):
        make(tmp_path, CheckpointCallback(), resume=str(tmp_path / "runs/run/checkpoints/step-00000003")).train()
    assert steps_of(tmp_path) == steps_of(tmp_path, "other") == [3, 6, 7]


@pytest.mark.parametrize("where", ["nowhere", "runs", "runs/run/checkpoints/step-00000099"])
def test_a_path_that_leads_nowhere_is_an_error(tmp_path, where):
    stopped(tmp_path)
    with pytest.raises(CheckpointError, match="is neither a run with checkpoints nor a checkpoint"):
        make(tmp_path, CheckpointCallback(), resume=str(tmp_path / where), name="new").train()
    assert not (tmp_path / "runs" / "new").exists()


def test_a_named_checkpoint_that_is_damaged_is_an_error_not_a_walk_back(tmp_path):
    path = stopped(tmp_path) / "checkpoints" / "step-00000007"
    damage(path)
    with pytest.raises(CheckpointError, match=r"step-00000007: model\.safetensors is damaged"):
        make(tmp_path, CheckpointCallback(), resume=str(path)).train()


def test_a_run_without_checkpoints_starts_afresh_under_auto_only(tmp_path):
    (tmp_path / "runs" / "run" / "checkpoints" / ".drivetrain-saving-0123456789abcdef").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        make(tmp_path, CheckpointCallback(), resume=str(tmp_path / "runs" / "run")).train()
    assert make(tmp_path, CheckpointCallback()).train().steps == STEPS
    assert os.listdir(tmp_path / "runs" / "run" / "checkpoints") == ["step-00000015"]


# -- a disk that refuses -----------------------------------------------------------------------------------------------------


class Full(Files):
    """A disk with room for so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, path, chunks):
        def taken():
            for chunk in chunks:
                self.room -= len(chunk)
                if self.room < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                yield chunk

        super().write(path, taken())


def test_a_full_disk_ends_the_run_with_the_old_checkpoint_whole(tmp_path):
    whole = make(tmp_path, CheckpointCallback(), name="other").train().checkpoint
    size = sum(file.stat().st_size for file in whole.iterdir())
    callback = CheckpointCallback(every="4st", keep_last=1)
    callback.files = Full(room=size * 3 // 2)
    with pytest.raises(CheckpointError, match=r"checkpoint of step \d+ could not be written: No space left on device"):
        make(tmp_path, callback).train()
    (kept,) = find_checkpoints(tmp_path / "runs" / "run")
    assert [p.name for p in kept.path.parent.iterdir()] == [kept.path.name] and not kept.problem
    trainer = make(tmp_path, CheckpointCallback(every="4st", keep_last=1))
    assert trainer.train().steps == STEPS and equal(reference(tmp_path), weights(trainer))


class ReadOnly(Files):
    def mkdir(self, path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_read_only_directory_is_found_before_training(tmp_path):
    callback = CheckpointCallback()
    callback.files = ReadOnly()
    trainer = make(tmp_path, callback)
    with pytest.raises(CheckpointError, match="checkpoints cannot be written here: Read-only file system"):
        trainer.train()
    assert trainer.ctx.step == 0 and not (tmp_path / "runs").exists()


def test_a_state_that_cannot_be_stored_is_found_before_training(tmp_path):
    @component
    class Odd(Callback):
        seen: set = state(factory=set)

    trainer = make(tmp_path, CheckpointCallback(), Odd())
    with pytest.raises(CheckpointError, match=r"components\.callback:Odd\.seen: a checkpoint cannot hold set\(\)"):
        trainer.train()
    assert trainer.ctx.step == 0 and not (tmp_path / "runs").exists()


# -- options -----------------------------------------------------------------------------------------------------------------


def test_options_are_checked(tmp_path):
    with pytest.raises(ConfigError, match=r"callbacks\[0\]\.checkpoint\.keep_last: must be at least 1"):
        make(tmp_path, callbacks=[{"use": "checkpoint", "keep_last": 0}])
    with pytest.raises(ConfigError, match=r"best_mode: expected one of 'min', 'max'"):
        make(tmp_path, callbacks=[{"use": "checkpoint", "best_mode": "least"}])


def test_it_is_standard_where_it_is_installed(tmp_path):
    trainer = make(tmp_path, standard_callbacks=True)
    assert trainer.plugins() == ["callback:checkpoint"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train()
    assert steps_of(tmp_path) == [15]
