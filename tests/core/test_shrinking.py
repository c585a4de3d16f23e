"""Memory that runs out in a step: halves of microbatches, the same samples, the same loss."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drivetrain import Callback, CallbackContext, Loss, Precision, Strategy, Trainer, TrainingConfig
from drivetrain.data import Window
from drivetrain.shrinking import divided


class Hungry(nn.Module):
    """Has memory for so many samples; asks for more in the backward of the layer, or in forward."""

    def __init__(self, room: int, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))
        self.room = room
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.layers(x)
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.sizes.append(len(x))
        return hidden


DATA = TensorDataset(torch.randn(44, 3, generator=torch.Generator().manual_seed(1)), torch.arange(44.0)[:, None] / 44)


def mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


def weighted(outputs: Tensor, targets: Tensor) -> Loss:
    """Samples count differently, as sequences of different lengths do."""
    weight = (targets * 44).long() % 5 + 1
    return Loss((weight * (outputs - targets).square()).sum(), weight.sum())


def trained(model: nn.Module, steps: int = 8, loss: Any = mean, data: Any = DATA, **given: Any) -> Trainer:
    config = {
        "max_duration": f"{steps}st",
        "per_device_batch_size": 8,
        "standard_callbacks": False,
        "device": "cpu",
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = Trainer(model, TrainingConfig(**{**config, **given}), data, loss=loss, optimizer=optimizer, precision=Precision())
    trainer.train()
    return trainer


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("loss", [mean, weighted])
def test_the_run_ends_as_one_configured_so_from_the_beginning(loss: Any) -> None:
    """Bit by bit within the first epoch, whose short last step would have one microbatch by configuration and has two here; and to
    rounding as one with memory enough."""
    small, configured, large = Hungry(room=4), Hungry(room=4), Hungry(room=99)
    with pytest.warns(UserWarning, match=r"step 1 ran out of memory .* 2 microbatches of 4 samples.*per_device_batch_size = 4"):
        trainer = trained(small, loss=loss)
    trained(large, loss=loss)
    assert small.sizes[:4] == [4, 4, 4, 4] and max(small.sizes) == 4
    assert trainer.ctx.samples == 44 + 16
    torch.testing.assert_close(weights(small), weights(large), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weights(small), weights(Hungry(room=4)))
    again = Hungry(room=4)
    with pytest.warns(UserWarning, match="ran out of memory"):
        trained(again, steps=5, loss=loss)
    trained(configured, steps=5, loss=loss, per_device_batch_size=4, gradient_accumulation_steps=2)
    assert torch.equal(weights(again), weights(configured))


def test_halving_goes_on_until_it_fits_with_unequal_halves() -> None:
    small, large = Hungry(room=2), Hungry(room=99)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trained(small, per_device_batch_size=7, max_grad_norm=False)
    told = [str(w.message) for w in said if "ran out of memory" in str(w.message)]
    assert [text.partition(" microbatches of ")[2].partition(" samples")[0] for text in told] == ["4 or 3", "2 or 1"]
    assert set(small.sizes) == {1, 2}
    trained(large, per_device_batch_size=7, max_grad_norm=False)
    torch.testing.assert_close(weights(small), weights(large), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("samples", [41, 42])
def test_a_step_with_a_microbatch_of_few_samples_is_divided_as_any_other(samples: int) -> None:
    """An epoch's last one: 8, 8 and 1. What fitted in the first step is not halved once more for it."""
    small, large = Hungry(room=4), Hungry(room=99)
    data = TensorDataset(*(tensor[:samples] for tensor in DATA.tensors))
    given = {"gradient_accumulation_steps": 3, "data": data, "steps": 4, "max_grad_norm": False}
    with pytest.warns(UserWarning, match="ran out of memory"):
        trainer = trained(small, **given)
    trained(large, **given)
    assert trainer.ctx.microbatch_parts == 2 and max(small.sizes) == 4
    torch.testing.assert_close(weights(small), weights(large), rtol=1e-5, atol=1e-6)


class Stop(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, ctx: CallbackContext) -> None:
        if ctx.step == self.at:
            ctx.trainer.stop("test")

    def on_run_end(self, ctx: CallbackContext) -> None:
        self.saved = copy.deepcopy(ctx.state_dict())


