"""bfloat16 weights that are the upper half of exact float32 ones: a weight is 16 bits to compute with and 16 bits of remainder."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drivetrain import PluginError
from drivetrain_precision.autocast import AutocastPrecision

_BUCKET = 1 << 24  # weights converted together: few kernels, and at most 64 MiB for each of their intermediate results
_ALIGNED = 128  # weights; matrix kernels are fastest from addresses that are multiples of 16 bytes
_NAN = 0x7FC00000  # of all float32 NaNs the one whose upper half is a NaN however it is rounded


class Bucket:
    """Some parameters in one float32 storage, which shows them in one of two ways.

    Joined, for the optimizer, it holds the float32 weights. Split, for the model, its first half holds them rounded to the
    nearest bfloat16 and its second half the remainders, int16: as 32-bit integers, bits(float32) = bits(bfloat16)·2¹⁶ + remainder.
    Both ways take the same memory, and a parameter has the same address whenever it is split.

    Idea: the speedruns of modded-nanogpt (github.com/KellerJordan/modded-nanogpt, record 57), there with truncation.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters, self.is_joined = parameters, True
        starts, end = [], 0
        for parameter in parameters:
            starts.append(end)
            end += -(-parameter.numel() // _ALIGNED) * _ALIGNED
        storage = torch.zeros(end, dtype=torch.float32, device=parameters[0].device)
        self._bits, halves = storage.view(torch.int32), storage.view(torch.int16)
        self._high, self._low = halves.split(end)
        # torch.empty_like: the strides of a dense tensor (channels_last, say), those of a contiguous one for others
        like = [(p.shape, torch.empty_like(p, device="meta").stride(), s) for p, s in zip(parameters, starts, strict=True)]
        self._full = [storage.as_strided(*place) for place in like]
        self._rounded = [halves.view(torch.bfloat16).as_strided(*place) for place in like]
        self._others = [rounded.requires_grad_() for rounded in self._rounded]
        self.remainders = [halves.as_strided(shape, stride, end + start) for shape, stride, start in like]
        for parameter, full in zip(parameters, self._full, strict=True):
            parameter.data = full.copy_(parameter.data)

    def swap(self) -> None:
        """Turn float32 parameters into bfloat16 ones and back; what they hold is right only after `join` or `split`.

        Assigning `parameter.data` would do, but a change of type makes autograd forget the hooks by which DDP learns of gradients.
        """
        for parameter, other in zip(self.parameters, self._others, strict=True):
            torch._C._swap_tensor_impl(parameter, other)

    def split(self) -> None:
        """Make the parameters bfloat16."""
        for parameter, full in zip(self.parameters, self._full, strict=True):
            if parameter.data_ptr() != full.data_ptr():  # an optimizer gave it memory of another layout (bitsandbytes does)
                full.copy_(parameter.data)
        bits = self._bits.clone()
        bits.masked_fill_(self._bits.view(torch.float32).isnan(), _NAN)  # NVIDIA's own, 0x7FFFFFFF, would round to -0.0
        high = (bits + 0x8000) >> 16
        low = bits.sub_(high << 16)
        self._high.copy_(high)  # from here on no memory is needed: what has run out of it before has changed nothing
        self._low.copy_(low)
        self.swap()
        self.is_joined = False

    def join(self) -> None:
        """Make the parameters, and the gradients they have, float32."""
        bits = (self._high.int() << 16).add_(self._low)
        self._bits.copy_(bits)
        self.swap()
        self.is_joined = True
        for parameter, rounded in zip(self.parameters, self._others, strict=True):
            gradient, rounded.grad = rounded.grad, None
            parameter.grad = None if gradient is None else gradient.float()


class SplitPrecision(AutocastPrecision):
    """bfloat16 weights and autocast in the model, exact float32 weights in the optimizer.

    From `unscale` to the end of `step` the parameters and their gradients are float32, so clipping, listeners and any optimizer
    with its state work as in float32 training. At all other times matrices are bfloat16; vectors (biases, norms) stay float32,
    which costs nothing and is what norms want.
    """

    scales = True  # nothing is scaled, but `unscale` and `step` must be called

    def __init__(self, device: torch.device, reason: str, *, full_gradients: bool, may_widen: bool = False) -> None:
        super().__init__("bf16_true", torch.bfloat16, device, reason)
        self._full_gradients = full_gradients
        self._may_widen = may_widen and not full_gradients  # once a step has a second microbatch
        self._in_step = False  # whether a backward has begun since the last update
        self._buckets: list[Bucket] = []
        self._remainders: dict[str, Tensor] = {}
        self.narrow: dict[nn.Parameter, str] = {}  # trainable parameters that were bfloat16 when they came, with their names
        self._attached = False

    def cast(self, model: nn.Module) -> nn.Module:
        """Split the trainable float32 matrices; round the frozen ones."""
        names: dict[nn.Parameter, str] = {}
        for name, parameter in model.named_parameters():
            if parameter.dtype == torch.float32 and parameter.ndim >= 2 and type(parameter.data) is Tensor:
                if parameter.requires_grad:
                    names[parameter] = name
                else:
                    parameter.data = parameter.data.bfloat16()
            elif parameter.dtype == torch.bfloat16 and parameter.requires_grad:
                self.narrow[parameter] = name
        self._buckets = [Bucket(some) for some in _in_buckets(names)]
        for bucket in self._buckets:
            bucket.split()
            self._remainders |= {names[p]: r for p, r in zip(bucket.parameters, bucket.remainders, strict=True)}
            if self._full_gradients:
                _widen(bucket.parameters)
        return model

    def scale(self, loss: Tensor) -> Tensor:
        """The loss as it is. From a step's second microbatch on gradients are float32, so that their sum is exact, if they may be."""
        if self._in_step and self._may_widen:
            self._widen_gradients()
        self._in_step = True
        return loss

    def _widen_gradients(self) -> None:
        """A run may get several microbatches that began with one: a finder divides its steps, or memory has run out.

        The first one's gradients lose nothing: their sum begins here.
        """
        parameters = [p for bucket in self._buckets for p in bucket.parameters]
        gradients = [p.grad for p in parameters]
        if all(gradient is None for gradient in gradients):  # what came before was given up
            return
        self._may_widen = False
        if not hasattr(Tensor, "grad_dtype"):
            message = (
                f"bf16_true: torch {torch.__version__} adds the gradients of a step's microbatches up in bfloat16. Use bf16."
            )
            warnings.warn(message, stacklevel=2)
            return
        for parameter in parameters:
            parameter.grad = None
        _widen(parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.float()

    def swap(self) -> None:
        """Let the parameters have the type that they have for the optimizer, or again the one for the model."""
        for bucket in self._buckets:
            bucket.swap()

    def covers(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter is one of those that were split, or needs not be."""
        return parameter.dtype != torch.bfloat16 or any(parameter is p for b in self._buckets for p in b.parameters)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """See that `optimizer.load_state_dict` meets float32 parameters: torch casts a loaded state to the type they have then.

        Its hooks would not do: when it refuses a state, the later one is not called.
        """
        if self._attached:
            return
        load = optimizer.load_state_dict

        def load_state_dict(state_dict: dict[str, Any]) -> None:
            self.swap()
            try:
                load(state_dict)
            finally:
                self.swap()

        optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]
        self._attached = True

    def join(self) -> None:
        """Make the parameters float32, if they are not."""
        for bucket in self._buckets:
            if not bucket.is_joined:
                bucket.join()

    def split(self) -> None:
        """Make the parameters bfloat16, if they are not."""
        self._in_step = False
        for bucket in self._buckets:
            if bucket.is_joined:
                bucket.split()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Hand the exact weights to whoever comes before the optimizer."""
        self.join()

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Update the exact weights, and round them for the model."""
        optimizer.step()
        self.split()
        return True

    def skip(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave the weights as they are."""
        self.split()

    def break_off(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave the weights as they are, wherever the step broke off."""
        self.split()

    def state_dict(self) -> dict[str, Any]:
        """The remainders of the weights by the parameters' names."""
        return {"remainders": dict(self._remainders)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, beside the weights it belongs to.

        Raises:
            PluginError: when it belongs to another model, or to another precision.
        """
        remainders = saved.get("remainders", {})
        if set(remainders) != set(self._remainders):
            raise PluginError(
                "bf16_true: the saved run has no remainders for these weights: it was of another precision, or another model. "
                "Resume it as it was, or start a new run from its weights."
            )
        for name, remainder in remainders.items():
            self._remainders[name].copy_(remainder)


def _widen(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad_dtype = torch.float32


def _in_buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbours of one device, up to a bucket's size."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (size + parameter.numel() > _BUCKET or parameter.device != bucket[0].device):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket
