"""routed: several optimizers that are one to everyone else, and the mistakes that can be made in a table of routes."""

from __future__ import annotations

import pickle
from copy import deepcopy
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor, nn

import drivetrain_optimizers.routed as routed
from drivetrain import CallbackContext, Component, ConfigError, PluginError, TrainingConfig, component, make_component
from drivetrain_optimizers import Joined, Routed


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


ROUTES: dict[str, Any] = {
    "use": "routed",
    "routes": [
        {"match": "embed*", "use": "sgd", "lr": 0.1, "momentum": 0.9},
        {"match": "norm.*", "use": "lamb", "lr": 0.02},
        {"match": "*.bias", "use": "adam", "lr": 0.003},
    ],
    "default": {"use": "muon_torch", "lr": 0.01, "adamw": ["head.*"], "adamw_lr": 0.005},
}
OWNERS = {
    "embed.weight": 0.1,
    "norm.weight": 0.02,
    "norm.bias": 0.02,
    "up.bias": 0.003,
    "head.bias": 0.003,
    "up.weight": 0.01,
    "down.weight": 0.01,
    "head.weight": 0.005,
}


def without(routes: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return {"use": "routed", "routes": routes, "default": key}


def make(spec: Any, model: nn.Module) -> torch.optim.Optimizer:
    return make_component("optimizer", spec, "optimizer").make_optimizer(SimpleNamespace(model=model))  # type: ignore[attr-defined]


def train(model: nn.Module, *optimizers: torch.optim.Optimizer, steps: range = range(6)) -> None:
    for step in steps:
        ids = torch.randint(0, 11, (16,), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(ids), (ids + 1) % 11).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


DISJOINT = ROUTES | {"routes": [*ROUTES["routes"][:1], {"match": "norm.*", "use": "lamb", "lr": 0.02}]}
BIASES = {"match": "[uh]*.bias", "use": "adam", "lr": 0.003}
SPEC = ROUTES | {"routes": [*ROUTES["routes"][:2], BIASES]}


# -- who gets what


def test_every_parameter_goes_to_its_route_or_the_default() -> None:
    groups = make(SPEC, Model()).param_groups
    assert {name: group["lr"] for group in groups for name in group["param_names"]} == OWNERS
    assert [group.get("momentum") for group in groups if "embed.weight" in group["param_names"]] == [0.9]


def test_it_is_bit_equal_to_the_optimizers_apart() -> None:
    model, apart = Model(), Model()
    train(model, make(SPEC, model))
    named = dict(apart.named_parameters())
    optimizers = [
        torch.optim.SGD([named["embed.weight"]], lr=0.1, momentum=0.9, fused=True),
        make({"use": "lamb", "lr": 0.02, "decay": "matrices"}, apart.norm),
        torch.optim.Adam([named["up.bias"], named["head.bias"]], lr=0.003, fused=True),
        torch.optim.Muon([named["up.weight"], named["down.weight"]], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([named["head.weight"]], lr=0.005, weight_decay=0.1, betas=(0.9, 0.95), fused=True),
    ]
    train(apart, *optimizers)
    assert equal(model, apart)
    other = Model()
    train(other, make(SPEC | {"default": "adamw"}, other))
    assert not equal(model, other), "control"


def test_without_anything_left_the_default_is_not_needed() -> None:
    made = make(without([{"match": "*", "use": "sgd"}], "adamw"), Model())
    assert isinstance(made, Joined)
    assert [group["lr"] for group in made.param_groups] == [0.01]


def test_frozen_parameters_stay_frozen_and_are_nobodys() -> None:
    model = Model()
    model.embed.weight.requires_grad_(False)
    made = make(without([{"match": "up.*", "use": "sgd"}], "adamw"), model)
    assert "embed.weight" not in {name for group in made.param_groups for name in group["param_names"]}
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["embed.weight"]
    with pytest.raises(ConfigError, match=r"routes\[0\].match: the pattern 'embed\*' matches no parameter"):
        make(without([{"match": "embed*", "use": "sgd"}], "adamw"), model)


def test_wrapped_names_are_those_of_the_model() -> None:
    groups = make(SPEC, nn.ModuleDict({"module": Model()})).param_groups  # as DistributedDataParallel names it
    assert {name: group["lr"] for group in groups for name in group["param_names"]} == OWNERS


def test_routes_in_the_table_of_any_optimizer_leave_it_the_rest() -> None:
    table = {**SPEC["default"], "routes": SPEC["routes"]}
    for optimizer in (table, {"use": "routed", "default": SPEC["default"], "routes": SPEC["routes"]}):
        made = TrainingConfig(optimizer=optimizer).components().single["optimizer"]
        assert isinstance(made, Routed)
        groups = made.make_optimizer(cast(Any, SimpleNamespace(model=Model()))).param_groups
        assert {name: group["lr"] for group in groups for name in group["param_names"]} == OWNERS
    plain = TrainingConfig(optimizer=SPEC["default"]).components().single["optimizer"]
    assert not isinstance(plain, Routed), "control"
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(optimizer={"use": "adamw", "learning_rate": 1.0, "routes": [{"match": "x", "use": "sgd"}]}).components()
    assert "learning_rate" in str(caught.value)


# -- mistakes


@pytest.mark.parametrize(
    ("spec", "problems"),
    [
        (without([], "adamw"), {"optimizer.routed.routes": "is empty"}),
        (without([{"use": "sgd"}], "adamw"), {"optimizer.routed.routes[0].match": "is missing"}),
        (
            without([{"match": "up.*"}, {"match": "x", "use": "sdg"}], "adamw"),
            {
                "optimizer.routed.routes[0]": "expected a name or a table with the key 'use'",
                "optimizer.routed.routes[1]": "no plugin named 'sdg'",
            },
        ),
        (
            without([{"match": "up.*", "use": "sgd", "lr": -1.0}, {"match": "x", "use": "sgd", "moment": 1}], "adam_w"),
            {
                "optimizer.routed.routes[0].sgd.lr": "must be at least 0",
                "optimizer.routed.routes[1].sgd.moment": "unknown key.",
                "optimizer.routed.default": "no plugin named 'adam_w'",
            },
        ),
        ({"use": "routed"}, {"optimizer.routed.routes": "is missing"}),
        (without([{"match": "up.*", "use": "sgd"}], "adamw") | {"lr": 1.0}, {"optimizer.routed.lr": "unknown key."}),
    ],
)
def test_mistakes_in_the_table_are_all_found_before_anything_is_made(spec: Any, problems: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_component("optimizer", spec, "optimizer")
    found = {problem.path: problem.message for problem in caught.value.problems}
    assert set(found) == set(problems)
    assert all(found[path].startswith(message) for path, message in problems.items())


def test_a_parameter_matched_twice_and_a_pattern_without_one_are_both_said() -> None:
    routes = [{"match": "up.*", "use": "sgd"}, {"match": "*.bias", "use": "adam"}, {"match": "q.*", "use": "sgd"}]
    with pytest.raises(ConfigError) as caught:
        make(without(routes, "adamw"), Model())
    assert {problem.path: problem.message for problem in caught.value.problems} == {
        "optimizer.routed.routes[1].match": "'up.bias' is matched by routes[0] as well; make one narrower",
        "optimizer.routed.routes[2].match": "the pattern 'q.*' matches no parameter (names look like embed.weight, up.weight, "
        "up.bias)",
    }


@component
class Listening(Component):
    """An optimizer that needs an event of the run."""

    kind: ClassVar[str] = "optimizer"

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        return torch.optim.SGD(ctx.model.parameters())

    def on_step_start(self, ctx: CallbackContext) -> None: ...


@component
class Careless(Component):
    """An optimizer that takes every parameter, whether it needs a gradient or not."""

    kind: ClassVar[str] = "optimizer"

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        return torch.optim.SGD(ctx.model.parameters())


def test_an_optimizer_that_needs_events_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"listening": Listening, "careless": Careless}
    monkeypatch.setattr(routed, "make_component", lambda kind, spec, path: make_component(kind, known[spec["use"]](), path))
    with pytest.raises(ConfigError, match=r"routes\[0\]: Listening takes part in the run's events \(on_step_start\)"):
        Routed(routes=[{"match": "up.*", "use": "listening"}], default={"use": "careless"})
    optimizer = Routed(routes=[{"match": "up.*", "use": "careless"}], default={"use": "careless"})
    model = Model()
    with pytest.raises(PluginError, match="does not take exactly the parameters that its route gave it"):
        optimizer.make_optimizer(SimpleNamespace(model=model))  # type: ignore[arg-type]
    assert all(p.requires_grad for p in model.parameters())


# -- one optimizer to everyone else


def test_a_written_learning_rate_is_used_by_every_part() -> None:
    model = Model()
    optimizer = make(SPEC, model)
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
    train(straight, make(SPEC, straight), steps=range(8))
    optimizer = make(SPEC, model)
    train(model, optimizer, steps=range(4))
    if how == "state_dict":
        copy = Model()
        copy.load_state_dict(deepcopy(model.state_dict()))
        restored = make(SPEC, copy)
        restored.load_state_dict(deepcopy(optimizer.state_dict()))
    else:
        copy, restored = deepcopy((model, optimizer)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, optimizer)))
    assert {id(p): set(s) for p, s in restored.state.items()} == {
        id(q): set(optimizer.state[p]) for p, q in zip(model.parameters(), copy.parameters(), strict=True)
    }
    train(copy, restored, steps=range(4, 8))
    assert equal(copy, straight)
    for group in restored.param_groups:
        group["lr"] = 0.0
    train(copy, restored, steps=range(8, 9))
    assert equal(copy, straight)


