"""bf16_true: exact float32 weights behind bfloat16 ones. What float32 training gives is the oracle."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drivetrain import (
    Callback,
    CallbackContext,
    ConfigError,
    DrivetrainError,
    OptimizerComponent,
    PluginError,
    Strategy,
    Trainer,
    TrainingConfig,
    component,
    option,
)
from drivetrain_precision.masters import Bucket, SplitPrecision

CPU = torch.device("cpu")


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.int32)


# -- the pair of 16 + 16 bits


@pytest.fixture
def every_kind_of_number() -> Tensor:
    """Random bit patterns (normal, subnormal, huge, NaN), ties, zeros and infinities: float32 [40, 1000]."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (40, 1000), generator=generator).int()
    bits[0] = (bits[0] & ~0xFFFF) | 0x8000  # halfway between two bfloat16
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4028235e38, -3.4028235e38, 1e-45, -1e-45])
    bits[1, :9] = bits_of(special)
    bits[1, 9:12] = torch.tensor([0x7FFFFFFF, -1, 0x7F800001])  # NaNs at the ends of their range; the first is NVIDIA's own
    return bits.view(torch.float32)


def test_two_halves_are_exactly_the_float32_number(every_kind_of_number: Tensor) -> None:
    wanted = every_kind_of_number.clone()
    parameter = nn.Parameter(every_kind_of_number)
    bucket = Bucket([parameter])
    for _ in range(3):
        bucket.split()
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter.isnan(), wanted.isnan()), "a NaN must not turn into a number in the model"
        bucket.join()
        numbers = ~wanted.isnan()
        assert torch.equal(bits_of(parameter)[numbers], bits_of(wanted)[numbers])
        assert parameter.isnan()[~numbers].all()


def test_the_model_sees_the_nearest_bfloat16(every_kind_of_number: Tensor) -> None:
    finite = every_kind_of_number.nan_to_num(0.0, 0.0, 0.0)
    parameter = nn.Parameter(finite.clone())
    Bucket([parameter]).split()
    tie = (bits_of(finite) & 0xFFFF) == 0x8000
    nearest = finite.bfloat16()
    assert torch.equal(parameter.detach()[~tie], nearest[~tie])
    assert tie.sum() > 900
    neighbour = (
        (bits_of(finite)[tie] & ~0xFFFF).view(torch.float32),
        ((bits_of(finite)[tie] & ~0xFFFF) + 0x10000).view(torch.float32),
    )
    chosen = parameter.detach()[tie].float()
    assert ((chosen == neighbour[0]) | (chosen == neighbour[1])).all()


def test_layouts_and_gradients_are_kept_and_the_memory_is_that_of_float32() -> None:
    image = nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))
    strided = nn.Parameter(torch.randn(6, 10)[:, ::2])
    empty = nn.Parameter(torch.randn(0, 4))
    before = [p.detach().clone() for p in (image, strided, empty)]
    bucket = Bucket([image, strided, empty])
    bucket.split()
    assert image.is_contiguous(memory_format=torch.channels_last)
    address = image.data_ptr()
    image.grad = torch.full_like(image, 0.5)
    bucket.join()
    assert all(torch.equal(p, wanted) for p, wanted in zip((image, strided, empty), before, strict=True))
    assert image.grad is not None
    assert (image.grad.dtype, image.grad.unique().tolist()) == (torch.float32, [0.5])
    assert image.untyped_storage().nbytes() <= 4 * (384 + 128)  # 300 and 30 weights, each rounded up to 128
    bucket.split()
    assert image.data_ptr() == address


def test_an_optimizer_may_replace_the_memory_of_a_parameter() -> None:
    """As bitsandbytes does with `p.data = p.data.contiguous()` where the layout is another."""
    image = nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))
    before = image.detach().clone()
    precision = SplitPrecision(CPU, "", full_gradients=False)
    model = nn.Module()
    model.image = image
    precision.cast(model)
    precision.join()
    image.data = image.data.contiguous() + 1e-5
    precision.split()
    precision.join()
    assert torch.equal(image, before + 1e-5)


# -- training


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))


def make_data() -> TensorDataset:
    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(4))
    return TensorDataset(inputs, 0.3 * inputs.sum(dim=1, keepdim=True))


def trainer(
    model: nn.Module, precision: Any, *callbacks: Callback, optimizer: Any = None, steps: int = 24, **config: Any
) -> Trainer:
    given = {"max_duration": f"{steps}st", "per_device_batch_size": 8, "log_interval": "1st", "dataloader": {"shuffle": False}}
    full = TrainingConfig(**{**given, "precision": precision, "standard_callbacks": False, **config})
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    return Trainer(model, full, make_data(), loss=nn.functional.mse_loss, optimizer=optimizer, callbacks=callbacks)


