"""Adam, AdamW and SGD that call torch's kernel at once: bit-equal to torch's own, and torch's own step wherever it must be."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from drivetrain_optimizers import direct

ADAM, ADAMW, SGD = PAIRS = [
    (torch.optim.Adam, direct.Adam),
    (torch.optim.AdamW, direct.AdamW),
    (torch.optim.SGD, direct.SGD),
]
OF_ADAM: list[dict[str, Any]] = [{}, {"amsgrad": True}, {"maximize": True}, {"betas": (0.5, 0.7), "eps": 1e-3}]
OF_SGD: list[dict[str, Any]] = [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "dampening": 0.2}]


class Pair:
    """One model twice, with torch's optimizer and with ours."""

    def __init__(self, theirs: Any, ours: Any, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
        self.models = [model, copy.deepcopy(model)]
        self.optimizers = [
            cls(self._groups(model), lr=1e-2, fused=True, **options)
            for cls, model in zip((theirs, ours), self.models, strict=True)
        ]
        self.generator = torch.Generator().manual_seed(1)

    @staticmethod
    def _groups(model: nn.Module) -> list[dict[str, Any]]:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        return [
            {"params": matrices, "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0},
        ]

    @property
    def ours(self) -> Any:
        return self.optimizers[1]

    def both(self, do: Callable[[nn.Module, Any], Any]) -> None:
        """The same to both."""
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            do(model, optimizer)

    def train(self, steps: int = 3) -> None:
        """Steps on the same numbers, then: the same bits everywhere."""
        dtype = next(self.models[0].parameters()).dtype
        for _ in range(steps):
            inputs = torch.randn(4, 8, generator=self.generator).to(dtype)
            for model, optimizer in zip(self.models, self.optimizers, strict=True):
                model(inputs).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        self.check()

    def check(self) -> None:
        for one, other in zip(*(model.parameters() for model in self.models), strict=True):
            assert torch.equal(one, other)
        one, other = (optimizer.state_dict() for optimizer in self.optimizers)
        assert one["param_groups"] == other["param_groups"]
        assert list(one["state"]) == list(other["state"])
        for mine, its in zip(one["state"].values(), other["state"].values(), strict=True):
            assert mine.keys() == its.keys()
            assert all(torch.equal(mine[key], its[key]) and mine[key].dtype == its[key].dtype for key in mine)


@pytest.fixture(autouse=True, params=["compiler imported", "compiler not imported"])
def imported(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds either way; torch's own optimizers, which take part, do import it."""
    modules = {} if "not" in request.param else {"torch._dynamo": None}
    monkeypatch.setattr(direct, "sys", SimpleNamespace(modules=modules))


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which steps of ours torch's own step made."""
    made: list[str] = []
    for _, cls in PAIRS:
        inner = cls._whole_step

        def counted(self: Any, closure: Any, inner: Any = inner) -> Any:
            made.append(type(self).__name__)
            return inner(self, closure)

        monkeypatch.setattr(cls, "_whole_step", counted)
    return made


@pytest.mark.parametrize(
    ("classes", "options"),
    [*((classes, options) for classes in (ADAM, ADAMW) for options in OF_ADAM), *((SGD, options) for options in OF_SGD)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bit_equal_to_torchs(classes: Any, options: dict[str, Any], dtype: torch.dtype, whole: list[str]) -> None:
    if classes is SGD and dtype == torch.bfloat16:
        pytest.skip("torch's kernel does not compute SGD with it, and the component does not use it")
    pair = Pair(*classes, dtype, **options)
    pair.train(20)
    assert len(whole) == 1  # only the first step, which makes the state
    for group in (group for optimizer in pair.optimizers for group in optimizer.param_groups):  # as a schedule does
        group["lr"] = 3e-3
    pair.train(5)
    assert len(whole) == 1


def test_a_step_not_made_would_be_seen() -> None:
    pair = Pair(*ADAMW)
    pair.train(3)
    pair.ours.state[pair.ours.param_groups[1]["params"][2]]["exp_avg"].mul_(1 + 1e-6)
    with pytest.raises(AssertionError):
        pair.train(1)


def test_the_host_does_a_fraction(whole: list[str]) -> None:
    pair = Pair(*ADAMW)
    pair.train(3)
    theirs, ours = (calls(optimizer.step) for optimizer in pair.optimizers if has_gradients(optimizer))
    assert ours <= theirs / 3


def has_gradients(optimizer: Any) -> bool:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    return True


def calls(function: Callable[[], Any]) -> int:
    """Python functions called."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


# -- what changes between two steps ---------------------------------------------------------------------------------------------


def load_own_state(model: nn.Module, optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def load_other_state(model: nn.Module, optimizer: Any) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["exp_avg"].mul_(2)
        entry["step"].add_(5)
    optimizer.load_state_dict(saved)


def replace_a_tensor(model: nn.Module, optimizer: Any) -> None:
    state = optimizer.state[optimizer.param_groups[1]["params"][1]]
    state["exp_avg_sq"] = state["exp_avg_sq"] * 4


def replace_a_state(model: nn.Module, optimizer: Any) -> None:
    parameter = optimizer.param_groups[0]["params"][1]
    optimizer.state[parameter] = {key: value * 2 for key, value in optimizer.state[parameter].items()}


def forget_a_state(model: nn.Module, optimizer: Any) -> None:
    del optimizer.state[optimizer.param_groups[0]["params"][1]]


def forget_all(model: nn.Module, optimizer: Any) -> None:
    optimizer.state.clear()


def add_a_group(model: nn.Module, optimizer: Any) -> None:
    model.scale = nn.Parameter(torch.ones(()))
    model.register_forward_hook(lambda module, inputs, output: output * module.scale)
    optimizer.add_param_group({"params": [model.scale], "lr": 0.1})


def replace_a_parameter(model: Any, optimizer: Any) -> None:
    old = model[0].weight
    model[0].weight = nn.Parameter(old.detach() * 0.5)
    optimizer.param_groups[0]["params"][0] = model[0].weight
    del optimizer.state[old]


def drop_a_parameter(model: Any, optimizer: Any) -> None:
    old = optimizer.param_groups[0]["params"].pop()
    del optimizer.state[old]
    old.requires_grad_(False)


def freeze(model: Any, optimizer: Any) -> None:
    model[0].weight.requires_grad_(False)


def another_rate_as_tensor(model: Any, optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.003)


def drop_momentum(model: Any, optimizer: Any) -> None:
    """Or begin with some."""
    optimizer.param_groups[0]["momentum"] = 0.9 - optimizer.param_groups[0]["momentum"]


CHANGES = [
    load_own_state,
    load_other_state,
    replace_a_tensor,
    replace_a_state,
    forget_a_state,
    forget_all,
    add_a_group,
    replace_a_parameter,
    drop_a_parameter,
    freeze,
    another_rate_as_tensor,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("classes", [ADAM, ADAMW])
def test_whatever_changes_between_steps_is_followed(classes: Any, change: Any) -> None:
    pair = Pair(*classes)
    pair.train(3)
    pair.both(change)
    pair.train(3)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("change", [load_own_state, add_a_group, drop_momentum, freeze, another_rate_as_tensor])
def test_sgd_follows_as_well(change: Any, momentum: float) -> None:
    pair = Pair(*SGD, momentum=momentum)
    pair.train(3)
    pair.both(change)
    pair.train(3)


@pytest.mark.parametrize("options", [*OF_SGD, {"momentum": 0.9, "dampening": 0.5, "maximize": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sgd_takes_parameters_whose_gradients_come_later(options: dict[str, Any], dtype: torch.dtype, whole: list[str]) -> None:
    """As with layers that are dropped. torch's fused step fails, but for a parameter that has a group of its own."""
    torch.manual_seed(0)
    start = [torch.randn(5, dtype=dtype) for _ in range(3)]
    ours, alone, unfused = ([nn.Parameter(number.clone()) for number in start] for _ in range(3))
    same = {"lr": 0.1, "weight_decay": 0.1, **options}
    optimizers = [
        direct.SGD(ours, fused=True, **same),
        torch.optim.SGD([{"params": [parameter]} for parameter in alone], fused=True, **same),
        torch.optim.SGD(unfused, fused=False, foreach=False, **same),
    ]
    for step in range(1, 9):
        for index in range(3):
            gradient = torch.randn(5, dtype=dtype)
            for parameters in (ours, alone, unfused):
                parameters[index].grad = gradient.clone() if step % (index + 1) == 0 else None
        for optimizer in optimizers:
            optimizer.step()
        assert all(map(torch.equal, ours, alone))
        torch.testing.assert_close(ours, unfused, rtol=0, atol=4 * torch.finfo(dtype).eps * step)
    one, other = (list(optimizer.state_dict()["state"].values()) for optimizer in optimizers[:2])
    assert len(one) == len(other) == (3 if options else 0)
    assert all(torch.equal(mine["momentum_buffer"], its["momentum_buffer"]) for mine, its in zip(one, other, strict=True))
    whole.clear()
    for parameter in ours:
        parameter.grad = torch.ones(5, dtype=dtype)
    optimizers[0].step()
    assert not whole, "the kernel is called at once again"


def test_found_infinities_and_scales_are_torchs(whole: list[str]) -> None:
    pair = Pair(*ADAMW)
    pair.train(2)
    for infinite in (1.0, 0.0):

        def tell(model: nn.Module, optimizer: Any, infinite: float = infinite) -> None:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(infinite)

        pair.both(tell)
        pair.train(1)
    pair.both(lambda model, optimizer: (delattr(optimizer, "grad_scale"), delattr(optimizer, "found_inf")))
    pair.train(2)
    assert len(whole) == 3


def test_a_copy_and_a_pickle_go_on() -> None:
    pair = Pair(*ADAMW)
    pair.train(3)
    model, optimizer = copy.deepcopy((pair.models[1], pair.ours))
    pair.models[1], pair.optimizers[1] = model, optimizer
    pair.train(3)


# -- who listens ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def everywhere() -> Iterator[list[Any]]:
    heard: list[Any] = []
    handle = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: heard.append(optimizer))
    yield heard
    handle.remove()


def test_hooks_of_all_optimizers_hear_each_step_once(everywhere: list[Any]) -> None:
    pair = Pair(*ADAMW)
    pair.train(4)
    assert everywhere.count(pair.ours) == 4 and len(everywhere) == 8


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_hooks_of_one_hear_each_step_once(register: str) -> None:
    pair, heard = Pair(*ADAM), []
    pair.train(2)
    handle = getattr(pair.ours, register)(lambda *given: heard.append(given))
    pair.train(3)
    handle.remove()
    pair.train(2)
    assert len(heard) == 3


def test_a_profiler_sees_the_step_by_torchs_name() -> None:
    pair = Pair(*ADAMW)
    pair.train(2)
    with torch.profiler.profile() as profiler:
        pair.train(3)
    names = [event.name for event in profiler.events()]
    assert names.count("Optimizer.step#AdamW.step") == 6


def test_a_scheduler_of_torch_and_a_closure() -> None:
    pair = Pair(*ADAMW)
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 2) for optimizer in pair.optimizers]
    for _ in range(5):
        pair.train(1)
        for scheduler in schedulers:
            scheduler.step()
    losses: list[Tensor] = []

    def by_closure(model: nn.Module, optimizer: Any) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(2, 8)).square().sum()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure))

    pair.both(by_closure)
    assert torch.equal(losses[0], losses[1])
    pair.train(2)