def test_the_state_dict_has_the_form_of_any_optimizers() -> None:
    model = Model()
    optimizer = make(SPEC, model)
    train(model, optimizer, steps=range(1))
    state = optimizer.state_dict()
    indices = [index for group in state["param_groups"] for index in group["params"]]
    assert indices == list(range(8))
    assert set(state["state"]) == set(indices)
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    kinds = {name: set(state["state"][index]) for name, index in zip(names, indices, strict=True)}
    assert kinds["embed.weight"] == kinds["up.weight"] == {"momentum_buffer"}
    assert kinds["norm.bias"] == kinds["up.bias"] == {"step", "exp_avg", "exp_avg_sq"}
    assert set(optimizer.state) == set(model.parameters())


def test_a_part_with_a_way_of_its_own_to_store_its_state_keeps_it() -> None:
    """As 8-bit optimizers have: torch would give the state the parameters' type."""

    class Counting(torch.optim.SGD):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            for p, saved in zip(self.param_groups[0]["params"], state_dict["state"].values(), strict=True):
                self.state[p]["count"] = saved["count"]

    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    optimizer = Joined([torch.optim.Adam([params[0]]), Counting([params[1]], momentum=0.9)])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[params[1]]["count"] = torch.tensor([7], dtype=torch.uint8)
    saved = deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert optimizer.state[params[1]]["count"].dtype == torch.uint8
    assert torch.equal(saved["state"][1]["count"], torch.tensor([7], dtype=torch.uint8))


