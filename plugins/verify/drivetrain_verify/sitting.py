"""The sittings of a trial, each in a process of its own: `python -m drivetrain_verify.sitting` forks one for each order it reads.

It has imported torch and nothing else by then, so that a sitting begins in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import attrs
import torch
from torch import Tensor

from drivetrain import Callback, CallbackContext, Trainer, component, hook, load_training_config, option

_CLOCKS = ("progress/seconds",)


@component
class Probe(Callback):
    """Records the state before each step, and ends the run after the last one."""

    path: Path = option(help="where")
    sitting: int = option(help="which process of its run this is")
    last: int = option(help="the step after which the run ends")

    _first: bool = attrs.field(default=False, init=False, repr=False)

    @hook(tryfirst=True)
    def on_run_start(self, ctx: CallbackContext) -> None:
        """A run that had come to its last step is complete."""
        self._first = ctx.resumed
        if ctx.step >= self.last:
            ctx.trainer.stop("verified long enough")

    @hook(tryfirst=True)
    def on_step_start(self, ctx: CallbackContext) -> None:
        """Record. The random state has been put back by now, and the batches are at hand."""
        self._write(ctx, ctx.window)

    @hook(tryfirst=True)
    def on_step_end(self, ctx: CallbackContext) -> None:
        """End after the last step."""
        if ctx.step >= self.last:
            ctx.trainer.stop("verified long enough")  # an interruption: no last evaluation of all data

    @hook(tryfirst=True)
    def on_run_end(self, ctx: CallbackContext) -> None:
        """Record how it ended: the weights after the last step."""
        if ctx.exception is None:
            self._write(ctx, [])

    def _write(self, ctx: CallbackContext, window: list[Any]) -> None:
        if not ctx.is_main:
            return
        state = {key: value for key, value in ctx.state_dict().items() if key != "manifest"}
        leaves = {path: digest for path, digest in _digests(state, "") if path not in _CLOCKS}
        if window:
            leaves |= {"batch": _digest(window), "samples": _samples(ctx)}
        else:  # not at a step: an evaluation, or the end, may have used random numbers
            leaves = {path: digest for path, digest in leaves.items() if not path.startswith("rng")}
        place = [ctx.epoch, ctx.step_in_epoch] if window else [-1, ctx.step]
        row = {"sitting": self.sitting, "place": place, "step": ctx.step + 1, "first": self._first, "leaves": leaves}
        row["clock"] = time.monotonic()
        self._first = False
        with open(self.path, "ab") as file:  # one write: a kill leaves whole lines and perhaps one that is cut short
            file.write(f"\n{json.dumps(row)}\n".encode())


def _samples(ctx: CallbackContext) -> str:
    order = ctx.sample_order
    return "" if order is None else " ".join(map(str, order.step(ctx.epoch, ctx.step_in_epoch).tolist()))


def _digests(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """A digest for every leaf of a tree, lists of plain numbers being one leaf."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _digests(item, f"{path}/{key}" if path else str(key))
    elif isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, Tensor)) for item in value):
        for index, item in enumerate(value):
            yield from _digests(item, f"{path}/{index}")
    else:
        yield path, _digest(value)


def _digest(value: Any) -> str:
    found = hashlib.sha256()
    for part in _parts(value):
        found.update(part)
    return found.hexdigest()[:16]


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        host = value.detach().cpu().contiguous()
        if host.numel():
            bytes_of = host.reshape(-1).view(torch.uint8)
            yield bytes_of.numpy().tobytes() if "numpy" in sys.modules else bytes(bytes_of.tolist())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _parts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _parts(item)
    else:
        yield repr(value).encode()


def run(order: Mapping[str, Any]) -> None:
    """Train as the order says: the configuration with its overrides, the probe beside its callbacks."""
    config = load_training_config(order["file"], overrides=order["overrides"])
    probe = Probe(path=Path(order["records"]), sitting=order["sitting"], last=order["steps"])
    Trainer(None, config, callbacks=[probe]).train()


def serve() -> None:
    """For each line, the path of an order: fork a sitting, say its process id, wait for it, say its exit code."""
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            _sit(Path(line.strip()))
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def _sit(path: Path) -> NoReturn:
    order = json.loads(path.read_text())
    with open(order["log"], "wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    code = 1
    try:
        run(order)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    os.environ.setdefault("WANDB_MODE", "disabled")  # a trial is no run to keep
    serve()
