"""What `state_dict` holds is enough to go on exactly, in memory; storage is the checkpoint plugin's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from drivetrain import Callback, CallbackContext, DrivetrainError, PluginError, Trainer, TrainingConfig, component, state


@pytest.fixture(autouse=True)
def core_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVETRAIN_PLUGINS", "off")


@component
class Keep(Callback):
    """Takes a copy of the state after some step."""

    at: int
    seen: int = state(default=0)

    def on_step_end(self, ctx: CallbackContext) -> None:
        self.seen += 1
        if ctx.step == self.at:
            self.kept = copy.deepcopy(ctx.state_dict())


@component
class Restore(Keep):
    """Restores a state at the start."""

    saved: Any

    def on_restore(self, ctx: CallbackContext) -> None:
        ctx.load_state_dict(self.saved)


class Noisy:
    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((4,), index / 22) + torch.rand(4), torch.tensor([float(index)]) / 22


def trainer(callback: Callback, data: Any = None, fused: bool | None = None, **given: Any) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    config = TrainingConfig(**{"max_duration": "3ep", "per_device_batch_size": 4, "standard_callbacks": False} | given)
    callback.plugin_name = "callback:keep"
    return Trainer(
        model,
        config,
        Noisy() if data is None else data,
        loss=nn.MSELoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused),
        scheduler=lambda s: 1 / (1 + s),
        callbacks=[callback],
    )


def weights(run: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in run.model.parameters()])


def resumed(at: int, drop: str = "", data: Any = None, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of an uninterrupted run and of one that went on from step `at`, without one part of the state if `drop` names it."""
    keep = Keep(at=at)
    whole = trainer(keep, data, **given)
    whole.train()
    saved = keep.kept
    if drop:
        fresh = trainer(Keep(at=-1), data, **given).state_dict()
        saved[drop] = fresh[drop]
    rest = trainer(Restore(at=-1, saved=saved), data, **given)
    rest.train()
    assert drop or rest._run.components[0].seen == whole._run.components[0].seen  # type: ignore[attr-defined]
    return weights(whole), weights(rest)


@pytest.mark.parametrize(
    ("at", "accumulation"), [(1, 1), (3, 1), (5, 1), (6, 1), (7, 1), (12, 1), (17, 1), (1, 3), (2, 3), (3, 3), (5, 3)]
)
def test_going_on_is_bit_equal(at: int, accumulation: int) -> None:
    assert torch.equal(*resumed(at, gradient_accumulation_steps=accumulation))


@pytest.mark.parametrize("at", [2, 6, 9])
def test_going_on_is_bit_equal_with_workers(at: int) -> None:
    assert torch.equal(*resumed(at, dataloader={"num_workers": 2}))


@pytest.mark.parametrize("at", [2, 6, 9])
def test_going_on_is_bit_equal_with_a_loader_of_the_users(at: int) -> None:
    rows = torch.randn(22, 4, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(rows, rows[:, :1]), batch_size=4, shuffle=True)
    assert torch.equal(*resumed(at, data=loader))


@pytest.mark.parametrize("part", ["model", "optimizer", "rng", "progress"])
def test_negative_control_without_any_one_part_it_is_not(part: str) -> None:
    whole, rest = resumed(3, drop=part)
    assert not torch.equal(whole, rest)


@pytest.mark.parametrize(("saved", "here"), [(True, None), (None, True), (True, False)])
def test_kernels_are_this_runs_not_those_of_the_machine_where_it_was_saved(saved: bool | None, here: bool | None) -> None:
    keep = Keep(at=3)
    trainer(keep, fused=here).train()
    expected = trainer(Restore(at=-1, saved=copy.deepcopy(keep.kept)), fused=here)
    expected.train()
    keep.kept["optimizer"]["param_groups"][0]["fused"] = saved
    found = trainer(Restore(at=-1, saved=keep.kept), fused=here)
    found.train()
    assert found.ctx.optimizer.param_groups[0]["fused"] is here
    assert torch.equal(weights(found), weights(expected))


def test_a_state_that_does_not_fit_is_refused() -> None:
    keep = Keep(at=2)
    trainer(keep).train()
    with pytest.raises(DrivetrainError, match="lacks rng"):
        trainer(Restore(at=-1, saved={k: v for k, v in keep.kept.items() if k != "rng"})).train()
    wrong = copy.deepcopy(keep.kept)
    wrong["model"]["0.weight"] = torch.zeros(2, 2)
    with pytest.raises(DrivetrainError, match="weights do not fit"):
        trainer(Restore(at=-1, saved=wrong)).train()


def test_components_may_come_and_go_with_a_warning() -> None:
    keep = Keep(at=2)
    trainer(keep).train()
    changed = copy.deepcopy(keep.kept)
    changed["components"] = {"callback:gone": {"x": 1}}
    with pytest.warns(UserWarning) as caught:
        trainer(Restore(at=-1, saved=changed)).train()
    assert ["callback:gone" in str(w.message) or "callback:keep" in str(w.message) for w in caught] == [True, True]


def test_resume_from_a_path_without_a_checkpoint_plugin_is_an_error() -> None:
    with pytest.raises(PluginError, match="pip install drivetrain-checkpoint"):
        trainer(Keep(at=-1)).train(resume="somewhere")