def test_hooks_around_loading_are_called_once() -> None:
    model = Model()
    optimizer = make(SPEC, model)
    train(model, optimizer, steps=range(1))
    calls: list[str] = []
    optimizer.register_load_state_dict_pre_hook(lambda self, state: calls.append("before"))  # type: ignore[arg-type, func-returns-value]
    optimizer.register_load_state_dict_post_hook(lambda self: calls.append("after"))
    optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
    assert calls == ["before", "after"]


def test_a_state_of_other_routes_is_refused() -> None:
    saved = make(DISJOINT | {"default": "adamw"}, Model()).state_dict()
    with pytest.raises(ValueError, match="its groups have other sizes"):
        make(SPEC, Model()).load_state_dict(saved)


def test_groups_cannot_be_added_later() -> None:
    with pytest.raises(TypeError, match="add them to a part before joining"):
        make(SPEC, Model()).add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_a_closure_is_called_once_and_its_loss_returned() -> None:
    model, calls = Model(), []

    def closure() -> Tensor:
        calls.append(1)
        loss = model(torch.arange(4)).square().mean()
        loss.backward()
        return loss

    assert make(SPEC, model).step(closure).item() > 0
    assert calls == [1]


@pytest.mark.parametrize("overflow", [False, True])
def test_parts_that_are_all_fused_leave_an_overflow_out_by_themselves(overflow: bool) -> None:
    """By torch's protocol with its scaler of gradients: nothing is read from the device before the parts have been called."""
    one, two = (nn.Parameter(torch.ones(3)) for _ in range(2))
    joined = Joined([torch.optim.AdamW([one], lr=0.1, fused=True), torch.optim.SGD([two], lr=0.1, fused=True)])
    assert joined._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    for parameter in (one, two):
        parameter.grad = torch.full((3,), 4.0)
    if overflow:
        two.grad[1] = float("inf")  # type: ignore[index]
    scaler.unscale_(joined)
    scaler.step(joined)
    scaler.update()
    assert (one.tolist() == two.tolist() == [1.0] * 3) is overflow
    assert scaler.get_scale() == (2.0 if overflow else 4.0)
    assert not any(hasattr(part, "found_inf") for part in joined._parts)


def test_one_part_that_is_not_fused_and_the_scaler_looks_first() -> None:
    one, two = (nn.Parameter(torch.ones(3)) for _ in range(2))
    assert not Joined([torch.optim.AdamW([one], fused=True), torch.optim.SGD([two], lr=0.1)])._step_supports_amp_scaling
