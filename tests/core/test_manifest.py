"""What a run was made of is saved with it, and what has changed is said, or refused, when it goes on."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from drivetrain import Callback, CallbackContext, Component, DrivetrainError, Trainer, TrainingConfig, component, option
from drivetrain.manifest import compare, git_commit, plain


@pytest.fixture(autouse=True)
def core_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVETRAIN_PLUGINS", "off")


@component
class Adam(Component):
    kind = "optimizer"
    lr: float = option(default=0.1, help="learning rate")
    api_key: str = option(default="", help="what an optimizer has no use for")

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        return torch.optim.Adam(ctx.model.parameters(), lr=self.lr)


@component
class Restore(Callback):
    """Restores a state at the start."""

    saved: Any = option(default=None)

    def on_restore(self, ctx: CallbackContext) -> None:
        if self.saved is not None:
            ctx.load_state_dict(self.saved)


def rows(size: int = 16) -> TensorDataset:
    x = torch.arange(size * 2.0).reshape(size, 2)
    return TensorDataset(x, x[:, :1])


def trainer(
    saved: Any = None, data: Any = None, model: nn.Module | None = None, optimizer: Any = None, **given: Any
) -> Trainer:
    torch.manual_seed(0)
    model = model or nn.Linear(2, 1)
    config = TrainingConfig(**{"max_duration": "2ep", "per_device_batch_size": 4, "device": "cpu"} | given)
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=0.1)
    callbacks = [Restore(saved=saved)]
    return Trainer(model, config, data or rows(), loss=nn.MSELoss(), optimizer=optimizer, callbacks=callbacks)


def saved_by(**given: Any) -> Any:
    run = trainer(**given)
    run.train()
    return copy.deepcopy(run.state_dict())


def changes(**given: Any) -> dict[str, str]:
    """What differs from the plain run, with the verdicts."""
    return {c.key: c.verdict for c in compare(trainer().manifest, trainer(**given).manifest)}


def test_it_is_plain_data_that_json_gives_back() -> None:
    described = trainer().manifest
    assert json.loads(json.dumps(described)) == described
    assert described["data"]["length"] == 16
    assert described["model"]["parameters"] == 3
    assert described["versions"]["torch"] == torch.__version__
    assert described["config"]["per_device_batch_size"] == {"value": 4, "origin": "python"}
    assert described["optimizer"]["groups"][0]["lr"] == 0.1


def test_two_runs_alike_differ_in_nothing() -> None:
    assert changes() == {}


def test_it_stays_that_of_the_beginning_while_a_schedule_changes_the_optimizer() -> None:
    run = trainer()
    schedule = torch.optim.lr_scheduler.OneCycleLR(run.ctx.optimizer, max_lr=0.3, total_steps=8, cycle_momentum=True)
    run = Trainer(run.model, run.config, rows(), loss=nn.MSELoss(), optimizer=run.ctx.optimizer, scheduler=schedule)
    before = copy.deepcopy(run.manifest)
    run.train()
    assert run.state_dict()["manifest"] == before


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"log_interval": "1st"}, {"log_interval": "safe"}),
        ({"run_name": "b"}, {"run_name": "safe"}),
        ({"dataloader": {"num_workers": 2}}, {"dataloader.num_workers": "safe"}),
        ({"max_duration": "3ep"}, {"max_duration": "warn"}),
        ({"seed": 1}, {"seed": "refuse"}),
        ({"max_grad_norm": 2.0}, {"max_grad_norm": "refuse"}),
        ({"dataloader": {"shuffle": False}}, {"dataloader.shuffle": "refuse"}),
        (
            {"per_device_batch_size": 2, "gradient_accumulation_steps": 2},
            {"per_device_batch_size": "safe", "gradient_accumulation_steps": "safe", "step.microbatches": "warn"},
        ),
        ({"per_device_batch_size": 2}, {"per_device_batch_size": "safe", "step.samples": "refuse"}),
        ({"data": rows(12)}, {"data.length": "refuse", "data.samples": "refuse"}),
        ({"data": TensorDataset(rows()[:][0] + 1, rows()[:][1])}, {"data.samples": "refuse"}),
        ({"data": list(rows())}, {"data.type": "warn"}),
        (
            {"model": nn.Linear(2, 1, bias=False)},
            {"model.parameters": "safe", "model.trainable": "refuse", "model.tensors": "warn", "model.types": "refuse"},
        ),
    ],
)
def test_verdicts(given: dict[str, Any], expected: dict[str, str]) -> None:
    assert changes(**given) == expected


def test_the_learning_rate_of_a_ready_optimizer_and_of_a_component() -> None:
    model = nn.Linear(2, 1)
    ready = torch.optim.Adam(model.parameters(), lr=0.2)
    assert changes(model=model, optimizer=ready) == {"optimizer.groups": "refuse"}
    one, other = (trainer(optimizer=Adam(lr=lr)).manifest for lr in (0.1, 0.2))
    [change] = compare(one, other)
    assert (change.key, change.old, change.new, change.verdict) == ("optimizer:Adam.lr", 0.1, 0.2, "refuse")
    assert {c.key: c.verdict for c in compare(trainer().manifest, one)} == {
        "optimizer:Adam": "refuse",
        "optimizer.class": "warn",  # a ready one was described by its groups, a component by its options
        "optimizer.groups": "warn",
        "optimizer": "warn",
    }


def test_versions_and_commit_warn() -> None:
    old, new = trainer().manifest, copy.deepcopy(trainer().manifest)
    new["versions"]["torch"], new["code"]["git"], new["hardware"]["threads"] = "9.9", "0" * 40, 99
    assert {c.key: c.verdict for c in compare(old, new)} == {
        "versions.torch": "warn",
        "code.git": "warn",
        "hardware.threads": "warn",
    }


def test_an_option_that_a_newer_version_added_is_not_refused() -> None:
    old, new = (copy.deepcopy(trainer(optimizer=Adam()).manifest) for _ in range(2))
    del old["components"]["optimizer:Adam"]["options"]["lr"]
    assert [c.verdict for c in compare(old, new)] == ["warn"]


class TestGoingOn:
    def test_refused_with_each_change_and_the_remedy(self) -> None:
        with pytest.raises(DrivetrainError) as caught:
            trainer(saved_by(), seed=3, max_grad_norm=0.5).train()
        said = str(caught.value)
        assert "\n  seed: 0 → 3 (" in said
        assert "\n  max_grad_norm: 1.0 → 0.5 (" in said
        assert "resume_changed=allow" in said

    def test_allowed_when_it_is_asked_for_and_then_it_has_its_effect(self) -> None:
        saved = saved_by()
        model = nn.Linear(2, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.025)
        run = trainer(saved, model=model, optimizer=optimizer, max_duration="4ep", resume_changed="allow")
        with pytest.warns(UserWarning, match=r"(?s)goes on with changes.*optimizer.groups"):
            run.train()
        assert run.ctx.step == 16
        assert optimizer.param_groups[0]["lr"] == 0.025
        assert run.state_dict()["manifest"]["optimizer"]["groups"][0]["lr"] == 0.025  # the next sitting compares with this one

    def test_a_warning_names_what_may_differ_and_what_is_safe_is_silent(self) -> None:
        saved = saved_by()
        with pytest.warns(UserWarning, match=r"(?s)max_duration: 2ep → 3ep"):
            trainer(saved, max_duration="3ep").train()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer(saved, log_interval="1st").train()


class TestData:
    def test_no_random_number_is_drawn(self) -> None:
        run = trainer()
        before = torch.get_rng_state()
        _ = run.manifest
        assert torch.equal(before, torch.get_rng_state())

    def test_a_data_set_of_ones_own_class_is_not_read(self) -> None:
        class Counting:
            reads = 0

            def __len__(self) -> int:
                return 8

            def __getitem__(self, index: int) -> Any:
                self.reads += 1
                return torch.zeros(2), torch.zeros(1)

        data = Counting()
        described = trainer(data=data).manifest["data"]
        assert (data.reads, described["length"], described["samples"]) == (0, 8, None)

    def test_a_loader_is_described_by_its_data_set(self) -> None:
        described = trainer(data=DataLoader(rows(), batch_size=2)).manifest["data"]
        assert described == trainer().manifest["data"]


class TestSecrets:
    def test_none_is_recorded(self) -> None:
        canary = "hunter2"
        hidden = ["token", "api_key", "HF_TOKEN", "password", "client_secret", "secretValue", "credentials", "keys", "passwd"]
        table = dict.fromkeys(hidden, canary) | {"nested": {"wandb_api_key": canary}, "rows": [{"token": canary}]}
        table |= {"url": f"https://me:{canary}@host/x"}
        assert "70317031" not in json.dumps(plain({"password": 70317031, "credentials": {"user": [70317031]}}))
        assert canary not in json.dumps(plain(table))
        assert canary not in json.dumps(trainer(optimizer=Adam(api_key=canary)).manifest)

    @pytest.mark.parametrize(("key", "value"), [("tokenizer", "gpt2"), ("max_tokens", 5), ("monkeys", None), ("lr", 0.1)])
    def test_what_is_none_is_recorded(self, key: str, value: Any) -> None:
        assert plain({key: value}) == {key: value}

    def test_numbers_of_other_types_become_plain_ones(self) -> None:
        class Wide(float):
            pass

        found = plain({"signal": signal.SIGTERM, "lr": Wide(0.5), "on": True})
        assert found == {"signal": "SIGTERM", "lr": 0.5, "on": True} and type(found["lr"]) is float

    def test_what_is_no_option_becomes_the_name_of_its_type(self) -> None:
        assert plain({"t": torch.zeros(9), "f": print, "s": "x" * 2000}) == {
            "t": "(torch.Tensor)",
            "f": "(builtins.builtin_function_or_method)",
            "s": "(builtins.str)",
        }


class TestCommit:
    @pytest.fixture
    def repository(self, tmp_path: Path) -> Path:
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
        for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
            subprocess.run([*git, *words], cwd=tmp_path, check=True, capture_output=True)
        return tmp_path

    def commit(self, folder: Path) -> str:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True).stdout.strip()

    def test_of_a_branch_also_when_packed_or_detached_and_from_a_folder_below(self, repository: Path) -> None:
        expected = self.commit(repository)
        below = repository / "a" / "b"
        below.mkdir(parents=True)
        assert git_commit(below) == expected
        subprocess.run(["git", "pack-refs", "--all"], cwd=repository, check=True)
        assert git_commit(repository) == expected
        subprocess.run(["git", "checkout", "-q", "--detach"], cwd=repository, check=True)
        assert git_commit(repository) == expected

    def test_of_a_worktree(self, repository: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        subprocess.run(["git", "worktree", "add", "-q", "-b", "b", str(other)], cwd=repository, check=True, capture_output=True)
        assert git_commit(other) == self.commit(repository)

    def test_what_is_no_repository_has_none(self, tmp_path: Path) -> None:
        (tmp_path / ".git").write_text("gitdir: nowhere")
        assert git_commit(tmp_path) is None


class TestWhatChangesTraining:
    """A callback with events within the steps may change the weights: a changed option of it is warned of, others' are not."""

    @component
    class Scale(Callback):
        by: float = option(default=1.0)

        def on_gradients(self, ctx: Any) -> None: ...

    @component
    class Watch(Callback):
        often: int = option(default=1)

        def on_log(self, ctx: Any) -> None: ...

    @component
    class Waits(Callback):
        changes_training: ClassVar[bool] = False
        long: int = option(default=1)

        def on_clipped(self, ctx: Any) -> None: ...

    def judged(self, one: Callback, other: Callback | None) -> list[str]:
        plain_run = trainer()
        old, new = (
            Trainer(
                plain_run.model, plain_run.config, rows(), loss=nn.MSELoss(), optimizer=plain_run.ctx.optimizer, callbacks=c
            )
            for c in ([one], [other] if other else [])
        )
        return [c.verdict for c in compare(old.manifest, new.manifest) if c.key.startswith("callback:")]

    def test_verdicts_of_callbacks(self) -> None:
        assert self.judged(self.Scale(), self.Scale(by=2.0)) == ["warn"]
        assert self.judged(self.Scale(), None) == ["warn"]
        assert self.judged(self.Watch(), self.Watch(often=2)) == ["safe"]
        assert self.judged(self.Waits(), self.Waits(long=2)) == ["safe"]


class TestEvaluationData:
    def test_other_samples_are_warned_of(self) -> None:
        plain_run = trainer()

        def described(data: Any) -> Any:
            given = {"loss": nn.MSELoss(), "optimizer": plain_run.ctx.optimizer}
            return Trainer(plain_run.model, plain_run.config, rows(), data, **given).manifest

        other = TensorDataset(rows()[:][0] + 1, rows()[:][1])
        found = compare(described(rows()), described(other))
        assert [(c.key, c.verdict) for c in found] == [("eval_data.samples", "warn")]
        assert compare(described(rows()), described(rows())) == []

    def test_a_data_set_may_name_its_content(self) -> None:
        class Named(list[Any]):
            fingerprint = "one"

        one, other = Named(rows()), Named(rows())
        other.fingerprint = "two"
        [change] = compare(trainer(data=one).manifest, trainer(data=other).manifest)
        assert (change.key, change.verdict) == ("data.samples", "refuse")


def test_a_run_tells_what_has_changed_safely_as_well() -> None:
    run = trainer(saved_by(), log_interval="1st")
    run.train()
    assert [str(c) for c in run.resume_changes if "Restore" not in c.key] == [
        "log_interval: 10st → 1st (the training computes the same)"
    ]
