"""Muon's step against its formula, torch.optim.Muon and torch.optim.AdamW, and the rule of who gets what."""

from __future__ import annotations

import pickle
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from drivetrain import ConfigError, ModelError, make_component
from drivetrain_muon import Muon, MuonComponent, orthogonalize


class Model(nn.Module):
    """Embedding, hidden layers of two shapes, a norm and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.up = nn.ModuleList(nn.Linear(8, 24) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(24, 8, bias=False) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return self.head(self.norm(x))


HIDDEN = {f"{part}.{index}.weight" for part in ("up", "down") for index in range(3)}


def make(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    component = make_component("optimizer", {"use": "muon", **options}, "optimizer")
    return component.make_optimizer(SimpleNamespace(model=model))  # type: ignore[attr-defined]


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


def matrices(*shapes: tuple[int, int]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    for index, p in enumerate(params):
        p.grad = torch.sin(7 * p.detach() + step + index)


# -- the step


def formula(x: Tensor, g: Tensor, memory: dict[str, Any], o: dict[str, Any]) -> Tensor:
    """One update of one matrix, by the singular value decomposition in place of polynomials, in the papers' words."""
    memory["m"] = o["momentum"] * memory.get("m", torch.zeros_like(g)) + (1 - o["momentum"]) * g
    u, _, vh = torch.linalg.svd((1 - o["momentum"]) * g + o["momentum"] * memory["m"], full_matrices=False)
    update = u @ vh
    if o["normuon"]:
        b = o["normuon_beta"]
        memory["v"] = b * memory.get("v", torch.zeros(len(g), 1, dtype=g.dtype)) + (1 - b) * (update**2).mean(1, keepdim=True)
        rows = update / memory["v"].sqrt()
        update = rows * (min(g.shape) ** 0.5 / rows.norm())  # the norm of an orthogonal factor
    r, c = g.shape
    scale = 0.2 * max(r, c) ** 0.5 if o["adjust_lr"] == "match_rms_adamw" else max(1, r / c) ** 0.5
    decay = o["weight_decay"] * ((update * x >= 0) if o["cautious"] else 1)
    return x - o["lr"] * decay * x - o["lr"] * scale * update


BASE = {
    "lr": 0.02,
    "weight_decay": 0.1,
    "momentum": 0.9,
    "adjust_lr": "match_rms_adamw",
    "normuon": False,
    "normuon_beta": 0.8,
    "cautious": False,
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"adjust_lr": "original"},
        {"normuon": True},
        {"cautious": True},
        {"normuon": True, "cautious": True, "momentum": 0.0},
    ],
    ids=str,
)
def test_six_steps_follow_the_formula(change: dict[str, Any]) -> None:
    settings = BASE | change
    params = matrices((5, 9), (5, 9), (12, 4), (6, 6), (5, 9))
    expected, memories = [p.detach().clone() for p in params], [{} for _ in params]
    optimizer = Muon(params, ns_steps=15, **settings)  # type: ignore[arg-type]
    for step in range(6):
        set_gradients(params, step)
        expected = [formula(x, p.grad, m, settings) for x, p, m in zip(expected, params, memories, strict=True)]  # type: ignore[arg-type]
        optimizer.step()
    for p, x in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-7, atol=1e-7)


def test_the_formula_test_would_notice_each_setting() -> None:
    results = []
    for change in ({}, {"adjust_lr": "original"}, {"normuon": True}, {"cautious": True}, {"momentum": 0.8}):
        params = matrices((9, 5))  # rows of a wide orthogonal matrix are even already
        optimizer = Muon(params, ns_steps=9, **(BASE | change))  # type: ignore[arg-type]
        for step in range(6):
            set_gradients(params, step)
            optimizer.step()
        results.append(params[0].detach())
    assert all((x - results[0]).abs().max() > 1e-4 for x in results[1:])


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
def test_one_matrix_agrees_with_torchs_muon(adjust_lr: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = nn.Parameter(torch.randn(shape, generator=generator))
    theirs = nn.Parameter(ours.detach().clone())
    mine = Muon([ours], lr=0.02, adjust_lr=adjust_lr, coefficients="newton_schulz")
    torchs = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust_lr)
    moved = 0.0
    for step in range(5):
        before = theirs.detach().clone()
        ours.grad = theirs.grad = torch.sin(7 * before + step)
        mine.step()
        torchs.step()
        moved += (theirs.detach() - before).norm().item()
    assert (ours - theirs).norm().item() < 0.02 * moved  # torch iterates in bfloat16
    torch.testing.assert_close(mine.state[ours]["momentum_buffer"], torchs.state[theirs]["momentum_buffer"])


