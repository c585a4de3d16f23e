"""Mixed precision: parameters stay in float32, `torch.autocast` computes in a narrower type."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drivetrain import ConfigError, Precision, Problem
from drivetrain_precision.attention import Attention
from drivetrain_precision.rms_norm import rms_norm


class AutocastPrecision(Precision):
    """Autocast to `dtype` around forward and loss.

    One context object is made and entered again for every microbatch: `torch.autocast` keeps what it must restore on itself, so
    entering it again after leaving it is right, entering it within itself is not. Its cache of cast weights lives until it is
    left, hence a weight is cast once for each forward.
    """

    def __init__(self, name: str, dtype: torch.dtype, device: torch.device, reason: str) -> None:
        self.name, self.dtype, self.reason = name, dtype, reason
        self._context = torch.autocast(device.type, dtype)
        self._operations = faster_operations() if device.type == "cpu" else None

    def forward(self) -> torch.autocast:
        """The autocast context of forward and loss."""
        return self._context


def faster_operations() -> torch.library.Library:
    """Operations that torch is slow at under CPU autocast, computed in other ways as long as the returned object lives.

    What they give keeps autocast's type, so that to the caller only rounding differs. They go in at torch's dispatcher, below
    whatever a model calls: the models are other people's.
    """
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that torch's own rule is overridden: it is meant to be
        library.impl("scaled_dot_product_attention", Attention(), "AutocastCPU")
        library.impl("rms_norm", rms_norm, "AutocastCPU")
    return library


class ScaledPrecision(AutocastPrecision):
    """Autocast with dynamic loss scaling (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).

    Gradients below float16's 6e-8 would vanish, so the loss is multiplied by a scale that grows every `growth_interval` steps
    and shrinks when a gradient overflows; that step is left out. `torch.amp.GradScaler` does the arithmetic on the device.

    Cost: one value is read from the device in each step, whether the gradients were finite: it decides whether the step counts.
    With a fused optimizer, which leaves an overflowing step out by itself, the value is copied before the update is queued and
    waited for afterwards, so that a GPU updates the weights while the host prepares the next forward. `GradScaler` reads it before
    it calls any other optimizer, and the GPU idles from there until the next kernel arrives.
    """

    scales = True

    def __init__(self, device: torch.device, reason: str, **scaler_options: Any) -> None:
        super().__init__("fp16", torch.float16, device, reason)
        self._scaler = torch.amp.GradScaler(device.type, **scaler_options)

    def cast(self, model: nn.Module) -> nn.Module:
        """Leave the model as it is, if its gradients can be unscaled.

        Raises:
            ConfigError: when a trainable parameter is stored in float16, whose gradients have no room for a scale.
        """
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dtype == torch.float16:
                message = (
                    f"fp16 computes in float16 but needs trainable parameters stored in float32, and {name!r} is float16. "
                    "Load the model in float32 (model.float()), or train in bf16."
                )
                raise ConfigError([Problem("precision", message)])
        return model

    def scale(self, loss: Tensor) -> Tensor:
        """loss × scale."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale and note, on the device, whether they are finite."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Update the weights if every gradient is finite, then the scale. False when the step was left out."""
        finite: list[Callable[[], bool]] = []

        def note(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            """The optimizer is called; a fused one always is, and leaves the step out by itself, according to `found_inf`."""
            found = getattr(optimizer, "found_inf", None)
            finite.append((lambda: True) if found is None else _is_zero(found))

        with optimizer.register_step_pre_hook(note):
            self._scaler.step(optimizer)
        self._scaler.update()
        return bool(finite) and finite[0]()

    def skip(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the scale follow what `unscale` found."""
        self._scaler.update()

    def break_off(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget what `unscale` found; the scale stays. torch's scaler would refuse to unscale again before its `update`, which wants
        something to have been found."""
        self._scaler._per_optimizer_states.clear()

    def state_dict(self) -> dict[str, Any]:
        """The scale, and how many steps ago it last changed; reads both from the device."""
        state = self._scaler.state_dict()
        return {"scale": state["scale"], "growth_tracker": state["_growth_tracker"]}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave; growth and backoff stay those of the configuration."""
        mine = self._scaler.state_dict()
        self._scaler.load_state_dict({**mine, "scale": float(saved["scale"]), "_growth_tracker": int(saved["growth_tracker"])})


def _is_zero(value: Tensor) -> Callable[[], bool]:
    """Begin to read a scalar from the device now; the function returned waits for it, and not for what was queued since."""
    if value.device.type != "cuda":
        return lambda: not value.item()
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> bool:
        copied.synchronize()
        return not host.item()

    return wait
