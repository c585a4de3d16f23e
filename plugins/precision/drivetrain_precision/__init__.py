"""Number formats for Drivetrain: `auto`, `fp32`, `tf32`, `bf16`, `bf16_true`, `fp16`, `fp64`."""

from __future__ import annotations

import threading
from typing import ClassVar

import torch
from torch import nn

from drivetrain import CallbackContext, Component, ConfigError, Precision, Problem, component, hook, option
from drivetrain_precision.autocast import AutocastPrecision, ScaledPrecision
from drivetrain_precision.double import DoublePrecision
from drivetrain_precision.masters import SplitPrecision
from drivetrain_precision.support import bf16_support, fp16_is_fast, why_no_autocast

__all__ = [
    "Auto",
    "AutocastPrecision",
    "Bf16",
    "Bf16True",
    "DoublePrecision",
    "Fp16",
    "Fp32",
    "Fp64",
    "ScaledPrecision",
    "SplitPrecision",
    "Tf32",
]
_WORTH_CASTING = 1 << 16  # numbers in a model's largest matrix from which on bf16 is no slower on CPUs


def _full(name: str, reason: str) -> Precision:
    made = Precision()
    made.name, made.reason = name, reason
    return made


@component
class Fp32(Component):
    """Compute in the parameters' own type, as a rule binary32 of IEEE 754 (2019, table 3.5): no autocast, no scaling.

    Convolutions on NVIDIA GPUs keep torch's own setting, which is TF32 unless `torch.backends.cudnn.allow_tf32` is false.
    """

    kind: ClassVar[str] = "precision"

    def make_precision(self, ctx: CallbackContext) -> Precision:
        """Full precision."""
        return _full("fp32", "full precision")


class _Tf32Products:
    """The setting of the process: made by the first run that asks for it, put back when the last of them ends."""

    def __init__(self) -> None:
        self._lock, self._runs = threading.Lock(), 0
        self._before: str | None = None

    def begin(self) -> None:
        """The older of torch's two settings: after the newer one `get_float32_matmul_precision`, which torch.compile calls, raises."""
        with self._lock:
            self._runs += 1
            if torch.backends.cuda.matmul.fp32_precision != "tf32":
                before = torch.get_float32_matmul_precision()
                self._before = before if self._before is None else self._before
                torch.set_float32_matmul_precision("high")

    def end(self) -> None:
        """A run that began is over."""
        with self._lock:
            self._runs -= 1
            if self._runs == 0 and self._before is not None:
                torch.set_float32_matmul_precision(self._before)
                self._before = None


_TF32_PRODUCTS = _Tf32Products()