def exact_weights(made: Trainer) -> list[Tensor]:
    """The float32 weights of a finished run, whatever it computed in."""
    precision = made.ctx.precision
    if isinstance(precision, SplitPrecision):
        precision.join()
    weights = [p.detach().clone() for p in made.model.parameters()]
    if isinstance(precision, SplitPrecision):
        precision.split()
    return weights


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


OPTIMIZERS = {
    "adamw": lambda ps, lr: torch.optim.AdamW(ps, lr=lr),
    "adamw fused": lambda ps, lr: torch.optim.AdamW(ps, lr=lr, fused=True),
    "sgd with momentum": lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.9),
    "adafactor": lambda ps, lr: torch.optim.Adafactor(ps, lr=lr),
    "radam": lambda ps, lr: torch.optim.RAdam(ps, lr=lr, foreach=True),
}


@component
class Ties(Callback):
    """Whether a weight was ever half way between two bfloat16: the pair of 16 bits must round it up, autocast rounds to even."""

    def __attrs_post_init__(self) -> None:
        self.met = False

    def on_step_end(self, ctx: CallbackContext) -> None:
        self.met |= any(bool((bits_of(p) & 0xFFFF == 0x8000).any()) for p in ctx.model.parameters() if p.ndim == 2)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_gives_bit_for_bit_the_weights_of_autocast_over_float32(name: str, accumulation: int) -> None:
    """bf16 casts float32 weights in each forward; bf16_true has them cast already: the same numbers go through the model.

    But for ties, one weight of 65536: a rate at which none occurs is looked for.
    """

    def run(precision: str, lr: float, *callbacks: Callback) -> list[Tensor]:
        model = make_model()
        optimizer = OPTIMIZERS[name](model.parameters(), lr)
        made = trainer(model, precision, *callbacks, optimizer=optimizer, steps=12, gradient_accumulation_steps=accumulation)
        made.train()
        return exact_weights(made)

    for lr in (0.01 + 0.001 * i for i in range(12)):
        ties = Ties()
        wanted = run("bf16", lr, ties)
        if not ties.met:
            break
    assert not ties.met
    assert same(run("bf16_true", lr), wanted)
    assert not same(run("fp32", lr), wanted), "control: float32 arithmetic gives other weights"


def test_matrices_are_bfloat16_between_steps_and_float32_for_listeners_of_gradients() -> None:
    seen: dict[str, set[torch.dtype]] = {}

    @component
    class Watch(Callback):
        def note(self, event: str, ctx: CallbackContext) -> None:
            matrices = [p for p in ctx.model.parameters() if p.ndim == 2]
            seen.setdefault(event, set()).update(p.dtype for p in matrices)
            seen.setdefault(f"{event} gradients", set()).update(p.grad.dtype for p in matrices if p.grad is not None)

        def on_step_start(self, ctx: CallbackContext) -> None:
            self.note("start", ctx)

        def on_gradients(self, ctx: CallbackContext) -> None:
            self.note("gradients", ctx)

        def on_step_end(self, ctx: CallbackContext) -> None:
            self.note("end", ctx)

    made = trainer(make_model(), "bf16_true", Watch(), steps=4)
    made.train()
    assert seen["start"] == seen["end"] == {torch.bfloat16}
    assert seen["gradients"] == seen["gradients gradients"] == {torch.float32}
    assert {p.dtype for p in made.model.parameters() if p.ndim == 1} == {torch.float32}
    moments = [s["exp_avg"] for s in made.ctx.optimizer.state.values()]
    assert {m.dtype for m in moments} == {torch.float32}


def test_thousands_of_small_updates_arrive_as_in_float32_and_are_lost_in_plain_bfloat16() -> None:
    """Weights near 1, updates of 1e-5: a bfloat16 near 1 has steps of 2⁻⁷, so each update alone rounds to nothing."""

    def train(precision: SplitPrecision | None, dtype: torch.dtype) -> nn.Linear:
        model = nn.Linear(8, 4, bias=False).to(dtype)
        nn.init.constant_(model.weight, 1.0)
        if precision is not None:
            precision.cast(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
        for _ in range(2000):
            model.weight.grad = torch.ones_like(model.weight)
            if precision is not None:
                precision.unscale(optimizer)
                precision.step(optimizer)
            else:
                optimizer.step()
        return model

    precision = SplitPrecision(CPU, "", full_gradients=False)
    exact, stored, plain = train(None, torch.float32), train(precision, torch.float32), train(None, torch.bfloat16)
    assert (plain.weight == 1.0).all(), "control: plain bfloat16 stalls"
    assert stored.weight.dtype == torch.bfloat16
    assert torch.equal(stored.weight.float(), exact.weight.bfloat16().float())
    precision.join()
    assert torch.equal(stored.weight, exact.weight)
    assert float(exact.weight.mean()) == pytest.approx(1 - 2000 * 1e-5, rel=1e-3)


def test_it_learns_as_float32_does_where_plain_bfloat16_stops_early() -> None:
    def last_losses(model: nn.Module, precision: str) -> float:
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
        losses = trainer(model, precision, optimizer=optimizer, steps=200).train().losses
        return sum(loss for _, loss in losses[-16:]) / 16

    class Plain(nn.Module):
        """The same model stored in bfloat16 and nothing else."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model().bfloat16()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.inner(inputs.bfloat16()).float()

    full, exact, plain = last_losses(make_model(), "fp32"), last_losses(make_model(), "bf16_true"), last_losses(Plain(), "fp32")
    assert exact == pytest.approx(full, rel=0.02)
    assert plain > 2.5 * exact


class Limited(nn.Module):
    """Two layers that run out of memory above a number of samples."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers, self.limit = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1)), limit

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) > self.limit:
            raise torch.OutOfMemoryError("on purpose")
        return self.layers(inputs)


