"""Fully sharded data parallelism with torch's `fully_shard` (FSDP2), as the Drivetrain strategy `fsdp`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from drivetrain import Component, component, option
from drivetrain_fsdp.blocks import blocks_to_shard
from drivetrain_fsdp.deferred import deferred
from drivetrain_fsdp.strategy import FsdpStrategy
from drivetrain_fsdp.tensor import TensorParallel

if TYPE_CHECKING:
    from drivetrain import CallbackContext, Strategy

__all__ = ["Fsdp", "FsdpStrategy", "TensorParallel", "blocks_to_shard", "deferred"]


@component
class Fsdp(Component):
    """Parameters, gradients and optimizer state are divided among the processes; each block's parameters are gathered when it
    runs (Zhao et al. 2023, arXiv:2304.11277; `torch.distributed.fsdp.fully_shard`).

    Needs no configuration: the blocks are the model's repeated ones, or those that transformers marks as not to be split; without
    either, modules of at least an eighth of the model. The last block keeps its parameters between forward and backward, since
    backward needs them at once. In 16-bit precision blocks are gathered in 16 bits; gradients are added up in float32.
    """

    kind: ClassVar[str] = "strategy"

    shards: int | None = option(
        default=None,
        at_least=1,
        help="divide among groups of this many processes and replicate over the groups (HSDP); by default among all",
    )
    tensor_parallel: TensorParallel | None = option(
        default=None, help="a table {size, plan}: divide the matrices of each block among `size` neighbouring processes as well"
    )
    min_block_parameters: int = option(default=0, at_least=0, help="leave smaller blocks to the one around them")
    reshard_after_forward: bool = option(
        default=True, help="free gathered parameters after forward; false trades memory for speed"
    )
    defer_init: bool = option(
        default=False, help="build the configuration's model without memory and fill it block by block, with the same weights"
    )
    cpu_offload: bool = option(default=False, help="keep parameters, gradients and optimizer state in host memory")
    timeout: float = option(default=600.0, above=0, help="seconds after which a collective that a process does not join fails")
    setup_timeout: float = option(default=900.0, above=0, help="the same for meeting and until the end of the first step")

    def make_strategy(self, ctx: CallbackContext) -> Strategy:
        """A strategy over the processes that the launcher started."""
        return FsdpStrategy(self, ctx)
