"""The precisions themselves: against hand-written autocast and GradScaler loops, and on devices that this machine lacks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from drivetrain import ConfigError, Precision, Strategy, TrainingConfig, make_component
from drivetrain_precision import Auto, Bf16, Bf16True, Fp16, Fp32, Fp64, ScaledPrecision, Tf32
from drivetrain_precision import support as support_module

CPU = torch.device("cpu")


def context(device: str | torch.device = CPU, width: int = 256) -> Any:
    model = nn.Linear(width, width, device="meta")
    return SimpleNamespace(device=torch.device(device), config=TrainingConfig(), strategy=Strategy(), model=model)


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))


def microbatches(steps: int, per_step: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield [(torch.randn(4, 8, generator=generator), torch.randn(4, 4, generator=generator)) for _ in range(per_step)]


def through(precision: Precision, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 6) -> list[bool]:
    """The loop's calls in the loop's order: forward, scale, backward, then unscale, clip, step."""
    results = []
    for step in microbatches(steps, 2):
        for inputs, targets in step:
            scope = precision.forward()
            if scope is None:
                loss = nn.functional.mse_loss(model(inputs), targets) / 2
            else:
                with scope:
                    loss = nn.functional.mse_loss(model(inputs).float(), targets) / 2
            precision.scale(loss).backward()
        precision.unscale(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        results.append(precision.step(optimizer))
        optimizer.zero_grad()
    return results


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype | None, steps: int = 6) -> None:
    """The same training as torch's documentation writes it, a new autocast for every microbatch."""
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    for step in microbatches(steps, 2):
        for inputs, targets in step:
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                loss = nn.functional.mse_loss(model(inputs).float(), targets) / 2
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(("made", "dtype"), [(Bf16(), torch.bfloat16), (Fp16(), torch.float16), (Fp32(), None)])
def test_a_run_is_bit_equal_to_the_loop_written_by_hand(made: Any, dtype: torch.dtype | None) -> None:
    model, expected, other = make_model(), make_model(), make_model()
    precision = made.make_precision(context())
    assert precision.dtype == dtype
    results = through(precision, model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    by_hand(expected, torch.optim.AdamW(expected.parameters(), lr=1e-2), dtype)
    by_hand(other, torch.optim.AdamW(other.parameters(), lr=1e-2), None if dtype else torch.bfloat16)
    assert results == [True] * 6
    assert equal(model, expected)
    assert not equal(model, other), "control: another precision gives other weights"


@pytest.mark.parametrize("made", [Bf16(), Fp16()])
def test_the_one_context_is_entered_again_and_leaves_nothing_behind(made: Any) -> None:
    precision = made.make_precision(context())
    weight = torch.ones(2, 2, requires_grad=True)
    before = torch.get_autocast_dtype("cpu")
    for expected in (2.0, 4.0):
        assert precision.forward() is precision.forward()
        with precision.forward():
            assert (weight @ torch.ones(2, 2)).dtype == precision.dtype
            assert (weight @ torch.ones(2, 2))[0, 0].item() == expected, "a cast weight outlived its update"
        assert not torch.is_autocast_enabled("cpu")
        with torch.no_grad():
            weight.mul_(2)
    with pytest.raises(KeyError), precision.forward():
        raise KeyError
    assert not torch.is_autocast_enabled("cpu")
    assert torch.get_autocast_dtype("cpu") == before


def test_bf16_keeps_parameters_and_gradients_in_float32() -> None:
    precision, model = Bf16().make_precision(context()), make_model()
    assert precision.cast(model) is model
    with precision.forward():
        model(torch.randn(2, 8)).sum().backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32} == {p.grad.dtype for p in model.parameters()}
    assert not precision.scales


# -- fp16


def scaled(**options: Any) -> ScaledPrecision:
    return Fp16(**options).make_precision(context())