@component
class Gradients(Callback):
    """Notes each step's gradients; divides the run's steps at its start if that is asked for."""

    size: int | None = option(default=None)

    def __attrs_post_init__(self) -> None:
        self.steps: list[list[Tensor]] = []

    def on_run_start(self, ctx: CallbackContext) -> None:
        if self.size is not None:
            ctx.resize(self.size)

    def on_gradients(self, ctx: CallbackContext) -> None:
        self.steps.append([p.grad.clone() for p in ctx.model.parameters()])


@pytest.mark.parametrize("way", ["resized", "out of memory"])
def test_gradients_add_up_in_float32_when_a_step_is_divided_later(way: str) -> None:
    def run(limit: int, size: int | None, **config: Any) -> list[list[Tensor]]:
        seen, model = Gradients(size=size), Limited(limit)
        full = {"max_grad_norm": None, "steps": 3, **config}
        trainer(model, "bf16_true", seen, optimizer=torch.optim.SGD(model.parameters(), lr=1e-2), **full).train()
        return seen.steps

    configured = run(2, None, per_device_batch_size=2, gradient_accumulation_steps=16)
    if way == "resized":
        divided = run(2, 2, per_device_batch_size=32)
    else:
        with pytest.warns(UserWarning, match="goes on in"):
            divided = run(2, None, per_device_batch_size=32)
    assert len(configured) == len(divided) == 3
    assert all(same(one, other) for one, other in zip(configured, divided, strict=True))


# -- going on


@component
class Restore(Callback):
    """Hands a run the state of another."""

    saved: dict[str, Any] = option()

    def on_restore(self, ctx: CallbackContext) -> None:
        ctx.load_state_dict(self.saved)


def saved_after(steps: int, precision: str = "bf16_true") -> dict[str, Any]:
    first = trainer(make_model(), precision)
    for step in first.steps():
        if step.number == steps:
            return deepcopy(first.state_dict())
    raise AssertionError


def test_a_restored_run_ends_bit_equal() -> None:
    straight = trainer(make_model(), "bf16_true")
    straight.train()
    saved = saved_after(9)
    assert saved["model"]["0.weight"].dtype == torch.bfloat16
    assert saved["precision"]["remainders"]["0.weight"].dtype == torch.int16

    second = trainer(make_model(), "bf16_true", Restore(saved=saved))
    second.train()
    assert same(exact_weights(second), exact_weights(straight))

    saved["precision"]["remainders"]["0.weight"].zero_()
    damaged = trainer(make_model(), "bf16_true", Restore(saved=saved))
    damaged.train()
    assert not same(exact_weights(damaged), exact_weights(straight)), "control: the remainders matter"


def test_optimizer_state_is_not_rounded_on_the_way_back() -> None:
    """torch casts loaded state to the type of the parameter, which is bfloat16 between steps."""
    saved = saved_after(9)
    second = trainer(make_model(), "bf16_true", Restore(saved=saved))
    next(iter(second.steps()))
    state = second.ctx.optimizer.state[second.model[0].weight]
    assert state["exp_avg"].dtype == torch.float32
    assert second.model[0].weight.dtype == torch.bfloat16


def test_a_refused_optimizer_state_changes_no_weight() -> None:
    made = trainer(make_model(), "bf16_true", steps=3)
    made.train()
    before, saved = exact_weights(made), deepcopy(made.state_dict())
    saved["optimizer"]["param_groups"] = []
    with pytest.raises(DrivetrainError, match="does not fit AdamW"):
        made.load_state_dict(saved)
    assert {p.dtype for p in made.model.parameters() if p.ndim == 2} == {torch.bfloat16}
    assert same(exact_weights(made), before)