@component
class Tf32(Component):
    """Parameters and activations in float32, matrix products in TF32 (10 bits of mantissa) on NVIDIA GPUs from Ampere on.

    The format: NVIDIA A100 Tensor Core GPU Architecture (whitepaper, 2020), figure 9. The setting belongs to the process, and
    backward reads it as much as forward, so it is made when the run starts and put back when the last such run ends
    (`torch.set_float32_matmul_precision`). On every other device it changes nothing.
    """

    kind: ClassVar[str] = "precision"

    def __attrs_post_init__(self) -> None:
        self._effective = self._begun = False

    def make_precision(self, ctx: CallbackContext) -> Precision:
        """Full precision, with the reason saying whether TF32 takes effect."""
        device = ctx.device
        if device.type != "cuda" or torch.version.hip:
            return _full("tf32", f"full precision: TF32 is a format of NVIDIA GPUs and has no effect on {device.type!r}")
        major, minor = torch.cuda.get_device_capability(device)
        self._effective = major >= 8
        if not self._effective:
            return _full("tf32", f"full precision: TF32 needs compute capability 8.0, this GPU has {major}.{minor}")
        return _full("tf32", f"TF32 matrix products (compute capability {major}.{minor})")

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Allow TF32."""
        if self._effective and not self._begun:
            self._begun = True
            _TF32_PRODUCTS.begin()

    def on_run_end(self, ctx: CallbackContext) -> None:
        """Put back what the process had, unless another run still wants it."""
        if self._begun:
            self._begun = False
            _TF32_PRODUCTS.end()


def _bf16(device: torch.device, reason: str) -> Precision:
    return AutocastPrecision("bf16", torch.bfloat16, device, reason)


@component
class Bf16(Component):
    """Autocast to bfloat16: float32's range, 8 bits of mantissa, no loss scaling. Parameters and optimizer state stay float32.

    The format, and training in it: Kalamkar et al. 2019, arXiv:1905.12322, section 3. Works on every device whose autocast
    knows bfloat16; where it is emulated it is slow, and `reason` says so.
    """

    kind: ClassVar[str] = "precision"

    def make_precision(self, ctx: CallbackContext) -> Precision:
        """Autocast to bfloat16 on `ctx.device`.

        Raises:
            ConfigError: when the device cannot.
        """
        _must_have_bf16("bf16", ctx.device)
        return _bf16(ctx.device, f"bfloat16 autocast, {bf16_support(ctx.device)[1]}")


@component
class Bf16True(Component):
    """Weights stored in bfloat16, and trained as exactly as in float32.

    A bfloat16 weight has 8 bits of mantissa: an update smaller than 1/512 of it is lost, and training stalls. Here the 16 bits
    that rounding cuts off are kept beside each weight, and for the time of the update the two are joined to the exact float32
    weight, so any optimizer works as in float32. Sources: that updates are lost, Zamirai et al. 2020, arXiv:2010.06192, section
    3; 16 bits beside each weight, "Split-SGD-BF16" of Kalamkar et al. 2020, arXiv:2005.04680, and modded-nanogpt, record 57.
    Only matrices are stored so; vectors stay in float32. Autocast to bfloat16 for the rest, as in `bf16`.

    Against `bf16`: weights and gradients take 6 bytes for each parameter instead of 8 while the model computes, and no copies
    are cast in each forward; the update takes as much as with `bf16`. In steps of several microbatches gradients are float32,
    so that their sum is exact; only on several processes they are added up in bfloat16. For strategies that leave a model its
    parameters (one device, DDP); those that shard have a mixed precision of their own.
    """

    kind: ClassVar[str] = "precision"

    def make_precision(self, ctx: CallbackContext) -> Precision:
        """bfloat16 weights with their remainders on `ctx.device`.

        Raises:
            ConfigError: when the device, or torch, cannot.
        """
        _must_have_bf16("bf16_true", ctx.device)
        alone = ctx.strategy.world_size == 1  # DDP's buckets have the type of the parameters
        several = _accumulates(ctx) and alone
        if several and not hasattr(torch.Tensor, "grad_dtype"):
            message = f"bf16_true with several microbatches in a step needs a newer torch than {torch.__version__}. Use bf16."
            raise ConfigError([Problem("precision", message)])
        reason = f"bfloat16 weights with exact remainders, {bf16_support(ctx.device)[1]}"
        self._made = SplitPrecision(ctx.device, reason, full_gradients=several, may_widen=alone)
        return self._made

    @hook(tryfirst=True)
    def on_restore(self, ctx: CallbackContext) -> None:
        """See that the optimizer takes its state back in float32: torch gives it the type that the parameters have then.

        Raises:
            ConfigError: when weights came without a remainder, or the strategy has put other parameters in the place of the model's.
        """
        parameters = [p for group in ctx.optimizer.param_groups for p in group["params"]]
        if name := next((self._made.narrow[p] for p in parameters if p in self._made.narrow), None):
            message = f"bf16_true keeps what rounding cuts off, and {name!r} is rounded to bfloat16 already. Load the model in float32."
            raise ConfigError([Problem("precision", message)])
        if not all(self._made.covers(p) for p in parameters):
            message = f"bf16_true does not work with {ctx.strategy.name}, which replaces the model's parameters. Use bf16."
            raise ConfigError([Problem("precision", message)])
        self._made.attach(ctx.optimizer)


def _accumulates(ctx: CallbackContext) -> bool:
    """Whether a step has several microbatches."""
    config = ctx.config
    if config.global_batch_size is None:
        return config.gradient_accumulation_steps > 1
    return config.global_batch_size > config.per_device_batch_size * ctx.strategy.world_size


def _must_have_bf16(name: str, device: torch.device) -> None:
    if (problem := why_no_autocast(device, torch.bfloat16)) is not None:
        raise ConfigError([Problem("precision", f"{name} does not work on the device '{device}' ({problem}). Use fp32.")])


@component
class Fp64(Component):
    """Parameters, buffers and inputs in float64, binary64 of IEEE 754 (2019, table 3.5).

    For checks of formulas, and where float32 is too coarse. Many times slower on GPUs.
    Targets are left as they are; the loss takes the type of the outputs.
    """

    kind: ClassVar[str] = "precision"

    def make_precision(self, ctx: CallbackContext) -> Precision:
        """Double precision.

        Raises:
            ConfigError: when the device has no float64.
        """
        try:
            torch.ones(1, device=ctx.device, dtype=torch.float64)
        except Exception as error:  # each backend has its own type
            message = f"fp64 does not work on the device '{ctx.device}' (torch says: {error}). Use fp32."
            raise ConfigError([Problem("precision", message)]) from error
        return DoublePrecision()


@component
class Fp16(Component):
    """Autocast to float16 with dynamic loss scaling (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2); for GPUs without bfloat16.

    A step whose gradients overflow is left out and counted in `ctx.skipped_steps`. Each step reads one value from the device.
    On most CPUs it works, for trying out, but is many times slower than fp32.
    """

    kind: ClassVar[str] = "precision"

    init_scale: float = option(default=65536.0, help="loss scale of the first step", above=0)
    growth_factor: float = option(default=2.0, help="the scale grows by this factor", above=1)
    backoff_factor: float = option(default=0.5, help="an overflow multiplies the scale by this", above=0, below=1)
    growth_interval: int = option(default=2000, help="steps in a row without overflow after which it grows", at_least=1)

    def make_precision(self, ctx: CallbackContext) -> Precision:
        """Autocast to float16 on `ctx.device`.

        Raises:
            ConfigError: when the device cannot compute in float16.
        """
        if (problem := why_no_autocast(ctx.device, torch.float16)) is not None:
            message = f"fp16 does not work on the device '{ctx.device}' ({problem}). Use bf16 or fp32."
            raise ConfigError([Problem("precision", message)])
        slow = "; slow on most CPUs" if ctx.device.type == "cpu" else ""
        return ScaledPrecision(
            ctx.device,
            f"float16 autocast with dynamic loss scaling{slow}",
            init_scale=self.init_scale,
            growth_factor=self.growth_factor,
            backoff_factor=self.backoff_factor,
            growth_interval=self.growth_interval,
        )


@component
class Auto(Component):
    """bf16 where the device computes it in hardware; else fp16 with loss scaling on NVIDIA GPUs that have matrix units for it (V100,
    T4); else fp32. `reason` says what was chosen and why.

    Hardware means: NVIDIA GPUs of compute capability 8.0 and more, AMD GPUs under ROCm, Intel GPUs that say so, x86 CPUs with
    AVX512-BF16 or AMX, Arm CPUs for which oneDNN has bfloat16 kernels. On a CPU a model whose largest matrix has fewer than 65,536
    numbers stays in fp32: each operation's casts take longer there than its product gains (tests/benchmarks/precision_cpu.py --widths).
    """

    kind: ClassVar[str] = "precision"

    def make_precision(self, ctx: CallbackContext) -> Precision:
        """bf16, fp16 or fp32 for `ctx.device` and `ctx.model`."""
        native, why = bf16_support(ctx.device)
        if native and ctx.device.type == "cpu" and (largest := _largest_matrix(ctx.model)) < _WORTH_CASTING:
            return _full("fp32", f"fp32: bf16 is {why}, but with matrices of at most {largest:,} numbers its casts take longer")
        if native:
            return _bf16(ctx.device, f"bf16: {why}")
        if fp16_is_fast(ctx.device):
            return ScaledPrecision(ctx.device, f"fp16 with dynamic loss scaling: bf16 is {why}, whose matrix units take fp16")
        return _full("fp32", f"fp32: bf16 is {why}")


def _largest_matrix(model: nn.Module) -> int:
    """Numbers in the largest parameter that may be a factor of a matrix product."""
    return max((p.numel() for p in model.parameters() if p.dim() > 1), default=0)