def one_step(
    precision: Precision, model: nn.Module, optimizer: torch.optim.Optimizer, factor: float = 1.0, unscale: bool = True
) -> bool:
    with precision.forward():
        loss = model(torch.ones(2, 8)).float().square().mean() * factor
    precision.scale(loss).backward()
    if unscale:
        precision.unscale(optimizer)
    done = precision.step(optimizer)
    optimizer.zero_grad()
    return done


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "plain": lambda p: torch.optim.AdamW(p, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_overflow_skips_the_step_and_halves_the_scale(kind: str, unscale: bool) -> None:
    precision, model = scaled(init_scale=1024.0), make_model()
    optimizer = OPTIMIZERS[kind](model.parameters())
    assert one_step(precision, model, optimizer, unscale=unscale)
    weights = [p.clone() for p in model.parameters()]
    assert not one_step(precision, model, optimizer, factor=float("inf"), unscale=unscale)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert precision.state_dict() == {"scale": 512.0, "growth_tracker": 0}
    assert one_step(precision, model, optimizer, unscale=unscale)
    assert not any(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    if "sgd" not in kind:
        assert {float(s["step"]) for s in optimizer.state.values()} == {2.0}, "a skipped step was counted"


def test_a_single_overflowing_microbatch_skips_the_whole_step() -> None:
    precision, model = scaled(), make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.clone() for p in model.parameters()]
    for factor in (1.0, float("inf"), 1.0):
        with precision.forward():
            loss = model(torch.ones(2, 8)).float().sum() * factor
        precision.scale(loss).backward()
    precision.unscale(optimizer)
    assert not precision.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_scale_grows_after_the_interval_and_an_overflow_starts_it_again() -> None:
    precision, model = scaled(init_scale=16.0, growth_interval=3, growth_factor=4.0, backoff_factor=0.25), make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    history = []
    for factor in (1, 1, float("inf"), 1, 1, 1, 1):
        one_step(precision, model, optimizer, factor)
        history.append((precision.state_dict()["scale"], precision.state_dict()["growth_tracker"]))
    assert history == [(16.0, 1), (16.0, 2), (4.0, 0), (4.0, 1), (4.0, 2), (16.0, 0), (16.0, 1)]


def test_gradients_are_true_after_unscale_and_scaled_before() -> None:
    """Clipping comes after `unscale`: the norm there is that of the plain loss."""
    precision, model, plain = scaled(init_scale=256.0), make_model(), make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.float16):
        loss = plain(torch.ones(2, 8)).float().square().mean()
    (loss * 256).backward()  # a power of two: exact, and the same rounding of small gradients
    reference = torch.stack([p.grad.div(256).norm() for p in plain.parameters()]).norm()
    with precision.forward():
        loss = model(torch.ones(2, 8)).float().square().mean()
    precision.scale(loss).backward()
    before = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    precision.unscale(optimizer)
    after = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(after, reference)
    torch.testing.assert_close(before, reference * 256)


def test_scaling_saves_gradients_too_small_for_float16() -> None:
    def gradient(init_scale: float) -> float:
        precision = scaled(init_scale=init_scale)
        weight = nn.Parameter(torch.ones(1, 1))
        optimizer = torch.optim.SGD([weight], lr=0.0)
        with precision.forward():
            loss = (weight @ torch.ones(1, 1)).float().sum() * 1e-8  # its gradient is under float16's smallest, 6e-8
        precision.scale(loss).backward()
        precision.unscale(optimizer)
        return float(weight.grad)

    assert gradient(1.0) == 0.0
    assert gradient(65536.0) == pytest.approx(1e-8, rel=1e-3)


@pytest.mark.parametrize("used_before", [False, True])
def test_the_state_goes_through_json_and_the_run_goes_on_bit_equal(used_before: bool) -> None:
    def fresh() -> tuple[ScaledPrecision, nn.Module, torch.optim.Optimizer]:
        model = make_model()
        return scaled(init_scale=64.0, growth_interval=4), model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    precision, model, optimizer = fresh()
    one_step(precision, model, optimizer, float("inf"))
    through(precision, model, optimizer, steps=3)
    saved = json.loads(json.dumps(precision.state_dict()))
    assert saved == {"scale": 32.0, "growth_tracker": 3}

    other, copy, copy_optimizer = fresh()
    if used_before:
        one_step(other, copy, copy_optimizer, float("inf"))
    copy.load_state_dict(model.state_dict())
    copy_optimizer.load_state_dict(deepcopy(optimizer.state_dict()))  # torch would share the moments
    other.load_state_dict(saved)
    through(precision, model, optimizer, steps=3)
    through(other, copy, copy_optimizer, steps=3)
    assert equal(model, copy)
    assert precision.state_dict() == other.state_dict() == {"scale": 64.0, "growth_tracker": 2}


