"""The strategy protocol: how a model is spread over processes. This class is one process on one device and the base of all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from drivetrain.errors import ModelError
from drivetrain.scalars import at_hand

if TYPE_CHECKING:
    from drivetrain.peers import Peer

T = TypeVar("T")


class Strategy:
    """One process, one device. Subclasses override what they change; the loop calls these methods directly."""

    name = "single"
    reason = "one process"
    rank = 0
    world_size = 1
    norms: Tensor | None = None  # from the last `clip` to a limit: the 2-norm of each gradient, or of this process's part of it
    _steps_done = 0
    peers: Sequence[Peer] = ()  # every process of the run, known from when they have compared what they were started with

    @property
    def data_rank(self) -> int:
        """Which of `data_ranks` parts of each step's samples this process computes."""
        return self.rank

    @property
    def data_ranks(self) -> int:
        """How many processes have samples of their own; a divisor of `world_size`.

        Fewer than all where several neighbouring ranks compute one model together (tensor parallelism): those have the same
        samples, the same random numbers and the same losses.
        """
        return self.world_size

    def setup(self, device: torch.device) -> None:
        """Join the other processes. Called once, before the model is prepared."""

    def build(self, make: Callable[[], nn.Module | None]) -> nn.Module | None:
        """Call `make`, which builds the model from a component."""
        return make()

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Preparation phase "place on the device".

        Raises:
            ModelError: when the model was built without memory.
        """
        if any(p.is_meta for p in model.parameters()):
            raise ModelError(
                f"the model is on the meta device, and the strategy {self.name!r} cannot fill it. Build it on the CPU, or use fsdp."
            )
        return model.to(device)

    def settled(self) -> None:
        """The first step is done: what takes long once has been done, so from here on a wait may be short."""

    def meet(self, wanted: bool) -> bool:
        """Whether all ranks meet now, to hear who wants to stop and what time it is. Called after each step; no collective.

        All get the same answer, and True soon after one has wanted it. A strategy that cannot tell the others meets every 16th time.
        """
        self._steps_done += 1
        return wanted if self.world_size == 1 else self._steps_done % 16 == 0

    def judge(self, error: BaseException) -> BaseException:
        """What to raise in place of an error that ends the run: the same, or a `PeerFailure` that names the process at fault."""
        return error

    def wrap(self, model: nn.Module) -> nn.Module:
        """Preparation phase "shard or wrap": return the module that the loop calls."""
        return model

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any] | None:
        """The context of every microbatch's forward and backward but a step's last, in which gradients stay local; None for none."""
        return None

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        return value

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace the gradients by their mean over ranks, for strategies whose backward does not."""

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float | None, factor: Tensor | None) -> Tensor | None:
        """Multiply all gradients by `factor` (None for 1), then clip their total 2-norm to `max_norm` (None for no limit).

        Both are one pass over the gradients. Returns the norm before clipping as a scalar on the device, or None when
        `max_norm` is None. Nothing is read from a device. The formula is `torch.nn.utils.clip_grad_norm_`'s.
        """
        grads = [p.grad for p in parameters if p.grad is not None]
        if not grads:
            return None
        if max_norm is None:
            if factor is not None:
                torch._foreach_mul_(grads, factor)
            return None
        norm, self.norms = total_norm(grads)
        if factor is not None:
            norm = norm * factor
        known = None if factor is not None else at_hand(norm)
        if known is not None and known < 0.99 * max_norm - 1e-5:  # far enough below for any rounding
            return norm
        scale = ((norm + 1e-6).reciprocal() * max_norm).clamp(max=1.0)
        if known is None or at_hand(scale) != 1.0:
            torch._foreach_mul_(grads, scale if factor is None else scale * factor)
        return norm

    def gather(self, value: T) -> list[T]:
        """What every rank has, in the order of ranks. For plain data of moderate size."""
        return [value]

    def barrier(self) -> None:
        """Wait until every rank is here."""

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        """The wrapped model's weights under the names of the unwrapped model."""
        return dict(model.state_dict())

    def load_model_state(self, model: nn.Module, saved: Mapping[str, Any]) -> None:
        """Take back what `model_state` gave; every name must match."""
        model.load_state_dict(saved)

    def optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer's state as one process without wrapping would have it."""
        return optimizer.state_dict()

    def load_optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
        """Take back what `optimizer_state` gave, of this or another strategy."""
        optimizer.load_state_dict(dict(saved))

    def own_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `load_model_state` and `load_optimizer_state` of this process take back: its part of sharded tensors, nothing is sent."""
        return self.model_state(model), self.optimizer_state(model, optimizer)

    def pieces(self, tensor: Tensor, like: Any) -> Sequence[tuple[tuple[int, ...], Tensor]] | None:
        """Which parts of the whole a tensor of `own_state` is: plain views of it, each with its offsets in the whole.

        None, whatever the tensor, under a strategy whose processes have whole tensors. Otherwise checkpoints are written and read
        by all processes, each its own pieces, through `own_state`.

        Args:
            tensor: from `own_state`, or empty and made like a tensor of it.
            like: the live parameter or buffer that it is laid out as.
        """
        return None

    def teardown(self) -> None:
        """Leave the other processes. Called once, after the run, whatever happened."""


def total_norm(grads: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """The 2-norm of all gradients together, a scalar on the first one's device in its type; and of each, unless types differ or some
    are sparse."""
    kinds = {(g.device, g.dtype, g.layout) for g in grads}
    if len(kinds) == 1 and kinds.pop()[2] is torch.strided:
        norms = torch.stack(torch._foreach_norm(grads, 2.0))
        return torch.linalg.vector_norm(norms), norms
    # a sparse gradient may have several entries for one place, and no norm of its own in torch
    return torch.nn.utils.get_total_norm([g.coalesce().values() if g.is_sparse else g for g in grads]), None
