"""Several ranks: what one of them meets reaches all, so that none waits for one that has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from drivetrain_checkpoint.errors import CheckpointError

if TYPE_CHECKING:
    from drivetrain import CallbackContext

T = TypeVar("T")


def is_divided(ctx: CallbackContext) -> bool:
    """Whether the run's processes have parts of its tensors, so that each writes and reads its own."""
    return ctx.strategy.pieces(torch.empty(0), None) is not None


def on_rank_0(ctx: CallbackContext, action: Callable[[], T]) -> T:
    """Let rank 0 act, and give its result, plain data, to all ranks. Its error is raised on all of them."""
    if ctx.strategy.world_size == 1:
        return action()
    result, error = _tried(action) if ctx.is_main else (None, None)
    result, failed = ctx.strategy.gather((result, _text(error)))[0]
    if failed:
        raise error or CheckpointError(f"on rank 0: {failed}")
    return cast(T, result)


def on_every_rank(ctx: CallbackContext, action: Callable[[], T]) -> T:
    """Let every rank act for itself; the first one's error is raised on all of them."""
    if ctx.strategy.world_size == 1:
        return action()
    result, error = _tried(action)
    failed = [(rank, text) for rank, text in enumerate(ctx.strategy.gather(_text(error))) if text]
    if failed:
        raise error or CheckpointError(f"on rank {failed[0][0]}: {failed[0][1]}")
    return cast(T, result)


def _tried(action: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _text(error: Exception | None) -> str:
    return "" if error is None else str(error) or type(error).__name__
