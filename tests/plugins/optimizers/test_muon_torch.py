"""muon_torch: one optimizer that is two, against the two apart and against Muon's formula."""

from __future__ import annotations

import pickle
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drivetrain import ConfigError, PluginError, make_component


class Model(nn.Module):
    """Embedding, two hidden layers, a norm and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 24)
        self.down = nn.Linear(24, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.norm(x + self.down(self.up(x).relu())))


HIDDEN = {"up.weight", "down.weight"}


def make(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return make_component("optimizer", {"use": "muon_torch", **options}, "optimizer").make_optimizer(
        SimpleNamespace(model=model)
    )


def train(model: nn.Module, *optimizers: torch.optim.Optimizer, steps: range = range(6)) -> None:
    for step in steps:
        ids = torch.randint(0, 11, (16,), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(ids), (ids + 1) % 11).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


def whose(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    return {name: group["algorithm"] for group in optimizer.param_groups for name in group["param_names"]}


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
def test_it_is_bit_equal_to_torchs_two_optimizers_apart(adjust_lr: str) -> None:
    model, apart = Model(), Model()
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "adamw_lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6}
    train(model, make(model, adjust_lr=adjust_lr, **options))
    named = dict(apart.named_parameters())
    muon = torch.optim.Muon(
        [named[name] for name in HIDDEN], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn=adjust_lr, ns_steps=5
    )
    outer = [named["embed.weight"], named["head.weight"]]
    flat = [p for p in apart.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": outer, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.8, 0.9),
        eps=1e-6,
        fused=True,
    )
    train(apart, muon, adamw)
    assert equal(model, apart)
    other = Model()
    train(other, make(other, adjust_lr=adjust_lr, **options | {"momentum": 0.91}))
    assert not equal(other, apart), "control: the settings matter"


def orthogonalized(matrix: Tensor) -> Tensor:
    """Five quintic Newton-Schulz steps with Jordan's coefficients, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def test_hidden_matrices_follow_muons_formula() -> None:
    model = Model()
    optimizer = make(model, lr=0.02, weight_decay=0.1, momentum=0.95)
    weight, buffer = model.up.weight.detach().double(), torch.zeros(24, 8, dtype=torch.float64)
    for step in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.sin(parameter.detach() * 7 + step)
        g = model.up.weight.grad.double()
        buffer = 0.95 * buffer + 0.05 * g
        update = orthogonalized((0.05 * g + 0.95 * buffer).T).T  # wide: rows are fewer than columns
        weight = weight * (1 - 0.02 * 0.1) - 0.02 * 0.2 * 24**0.5 * update
        optimizer.step()
    moved = (model.up.weight.detach().double() - weight).abs().max() / (0.02 * 0.2 * 24**0.5)
    assert moved < 0.05  # of one update; torch iterates in bfloat16


def test_an_update_is_nearly_orthogonal() -> None:
    model = Model()
    before = model.up.weight.detach().clone()
    optimizer = make(model, lr=1.0, weight_decay=0.0, adjust_lr="original")
    train(model, optimizer, steps=range(1))
    singular = torch.linalg.svdvals((before - model.up.weight.detach()) / 3**0.5)  # √(24/8)
    assert 0.5 < singular.min() < singular.max() < 1.3


# -- who gets what


def test_embeddings_norms_biases_and_the_head_go_to_adamw() -> None:
    found = whose(make(Model()))
    assert {name for name, algorithm in found.items() if algorithm == "muon"} == HIDDEN
    assert set(found) == {name for name, _ in Model().named_parameters()}


def test_a_head_tied_to_the_embedding_goes_to_adamw() -> None:
    model = Model()
    model.head.weight = model.embed.weight
    found = whose(make(model))
    assert {name for name, algorithm in found.items() if algorithm == "muon"} == HIDDEN


def test_a_wrapped_model_keeps_its_names() -> None:
    wrapped = nn.ModuleDict({"module": Model()})  # as DistributedDataParallel names it
    for found in (whose(make(wrapped)), whose(make(wrapped, adamw=["head.*", "embed.*"]))):
        assert {name for name, algorithm in found.items() if algorithm == "muon"} == HIDDEN


