"""TPUs through PyTorch/XLA: the devices `tpu` and `xla`, and the strategy `xla`.

torch_xla is imported when a run asks for one of them, so that this package can be installed, listed and checked without it.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from drivetrain import Component, ConfigError, Problem, Strategy, component, hook

if TYPE_CHECKING:
    from drivetrain import CallbackContext

__all__ = ["Xla", "XlaStrategy", "tpu_device", "xla_device"]
T = TypeVar("T")


def xla_device(local_rank: int) -> torch.device:
    """The device of the kind `xla`: whatever PJRT has, as PJRT_DEVICE says.

    Args:
        local_rank: which of the devices that this process sees; the first one where the launcher shows each process its own.

    Raises:
        ConfigError: when torch_xla is missing, does not match torch, or finds no device.
    """
    xla = _torch_xla()
    try:
        devices = xla.devices()
    except RuntimeError as error:
        raise _refused(f"PJRT finds no device: {str(error).partition(chr(10))[0]}") from error
    if not devices:
        raise _refused("PJRT finds no device; is PJRT_DEVICE set to what this machine has?")
    _register_generators(xla)
    device: torch.device = devices[local_rank] if local_rank < len(devices) else devices[0]
    return device


def tpu_device(local_rank: int) -> torch.device:
    """The device of the kind `tpu`: as `xla_device`, but a TPU or nothing: PJRT would quietly take the CPU.

    Raises:
        ConfigError: also when what PJRT has is no TPU.
    """
    _torch_xla()
    kind = import_module("torch_xla.runtime").device_type()
    if kind != "TPU":
        raise _refused(f"PJRT has {kind or 'nothing'} here, no TPU; set PJRT_DEVICE=TPU on a machine that has one")
    return xla_device(local_rank)


@component
class Xla(Component):
    """Run each step as one XLA program; with several processes, as `torch_xla.launch` starts them, average gradients over them.

    XLA collects operations and runs them when it is told to: this component tells it after each step and each evaluation batch.
    """

    kind: ClassVar[str] = "strategy"

    def make_strategy(self, ctx: CallbackContext) -> Strategy:
        """A strategy over PJRT's processes."""
        return XlaStrategy()

    @hook(tryfirst=True)
    def on_step_end(self, ctx: CallbackContext) -> None:
        """Run what the step has collected, without waiting for it."""
        _torch_xla().sync()

    @hook(tryfirst=True)
    def on_evaluate_batch(self, ctx: CallbackContext) -> None:
        """The same in evaluation."""
        _torch_xla().sync()


class XlaStrategy(Strategy):
    """Data parallelism over the processes that PJRT knows: one all-reduce of all gradients after backward."""

    name = "xla"

    def setup(self, device: torch.device) -> None:
        """Ask PJRT who the others are."""
        _torch_xla()
        runtime = import_module("torch_xla.runtime")
        self._model = import_module("torch_xla.core.xla_model")
        self.rank, self.world_size = runtime.global_ordinal(), runtime.world_size()
        self.reason = f"{self.world_size} PJRT process{'es' if self.world_size != 1 else ''}"

    def wrap(self, model: nn.Module) -> nn.Module:
        """Give every process rank 0's weights and buffers."""
        if self.world_size > 1:
            self._model.broadcast_master_param(model)
        return model

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average the gradients; a parameter without one counts as zero, so that all processes reduce the same."""
        if self.world_size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters]
        self._model.all_reduce(self._model.REDUCE_SUM, gradients, scale=1.0 / self.world_size)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes."""
        if self.world_size == 1:
            return value
        result: Tensor = self._model.all_reduce(self._model.REDUCE_SUM, value.detach().clone())
        return result

    def gather(self, value: T) -> list[T]:
        """What every process has, through the devices' memory."""
        if self.world_size == 1:
            return [value]
        return [pickle.loads(part) for part in self._model.rendezvous("drivetrain", pickle.dumps(value))]

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            self._model.rendezvous("drivetrain")


def _torch_xla() -> Any:
    """The module, after a look at its version: with another torch than its own it would not load, or crash later.

    Raises:
        ConfigError: when it is missing or does not match.
    """
    wanted = _release(torch.__version__)
    try:
        found = metadata.version("torch_xla")
    except metadata.PackageNotFoundError:
        raise _refused(
            f"torch_xla is not installed: pip install 'torch_xla[tpu]=={wanted}.*', if there is one for torch {wanted}"
        ) from None
    if _release(found) != wanted:
        raise _refused(
            f"torch_xla {found} works with torch {_release(found)} only, and torch {torch.__version__} is installed; "
            f"pip install 'torch=={_release(found)}.*', or a torch_xla {wanted}"
        )
    try:
        return import_module("torch_xla")
    except (ImportError, OSError) as error:
        raise _refused(f"torch_xla {found} cannot be imported: {error}") from error


def _release(version: str) -> str:
    """ "2.9" of "2.9.1+cpu"."""
    match = re.match(r"\d+\.\d+", version)
    return match[0] if match else version


def _refused(why: str) -> ConfigError:
    return ConfigError([Problem("device", why)])


def _register_generators(xla: Any) -> None:
    """Let torch find the device's random generator where it finds the others' (`torch.cuda`), unless torch_xla has seen to it."""
    if not hasattr(torch, "xla"):
        torch._register_device_module("xla", _Generator(xla))


class _Generator:
    """What a run asks of a device's module: its random state, one number for XLA."""

    def __init__(self, xla: Any) -> None:
        self._xla = xla

    def manual_seed(self, seed: int) -> None:
        """Seed the default device."""
        self._xla.manual_seed(seed)

    def get_rng_state(self, device: torch.device) -> int:
        """The state of a device's generator."""
        return int(import_module("torch_xla.core.xla_model").get_rng_state(str(device)))

    def set_rng_state(self, state: int, device: torch.device) -> None:
        """Put a state back."""
        self._xla.manual_seed(state, device=str(device))