def test_batched_is_one_by_one() -> None:
    together, apart = matrices(*[(5, 9)] * 4, (9, 5)), matrices(*[(5, 9)] * 4, (9, 5))
    optimizers = [Muon([p], normuon=True) for p in apart]
    optimizer = Muon(together, normuon=True)
    for step in range(4):
        set_gradients(together, step)
        set_gradients(apart, step)
        optimizer.step()
        for single in optimizers:
            single.step()
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_many_matrices_are_cut_into_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(stack: Tensor, *settings: Any) -> Tensor:
        seen.append(tuple(stack.shape))
        return orthogonalize(stack, *settings)

    monkeypatch.setattr("drivetrain_muon.optimizer._MOST", 100)
    monkeypatch.setattr("drivetrain_muon.optimizer.orthogonalize", spy)
    params = matrices(*[(5, 9)] * 5, (20, 9))
    set_gradients(params, 0)
    Muon(params).step()
    assert seen == [(2, 5, 9), (2, 5, 9), (1, 5, 9), (1, 20, 9)]


def test_the_rest_is_bit_equal_to_torchs_adamw() -> None:
    model, apart = Model(), Model()
    options = {"lr": 0.02, "weight_decay": 0.1, "adamw_lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6}
    optimizer = make(model, **options)
    named = dict(apart.named_parameters())
    rest = [p for name, p in named.items() if name not in HIDDEN]
    groups = [
        {"params": [p for p in rest if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-6, fused=True)
    muon = Muon([named[name] for name in sorted(HIDDEN, reverse=True)], lr=0.02)
    train(model, optimizer)
    train(apart, muon, adamw)
    for (name, p), (_, q) in zip(model.named_parameters(), apart.named_parameters(), strict=True):
        if name not in HIDDEN:
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)  # the stack's order changes last bits of the hidden ones
    before = dict(model.named_parameters())["head.bias"].detach().clone()
    assert not torch.equal(before, Model().head.bias)


def test_only_an_adamw_group_is_bit_equal_to_torchs_adamw() -> None:
    ours, theirs = Model(), Model()
    adamw = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    train(ours, Muon([{"params": list(ours.parameters()), "algorithm": "adamw"}], lr=0.01))
    train(theirs, adamw)
    assert equal(ours, theirs)


def test_a_device_without_fused_kernels_takes_the_plain_ones() -> None:
    model = Model().to("meta")
    optimizer = make(model)
    assert [g["fused"] for g in optimizer.param_groups if g["algorithm"] == "adamw"] == [False, False]


# -- what parameters may be like


def test_none_gradients_empty_matrices_and_scalars() -> None:
    idle, empty, scalar, used = (
        nn.Parameter(torch.ones(2, 2)),
        nn.Parameter(torch.empty(0, 3)),
        nn.Parameter(torch.tensor(1.0)),
        nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16)),
    )
    optimizer = Muon([{"params": [idle, empty, used]}, {"params": [scalar], "algorithm": "adamw"}], lr=0.5)
    empty.grad, scalar.grad = torch.empty(0, 3), torch.tensor(2.0)
    used.grad = torch.randn(2, 3, dtype=torch.bfloat16)
    optimizer.step()
    assert torch.equal(idle.detach(), torch.ones(2, 2))
    assert scalar.item() < 1.0
    assert not torch.equal(used.detach(), torch.ones(2, 3, dtype=torch.bfloat16))
    assert optimizer.state[used]["momentum_buffer"].dtype == torch.bfloat16