def test_a_run_that_goes_on_begins_with_the_size_that_fitted() -> None:
    """Dropout draws once for each microbatch: were the first size tried again, the rest would draw other numbers."""

    def made(model: nn.Module, *callbacks: Callback) -> Trainer:
        config = TrainingConfig(max_duration="8st", per_device_batch_size=8, standard_callbacks=False, device="cpu")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return Trainer(model, config, DATA, loss=mean, optimizer=optimizer, callbacks=callbacks, precision=Precision())

    whole, first, second = (Hungry(room=4, dropout=0.5) for _ in range(3))
    with pytest.warns(UserWarning, match="ran out of memory"):
        made(whole).train()
    with pytest.warns(UserWarning, match="ran out of memory"):
        stop = Stop(at=3)
        made(first, stop).train()
    saved = stop.saved

    class Restore(Callback):
        def on_restore(self, ctx: CallbackContext) -> None:
            ctx.load_state_dict(saved)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="callback:.* took no part")
        made(second, Restore()).train()
    assert torch.equal(weights(whole), weights(second))
    saved["progress"]["microbatch_parts"] = 1  # the control
    forgetful = Hungry(room=4, dropout=0.5)
    with pytest.warns(UserWarning, match="ran out of memory"):
        made(forgetful, Restore()).train()
    assert not torch.equal(weights(whole), weights(forgetful))


def test_a_single_sample_that_does_not_fit_ends_the_run_with_a_remedy() -> None:
    with warnings.catch_warnings(), pytest.raises(torch.OutOfMemoryError) as failure:
        warnings.simplefilter("ignore")
        trained(Hungry(room=0))
    assert "activation_checkpointing" in "".join(failure.value.__notes__)


def test_other_errors_pass() -> None:
    class Broken(Hungry):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied") as failure:
        trained(Broken(room=9))
    assert not hasattr(failure.value, "__notes__")


class Two(Strategy):
    world_size = 2

    def gather(self, value: Any) -> list[Any]:
        return [value, value]


def test_one_of_several_ranks_cannot_go_on_alone() -> None:
    model = Hungry(room=4)
    config = TrainingConfig(max_duration="2st", per_device_batch_size=8, standard_callbacks=False, device="cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(torch.OutOfMemoryError) as failure:
        Trainer(model, config, DATA, loss=mean, optimizer=optimizer, strategy=Two(), precision=Precision()).train()
    note = "".join(failure.value.__notes__)
    assert "Lower per_device_batch_size from 8 to 4 and double gradient_accumulation_steps" in note


def test_several_ranks_take_no_smaller_microbatches_over() -> None:
    """Of a round that is not full one has 3 samples and one 2: divided by 4 they would go on in 3 and 2 microbatches."""
    with pytest.warns(UserWarning, match="ran out of memory"):
        saved = copy.deepcopy(trained(Hungry(room=4), steps=1).state_dict())
    assert saved["progress"]["microbatch_parts"] == 2
    for strategy, parts in ((Strategy(), 2), (Two(), 1)):
        model = Hungry(room=4)
        config = TrainingConfig(
            max_duration="8st", per_device_batch_size=8, standard_callbacks=False, device="cpu", resume_changed="allow"
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        trainer = Trainer(model, config, DATA, loss=mean, optimizer=optimizer, strategy=strategy, precision=Precision())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.load_state_dict(saved)
        assert trainer.ctx.microbatch_parts == parts


def test_batches_of_any_form_are_divided_by_samples() -> None:
    rows = torch.arange(10).reshape(5, 2)
    batch: Mapping[str, Any] = {
        "ids": rows,
        "names": ["a", "b", "c", "d", "e"],
        "pair": (rows[:, 0], 7),
        "one": torch.tensor(3),
    }
    found = divided(Window([batch], [5], 5), 2)
    assert found is not None and found.counts == [2, 3] and found.total == 5
    assert torch.equal(torch.cat([part["ids"] for part in found.batches]), rows)
    assert [part["names"] for part in found.batches] == [["a", "b"], ["c", "d", "e"]]
    assert [len(part["pair"][0]) for part in found.batches] == [2, 3] and found.batches[0]["pair"][1] == 7
    assert all(part["one"] == 3 for part in found.batches)
    stand_in = divided(Window([rows], [0], 5), 5)
    assert stand_in is not None and stand_in.counts == [0] * 5 and [len(part) for part in stand_in.batches] == [1] * 5
    single = divided(Window([rows, rows[:1]], [5, 1], 6), 6)
    assert single is not None and [len(part) for part in single.batches] == single.counts == [1] * 6 and single.total == 6
    assert divided(single, 2) is None