def test_it_is_torchs_to_whoever_asks(whole: list[str]) -> None:
    for theirs, ours in PAIRS:
        assert issubclass(ours, theirs) and ours.__name__ == theirs.__name__


@pytest.mark.parametrize("fused", [False, None])
def test_without_the_fused_kernel_it_is_torchs(fused: bool | None, whole: list[str]) -> None:
    pair = Pair(*ADAMW)
    for optimizer in pair.optimizers:
        for group in optimizer.param_groups:
            group["fused"] = fused
    pair.train(3)
    assert len(whole) == 3


# -- sharded parameters, as FSDP's --------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("classes", [ADAM, ADAMW])
def test_shards_are_updated_in_place_and_other_layouts_by_torch(classes: Any, mesh: Any, whole: list[str]) -> None:
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    weights = [nn.Parameter(distribute_tensor(start, mesh, [Shard(0)])) for _ in classes]
    optimizers = [cls([weight], lr=1e-2, fused=True) for cls, weight in zip(classes, weights, strict=True)]

    def step(placement: Any, number: int) -> None:
        for weight, optimizer in zip(weights, optimizers, strict=True):
            gradient = torch.sin(start + number)
            weight.grad = distribute_tensor(gradient, mesh, [Shard(0)]).redistribute(mesh, [placement])
            optimizer.step()
        one, other = (weight.full_tensor() for weight in weights)
        assert torch.equal(one, other)

    for number in range(4):
        step(Shard(0), number)
    assert len(whole) == 1
    step(Replicate(), 4)
    assert len(whole) == 2
    step(Shard(0), 5)
    assert len(whole) == 2
    assert all(isinstance(state["exp_avg"], DTensor) for state in optimizers[1].state.values())