def test_patterns_say_which_matrices_adamw_keeps() -> None:
    found = whose(make(Model(), adamw=["embed*", "up.*"]))
    assert {name for name, algorithm in found.items() if algorithm == "muon"} == {"down.weight", "head.weight"}


def test_rates_and_decay_of_both_parts() -> None:
    groups = make(Model(), lr=0.02, adamw_lr=1e-3, groups=[{"match": "down.*", "lr": 0.5}, {"match": "head.bias", "lr": 0.02}])
    found = {name: (g["lr"], g["weight_decay"]) for g in groups.param_groups for name in g["param_names"]}
    assert found["up.weight"] == (0.02, 0.1)
    assert found["down.weight"] == (0.5, 0.1)
    assert found["head.weight"] == found["embed.weight"] == (1e-3, 0.1)
    assert found["norm.weight"] == (1e-3, 0.0)
    assert found["head.bias"] == (0.02, 0.0)


@pytest.mark.parametrize(
    ("options", "path", "message"),
    [
        ({"adamw": ["embedding.*"]}, "optimizer.muon_torch.adamw[0]", "'embedding.*' matches no matrix"),
        ({"adamw": ["*"]}, "optimizer.muon_torch", "no matrix is left for Muon"),
        ({"momentum": 1.0}, "optimizer.muon_torch.momentum", "below 1"),
        ({"adamw_lr": -1.0}, "optimizer.muon_torch.adamw_lr", "at least 0"),
    ],
)
def test_problems_are_named_with_their_path(options: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(Model(), **options)
    (problem,) = caught.value.problems
    assert problem.path == path
    assert message in problem.message


def test_a_model_without_hidden_matrices_is_refused() -> None:
    with pytest.raises(ConfigError, match="no matrix is left for Muon"):
        make(nn.Linear(3, 3))


def test_an_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(PluginError, match=r"needs torch 2\.9"):
        make(Model())


# -- one optimizer to everyone else


def test_a_written_learning_rate_is_used_by_both_parts() -> None:
    model = Model()
    optimizer = make(model)
    train(model, optimizer, steps=range(2))
    before = deepcopy(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, steps=range(2, 4))
    assert equal(model, before)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    train(model, optimizer, steps=range(4, 5))
    assert not any(torch.equal(x, y) for x, y in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_a_restored_optimizer_goes_on_bit_equal_and_still_obeys_its_groups(how: str) -> None:
    straight, model = Model(), Model()
    train(straight, make(straight), steps=range(8))
    optimizer = make(model)
    train(model, optimizer, steps=range(4))
    if how == "state_dict":
        copy = Model()
        copy.load_state_dict(deepcopy(model.state_dict()))
        restored = make(copy)
        restored.load_state_dict(deepcopy(optimizer.state_dict()))
    else:
        copy, restored = deepcopy((model, optimizer)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, optimizer)))
    train(copy, restored, steps=range(4, 8))
    assert equal(copy, straight)
    for group in restored.param_groups:
        group["lr"] = 0.0
    train(copy, restored, steps=range(8, 9))
    assert equal(copy, straight)


def test_every_parameter_has_its_state_in_the_one_state_dict() -> None:
    model = Model()
    optimizer = make(model)
    train(model, optimizer, steps=range(1))
    state = optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    kinds = {name: set(state["state"][index]) for index, name in enumerate(names)}
    assert len(kinds) == len(list(model.parameters()))
    assert all(
        parts == ({"momentum_buffer"} if name in HIDDEN else {"step", "exp_avg", "exp_avg_sq"}) for name, parts in kinds.items()
    )


def test_a_closure_is_called_once_and_its_loss_returned() -> None:
    model, calls = Model(), []

    def closure() -> Tensor:
        calls.append(1)
        loss = model(torch.arange(4)).square().mean()
        loss.backward()
        return loss

    assert make(model).step(closure).item() > 0
    assert calls == [1]