class HostReads(TorchDispatchMode):
    """Counts how often a value is read from a tensor, which on an accelerator waits for it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_reads_one_value_as_often_as_grad_scaler_itself() -> None:
    precision, model = scaled(), make_model()
    scaler = torch.amp.GradScaler("cpu")
    # SGD: torch's Adam on a CPU reads its own step counters
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 8)).sum().backward()
    scaler.scale(torch.ones(()))
    precision.scale(torch.ones(()))
    with HostReads() as theirs:
        scaler.step(optimizer)
        scaler.update()
    with HostReads() as ours:
        precision.step(optimizer)
    assert (theirs.count, ours.count) == (1, 1)


def test_trainable_float16_parameters_are_refused_and_frozen_ones_are_not() -> None:
    model = make_model()
    model[0].half().requires_grad_(False)
    assert scaled().cast(model) is model
    model[0].requires_grad_(True)
    with pytest.raises(ConfigError, match=r"'0\.weight' is float16") as caught:
        scaled().cast(model)
    assert caught.value.problems[0].path == "precision"


@pytest.mark.parametrize("made", [Bf16(), Bf16True(), Fp16()])
def test_a_device_without_autocast_is_refused(made: Any) -> None:
    with pytest.raises(ConfigError, match="does not work on the device 'meta'") as caught:
        made.make_precision(context("meta"))
    assert caught.value.problems[0].path == "precision"


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"init_scale": -1.0}, "init_scale"),
        ({"growth_factor": 1.0}, "growth_factor"),
        ({"backoff_factor": 1.0}, "backoff_factor"),
        ({"growth_interval": 0}, "growth_interval"),
        ({"init_scale": "65536"}, "init_scale"),
    ],
)
def test_a_wrong_option_is_named_with_its_path(options: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_component("precision", {"use": "fp16", **options}, "precision")
    assert [p.path for p in caught.value.problems] == [f"precision.fp16.{path}"]


class Overflowing(torch.optim.AdamW):
    """Notes, in each step, how many values had been read from the device before its kernels were called."""

    reads: HostReads
    before: int

    def step(self, closure: Any = None) -> Any:
        self.before = self.reads.count
        return super().step(closure)


@pytest.mark.parametrize("overflow", [False, True])
def test_a_fused_optimizer_is_called_before_anything_is_read_and_leaves_an_overflow_out_itself(overflow: bool) -> None:
    """So on a GPU the host does not wait before it has given the whole update to the device."""
    precision, model = scaled(init_scale=4.0), make_model()
    optimizer = Overflowing(model.parameters(), lr=0.1, fused=True)
    precision.scale(torch.ones(()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    if overflow:
        model[0].weight.grad[0, 0] = float("inf")
    before = [p.detach().clone() for p in model.parameters()]
    precision.unscale(optimizer)
    with HostReads() as reads:
        optimizer.reads = reads
        assert precision.step(optimizer) is not overflow
    assert optimizer.before == 0
    assert reads.count == 1
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)) == overflow
    assert precision.state_dict()["scale"] == (2.0 if overflow else 4.0)


# -- fp64


def test_fp64_is_bit_equal_to_a_loop_in_double_precision_whatever_it_is_called_with() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model()
            self.register_buffer("shift", torch.full((8,), 0.1))

        def forward(self, pair: Any, *, count: Tensor, table: dict[str, Any]) -> Tensor:
            assert not count.is_floating_point()
            return self.inner(pair[0] + table["inputs"][0] + self.shift) * count

    model, expected = Named(), Named().double()
    precision = Fp64().make_precision(context())
    assert precision.cast(model) is model
    inputs, count = torch.randn(3, 8), torch.tensor(2)
    for made, x in ((model, inputs), (expected, inputs.double())):
        made((x, "text"), count=count, table={"inputs": [x]}).sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float64}
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert model.shift.dtype == torch.float64


def test_fp64_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(*args: Any, **kwargs: Any) -> Tensor:
        raise TypeError("MPS has no float64")

    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(ConfigError, match="fp64 does not work on the device 'cpu'"):
        Fp64().make_precision(context())


# -- auto and tf32


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.mark.parametrize("native", [True, False])
def test_auto_takes_bf16_on_a_cpu_exactly_when_it_is_native(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(support_module, "_cpu_has_bf16", lambda: native)
    precision = Auto().make_precision(context())
    assert precision.name == ("bf16" if native else "fp32")
    assert precision.reason == ("bf16: native on this CPU" if native else "fp32: bf16 is not native on this CPU")
    assert (precision.forward() is not None) == native


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch has no CUDA here, and says so
def test_auto_leaves_small_models_in_fp32_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support_module, "_cpu_has_bf16", lambda: True)
    pretend_cuda(monkeypatch, (9, 0))
    small = Auto().make_precision(context(width=255))
    assert (small.name, small.forward()) == ("fp32", None)
    assert small.reason == "fp32: bf16 is native on this CPU, but with matrices of at most 65,025 numbers its casts take longer"
    assert Auto().make_precision(context("cuda", width=255)).name == "bf16"


def test_auto_agrees_with_the_instructions_of_this_cpu() -> None:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("architecture") != "x86_64":
        pytest.skip("needs torch's list of x86 CPU capabilities")
    expected = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    assert (Auto().make_precision(context()).name == "bf16") == expected


@pytest.mark.parametrize(("capability", "native"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_nvidia_gpus_have_bf16_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], native: bool
) -> None:
    pretend_cuda(monkeypatch, capability)
    found, why = support_module.bf16_support(torch.device("cuda", 0))
    assert found is native
    assert f"{capability[0]}.{capability[1]}" in why


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch has no CUDA here, and says so
@pytest.mark.parametrize(
    ("capability", "name"), [((6, 1), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")]
)
def test_auto_takes_fp16_on_gpus_with_matrix_units_for_it_but_none_for_bf16(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str
) -> None:
    pretend_cuda(monkeypatch, capability)
    precision = Auto().make_precision(context("cuda"))
    assert precision.name == name
    assert precision.reason.startswith(name)
    assert isinstance(precision, ScaledPrecision) is (name == "fp16")


@pytest.mark.parametrize("device", ["mps", "meta"])
def test_auto_stays_with_fp32_where_bf16_is_not_known_to_be_native(device: str) -> None:
    precision = Auto().make_precision(context(device))
    assert precision.name == "fp32"
    assert precision.reason.startswith("fp32: bf16 is not native on")


@pytest.fixture
def matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_tf32_is_set_for_the_run_and_put_back(monkeypatch: pytest.MonkeyPatch, matmul_precision: None) -> None:
    pretend_cuda(monkeypatch, (8, 6))
    made = Tf32()
    precision = made.make_precision(context("cuda"))
    assert torch.get_float32_matmul_precision() == "highest"
    made.on_run_start(context("cuda"))
    assert torch.get_float32_matmul_precision() == "high"  # and does not raise, as it would after the newer setting
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    made.on_run_end(context("cuda"))
    made.on_run_end(context("cuda"))
    assert torch.get_float32_matmul_precision() == "highest"
    assert (precision.name, precision.reason) == ("tf32", "TF32 matrix products (compute capability 8.6)")


def test_tf32_is_put_back_when_the_last_run_ends(monkeypatch: pytest.MonkeyPatch, matmul_precision: None) -> None:
    pretend_cuda(monkeypatch, (8, 6))
    first, second = Tf32(), Tf32()
    for made in (first, second):
        made.make_precision(context("cuda"))
        made.on_run_start(context("cuda"))
    first.on_run_end(context("cuda"))
    first.on_run_end(context("cuda"))
    assert torch.get_float32_matmul_precision() == "high"
    second.on_run_end(context("cuda"))
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("device", "why"), [("cpu", "no effect on 'cpu'"), ("cuda", "needs compute capability 8.0")])
def test_tf32_changes_nothing_where_it_has_no_effect(monkeypatch: pytest.MonkeyPatch, device: str, why: str) -> None:
    pretend_cuda(monkeypatch, (7, 0))
    made = Tf32()
    precision = made.make_precision(context(device))
    made.on_run_start(context(device))
    assert torch.get_float32_matmul_precision() == "highest"
    assert why in precision.reason


@pytest.mark.parametrize("name", ["auto", "fp32", "tf32", "bf16", "bf16_true", "fp16", "fp64"])
def test_every_name_makes_a_precision_on_a_cpu(name: str) -> None:
    made = make_component("precision", name)
    assert made.kind == "precision"
    precision = made.make_precision(context())
    assert isinstance(precision, Precision)
    assert precision.reason
    assert precision.scales == (name in ("fp16", "bf16_true"))