# -- without the compiler -----------------------------------------------------------------------------------------------------------

TRAIN = """
import copy, sys, torch
from MODULE import CLASS as cls
weights = [torch.ones(3, requires_grad=True) for _ in range(2)]
optimizer = cls(weights[:1], lr=0.1, fused=True)
optimizer.add_param_group({"params": weights[1:]})
for _ in range(2):
    sum(weight.square().sum() for weight in weights).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
print("torch._dynamo" in sys.modules)
"""


def imports_the_compiler(module: str, name: str) -> str:
    code = TRAIN.replace("MODULE", module).replace("CLASS", name)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(
    "context",
    [
        'torch.device("meta")',
        "torch._subclasses.fake_tensor.FakeTensorMode()",
        "torch.set_default_dtype(torch.float64) or nullcontext()",
    ],
)
def test_it_works_wherever_it_was_first_imported(context: str) -> None:
    lines = [
        "import torch, torch._subclasses.fake_tensor",
        "from contextlib import nullcontext",
        f"with {context}:",
        "    from drivetrain_optimizers.direct import AdamW",
        "weight = torch.ones(3, dtype=torch.float32, requires_grad=True)",
        "optimizer = AdamW([weight], fused=True)",
        "for _ in range(3):",
        "    weight.grad = torch.ones(3, dtype=torch.float32)",
        "    optimizer.step()",
        "print(float(optimizer.state[weight]['step']))",
    ]
    code = "\n".join(lines)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "3.0", run.stderr


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_the_compiler_is_not_imported(name: str) -> None:
    assert imports_the_compiler("drivetrain_optimizers.direct", name) == "False"


def test_torchs_own_import_it() -> None:
    """The control; where this fails, torch has mended it and ours need nothing of their own."""
    assert imports_the_compiler("torch.optim", "AdamW") == "True"


@pytest.mark.parametrize("hooked", [False, True])
def test_wrappers_of_others_stay(hooked: bool) -> None:
    torch.optim.SGD([torch.ones(1)])  # now torch has put its hooks around the step

    @functools.wraps(torch.optim.SGD.step if hooked else torch.optim.SGD.step.__wrapped__)
    def patched(self: Any, closure: Any = None) -> str:
        return "patched"

    assert direct._hooked(patched)(torch.optim.SGD([torch.ones(1)])) == "patched"


@pytest.mark.parametrize("differentiable", [False, True])
def test_gradients_are_recorded_only_where_the_update_is_to_be_differentiated(differentiable: bool) -> None:
    weight, start = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    weight = start * 2 if differentiable else weight
    optimizer = direct.SGD([weight], lr=0.1, differentiable=differentiable)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert weight.requires_grad and (weight.grad_fn is not None) == differentiable
    assert torch.is_grad_enabled()