def test_a_state_of_another_precision_or_model_is_refused() -> None:
    precision = SplitPrecision(CPU, "", full_gradients=False)
    precision.cast(make_model())
    for saved in ({}, {"remainders": {"0.weight": torch.zeros(32, 6, dtype=torch.int16)}}):
        with pytest.raises(PluginError, match="no remainders"):
            precision.load_state_dict(saved)


# -- around it


def test_frozen_matrices_are_only_rounded_and_integers_left_alone() -> None:
    model = make_model()
    model[0].requires_grad_(False)
    model.register_buffer("running", torch.randn(3, 3))
    model.codes = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    precision = SplitPrecision(CPU, "", full_gradients=False)
    precision.cast(model)
    assert model[0].weight.dtype == torch.bfloat16
    assert model[0].bias.dtype == model.running.dtype == torch.float32
    assert model.codes.dtype == torch.uint8
    assert sorted(precision.state_dict()["remainders"]) == ["3.weight", "5.weight"]


def test_tied_weights_stay_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    precision = SplitPrecision(CPU, "", full_gradients=False)
    precision.cast(model)
    assert model[0].weight is model[1].weight
    assert list(precision.state_dict()["remainders"]) == ["0.weight"]


def test_a_step_that_breaks_off_leaves_the_weights_as_between_steps() -> None:
    @component
    class Fail(Callback):
        def on_gradients(self, ctx: CallbackContext) -> None:
            if ctx.step == 2:
                raise KeyError("on purpose")

    made = trainer(make_model(), "bf16_true", Fail())
    with pytest.raises(KeyError):
        made.train()
    assert {p.dtype for p in made.model.parameters() if p.ndim == 2} == {torch.bfloat16}


@pytest.mark.parametrize("way", ["join", "split"])
def test_memory_that_runs_out_between_two_buckets_costs_no_weight(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drivetrain_precision.masters._BUCKET", 1)
    model, precision = make_model(), SplitPrecision(CPU, "", full_gradients=False)
    before = [p.detach().clone() for p in model.parameters()]
    precision.cast(model)
    if way == "split":
        precision.join()
    original, calls = getattr(Bucket, way), []

    def second_fails(bucket: Bucket) -> None:
        calls.append(bucket)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("on purpose")
        original(bucket)

    monkeypatch.setattr(Bucket, way, second_fails)
    with pytest.raises(torch.OutOfMemoryError):
        getattr(precision, way)()
    precision.break_off(torch.optim.SGD(model.parameters(), lr=1.0))
    assert {p.dtype for p in model.parameters() if p.ndim == 2} == {torch.bfloat16}
    precision.join()
    assert all(torch.equal(p, wanted) for p, wanted in zip(model.parameters(), before, strict=True))


def test_ddp_still_learns_of_the_gradients(tmp_path: Path) -> None:
    """DDP hangs on autograd's nodes of the parameters, which a change of a parameter's type by `.data` would replace."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        runs = [ddp_steps(wrapped) for wrapped in (False, True)]
    finally:
        dist.destroy_process_group()
    assert same(*runs)


def ddp_steps(wrapped: bool) -> list[Tensor]:
    model, precision = make_model(), SplitPrecision(CPU, "", full_gradients=False)
    precision.cast(model)
    called = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True) if wrapped else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            called(torch.ones(2, 6)).sum().backward()
        precision.unscale(optimizer)
        precision.step(optimizer)
        optimizer.zero_grad()
    precision.join()
    return [p.detach().clone() for p in model.parameters()]


class Replacing(Strategy):
    """Puts other parameters in the place of the model's, as sharding does."""

    name = "sharded"

    def wrap(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
        return model


def test_a_strategy_that_replaces_parameters_is_refused_before_the_first_step() -> None:
    config = TrainingConfig(max_duration="2st", precision="bf16_true", standard_callbacks=False)

    def make(model: nn.Module) -> Trainer:
        return Trainer(model, config, make_data(), loss=nn.functional.mse_loss, strategy=Replacing(), optimizer=MakeSGD())

    with pytest.raises(ConfigError, match="bf16_true does not work with sharded"):
        make(make_model()).train()


@pytest.mark.parametrize("part", ["0", "0.bias"])
def test_weights_that_are_rounded_already_are_named(part: str) -> None:
    model = make_model()
    for name, parameter in model.named_parameters():
        if name.startswith(part):
            parameter.data = parameter.data.bfloat16()
    with pytest.raises(ConfigError, match=f"'{part}.*rounded to bfloat16 already. Load the model in float32"):
        trainer(model, "bf16_true").train()


@component
class MakeSGD(OptimizerComponent):
    """SGD over whatever parameters the wrapped model has."""

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameter_groups(ctx.model), lr=0.1)