def test_a_vector_in_a_group_of_muon_is_refused() -> None:
    with pytest.raises(ModelError, match=r"a parameter of shape \(4,\) has 1 dimensions.*algorithm = 'adamw'"):
        Muon([nn.Parameter(torch.ones(4))])


def test_a_sparse_gradient_is_refused_by_name_and_nothing_changes() -> None:
    model = Model()
    model.embed = nn.Embedding(11, 8, sparse=True)
    optimizer, before = make(model), deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"the gradient of 'embed\.weight' is sparse"):
        train(model, optimizer, steps=range(1))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_sharded_matrices_follow_the_whole_ones() -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded, whole = Model(), Model()
        fully_shard(sharded)
        for model in (sharded, whole):
            train(model, make(model, normuon=True, cautious=True))
        assert isinstance(sharded.up[0].weight, DTensor)
        for a, b in zip(sharded.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(a.full_tensor(), b, rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]
    finally:
        dist.destroy_process_group()


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


class Reversed(Model):
    """Its output layer is not the last linear one, as its `get_output_embeddings` says."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(8, 8, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_the_output_layer_is_the_one_that_the_model_says() -> None:
    for model in (Reversed(), nn.ModuleDict({"module": Reversed()})):
        found = whose(make(model))
        assert {name for name, algorithm in found.items() if algorithm == "muon"} == HIDDEN | {"extra.weight"}
    silent = Reversed()
    silent.get_output_embeddings = lambda: None  # type: ignore[assignment, method-assign, return-value]
    found = whose(make(silent))
    assert {name for name, algorithm in found.items() if algorithm == "muon"} == HIDDEN | {"head.weight"}, "the last, then"


def test_kernels_of_convolutions_are_matrices_of_their_outputs() -> None:
    """A step on a kernel is the step on the matrix that it is when it is flattened."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv1d(4, 6, 2), nn.Flatten(), nn.Linear(6, 2))
    made = make(model, lr=0.1, normuon=True, cautious=True)
    assert {name for name, algorithm in whose(made).items() if algorithm == "muon"} == {"0.weight", "2.weight"}
    kernel = model[0].weight
    flat = nn.Parameter(kernel.detach().flatten(1).clone())
    group = next(g for g in made.param_groups if any(p is kernel for p in g["params"]))
    other = Muon([{**{k: v for k, v in group.items() if k != "param_names"}, "params": [flat]}])
    for seed in range(3):
        gradient = torch.randn(flat.shape, generator=torch.Generator().manual_seed(seed))
        kernel.grad, flat.grad = gradient.view_as(kernel).clone(), gradient.clone()
        made.step()
        other.step()
    torch.testing.assert_close(kernel.detach().flatten(1), flat.detach(), rtol=1e-6, atol=1e-7)
    assert kernel.shape == (8, 3, 3, 3)


def test_a_wrapped_model_keeps_its_names() -> None:
    wrapped = nn.ModuleDict({"module": Model()})  # as DistributedDataParallel names it
    found = whose(make(wrapped, adamw=["head.*", "embed.*"]))
    assert {name for name, algorithm in found.items() if algorithm == "muon"} == HIDDEN


def test_patterns_say_which_matrices_adamw_keeps() -> None:
    found = whose(make(Model(), adamw=["embed*", "up.*"]))
    muons = {name for name, algorithm in found.items() if algorithm == "muon"}
    assert muons == {"down.0.weight", "down.1.weight", "down.2.weight", "head.weight"}


def test_rates_and_decay_of_both_parts() -> None:
    options = {"lr": 0.02, "adamw_lr": 1e-3, "groups": [{"match": "down.0.*", "lr": 0.5}, {"match": "head.bias", "lr": 0.02}]}
    groups = make(Model(), **options).param_groups
    found = {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["param_names"]}
    assert found["up.0.weight"] == (0.02, 0.1)
    assert found["down.0.weight"] == (0.5, 0.1)
    assert found["head.weight"] == found["embed.weight"] == (1e-3, 0.1)
    assert found["norm.weight"] == (1e-3, 0.0)
    assert found["head.bias"] == (0.02, 0.0)


@pytest.mark.parametrize(
    ("options", "path", "message"),
    [
        ({"adamw": ["embedding.*"]}, "optimizer.muon.adamw[0]", "'embedding.*' matches no matrix (there are embed.weight,"),
        ({"adamw": ["*"]}, "optimizer.muon", "no matrix is left for Muon"),
        ({"momentum": 1.0}, "optimizer.muon.momentum", "must be at least 0 and below 1"),
        ({"adamw_lr": -1.0}, "optimizer.muon.adamw_lr", "must be at least 0"),
        ({"ns_steps": 0}, "optimizer.muon.ns_steps", "must be at least 1, got 0"),
        ({"coefficients": "polar"}, "optimizer.muon.coefficients", "expected one of 'polar_express', 'newton_schulz'"),
        ({"groups": [{"match": "x.*", "lr": 1.0}]}, "optimizer.muon.groups[0].match", "'x.*' matches no parameter"),
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


def test_options_reach_the_groups() -> None:
    chosen = {"coefficients": "newton_schulz", "ns_steps": 7, "normuon": True, "normuon_beta": 0.5, "cautious": True}
    groups = make(Model(), momentum=0.5, adjust_lr="original", **chosen).param_groups
    first, *rest = groups
    assert {key: first[key] for key in chosen} == chosen
    assert (first["momentum"], first["adjust_lr"]) == (0.5, "original")
    assert [g["algorithm"] for g in rest] == ["adamw", "adamw"]


# -- state


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
@pytest.mark.parametrize("options", [{}, {"normuon": True}], ids=str)
def test_a_restored_optimizer_goes_on_bit_equal(how: str, options: dict[str, Any]) -> None:
    straight, model = Model(), Model()
    train(straight, make(straight, **options), steps=range(8))
    optimizer = make(model, **options)
    train(model, optimizer, steps=range(4))
    if how == "state_dict":
        copy = Model()
        copy.load_state_dict(deepcopy(model.state_dict()))
        restored = make(copy, **options)
        restored.load_state_dict(deepcopy(optimizer.state_dict()))
    else:
        copy, restored = deepcopy((model, optimizer)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, optimizer)))
    train(copy, restored, steps=range(4, 8))
    assert equal(copy, straight)


@pytest.mark.parametrize("part", ["momentum_buffer", "row_moment", "exp_avg", "exp_avg_sq", "step"])
def test_each_part_of_the_state_matters(part: str) -> None:
    results = []
    for forget in (False, True):
        model = Model()
        optimizer = make(model, normuon=True)
        train(model, optimizer, steps=range(3))
        for state in optimizer.state.values():
            if forget and part in state:
                state[part].zero_()
        train(model, optimizer, steps=range(3, 5))
        results.append(model)
    assert not equal(*results)


def test_every_parameter_has_its_own_state() -> None:
    model = Model()
    optimizer = make(model, normuon=True)
    train(model, optimizer, steps=range(1))
    state = optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    kinds = {name: set(state["state"][index]) for index, name in enumerate(names)}
    muon, adamw = {"momentum_buffer", "row_moment"}, {"step", "exp_avg", "exp_avg_sq"}
    assert all(parts == (muon if name in HIDDEN else adamw) for name, parts in kinds.items())
    assert state["state"][0]["row_moment"].shape == (24, 1)


def test_a_closure_is_called_once_and_its_loss_returned() -> None:
    model, calls = Model(), []

    def closure() -> Tensor:
        calls.append(1)
        loss = model(torch.arange(4)).square().mean()
        loss.backward()
        return loss

    assert make(model).step(closure).item() > 0
    assert calls == [1]


def test_the_docstring_cites_its_sources() -> None:
    text = MuonComponent.__doc__ or ""
    assert all(source in text for source in ("kellerjordan.github.io", "arXiv:2505.16932", "arXiv:2502.16982, equation 4"))
