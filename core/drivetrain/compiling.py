"""torch.compile of a model's repeated blocks: where the compiled code is kept, and what is said when a block is compiled again."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from tempfile import TemporaryFile
from types import FunctionType
from typing import Any

import torch
from torch import nn

_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_PROCESSOR = ("model name", "flags", "CPU implementer", "CPU part", "Features", "cpu", "isa")  # x86, ARM, POWER, RISC-V
# What is compiled apart in any run: evaluation; a first block, whose input needs no gradient and is not cast yet; blocks that differ.
_ANY_RUN = re.compile(r"grad_mode|(requires_grad|dtype|stride) mismatch|\b(module|self)\b")
_RECORDED = ("compile_id", "recompile_reason", "accumulated_cache_size", "duration_us", "fail_reason")
_numbers = count()


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """torch.compile modules in place; those that are alike share the compiled code.

    A block that the compiler cannot take runs as it is, and a warning says why.
    """
    _keep_cache()
    compiled: dict[Any, Any] = {}
    for block in blocks:
        kind = _kind(block)
        if kind not in compiled:
            compiled[kind] = torch.compile(_own_called(block))
        block._compiled_call_impl = _or_as_it_is(block, partial(compiled[kind], block))


def _kind(block: nn.Module) -> Any:
    parameters = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())
    return tuple(type(part) for part in block.modules()), parameters


# not `block.compile()`: that leaves torch's own containers, such as Sequential, uncompiled without a word
def _called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module._call_impl(*args, **kwargs)


def _own_called(block: nn.Module) -> Callable[..., Any]:
    """`_called` under a name of its own. Torch compiles a function's code a few times and then gives up, and takes dimensions that
    have changed for dynamic, by name: other kinds of blocks, and earlier runs of this process, must not count."""
    return FunctionType(_called.__code__.replace(co_name=f"{type(block).__name__}_{next(_numbers)}"), globals())


def _or_as_it_is(block: nn.Module, compiled: Any) -> Any:
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as error:
            block._compiled_call_impl = None
            why = str(error).strip().partition("\n")[0]
            warnings.warn(f"compile: {type(block).__name__} runs uncompiled, {type(error).__name__}: {why}", stacklevel=2)
        return block._call_impl(*args, **kwargs)

    return call


# -- the cache -------------------------------------------------------------------------------------------------------------


def _keep_cache() -> None:
    """Let inductor keep what it compiles in the user's cache, unless the environment names another place: torch's own lies in the
    temporary directory, which is lost at a reboot or with a job's node."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    own = os.path.abspath(default_cache_dir())
    if os.environ.get(_CACHE, own) != own:  # importing torch._dynamo, as optimizers do, writes torch's own place there
        return
    path = None
    try:
        path = _user_cache() / "drivetrain" / "compile" / f"{torch.__version__}-{_processor()}"
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            os.environ[_CACHE] = str(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        warnings.warn(f"compile: compiled code is kept in {own}, not in the user's cache ({path}): {error}", stacklevel=2)


def _user_cache() -> Path:
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen)
    if sys.platform == "win32" and (chosen := os.environ.get("LOCALAPPDATA")):
        return Path(chosen)
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")


def _processor() -> str:
    """A short name for what compiled code depends on. Machines with different processors share home directories, and inductor builds
    with -march=native: a binary of one must not be loaded on another; nor one of a newer C library on an older."""
    parts = [platform.machine(), platform.processor(), *platform.libc_ver()]
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        parts += sorted({line for line in lines if line.partition(":")[0].strip() in _PROCESSOR})
    except OSError:
        pass  # not Linux
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


# -- compiling again -------------------------------------------------------------------------------------------------------


class Recompilations:
    """Says what torch has compiled again since this was made, once for each reason."""

    def __init__(self) -> None:
        self._last = next(reversed(_compilations()), None)
        self._said: set[tuple[str, bool]] = set()

    def warn(self) -> None:
        """Warn of what is new."""
        new = list(takewhile(lambda one: one is not self._last, reversed(_compilations())))
        if not new:
            return
        self._last = new[0]
        causes: dict[str, tuple[float, bool]] = {}
        for one, why in reversed(list(_causes(new))):
            seconds, over = causes.get(why, (0.0, False))
            causes[why] = seconds + _seconds(one, new), over or _is_limit(one)
        for why, (seconds, over) in causes.items():
            if (why, over) not in self._said:
                self._said.add((why, over))
                warnings.warn(_message(why, seconds, over), stacklevel=2)


def _message(why: str, seconds: float, over: bool) -> str:
    what = f"compiled again, {seconds:.1f} s"
    if over:
        what = "compiled so often that torch gives up and runs it uncompiled wherever no compiled version fits"
    return f"compile: a block was {what}: {why}. {_remedy(why)}"


def _remedy(why: str) -> str:
    if re.search(r"\b(size|rank|stride)\b", why):
        return "Batches of one shape avoid that (dataloader.drop_last, padding to a fixed length); so does compile = false."
    if " == " in why:
        return "Numbers that a step reads from tensors (.item()) are compiled in: keep them in tensors, or set compile = false."
    return "compile = false avoids that."


def _compilations() -> list[Any]:
    """Torch's records of its last compilations in this process, forward and backward; none from a torch with other records."""
    from torch._dynamo import utils

    return [one for one in getattr(utils, "get_compilation_metrics", list)() if all(hasattr(one, name) for name in _RECORDED)]


def _causes(newest_first: list[Any]) -> Iterator[tuple[Any, str]]:
    """The compilations that the run could have done without, with a reason for each."""
    left: dict[str, list[str]] = {}
    for one in newest_first:
        if one.recompile_reason is None:
            continue
        frame, _, versions = str(one.compile_id).rpartition("/")
        failures = left.setdefault(frame, _guard_failures(frame))
        # Torch's record has the reason why one of the earlier versions did not fit; what tells is why each of them did not: where one
        # would have but for a shape, the shape is the cause.
        size = one.accumulated_cache_size or int(versions)
        whys = [_plain(why) for why in failures[-size:] or [one.recompile_reason]]
        del failures[-size:]
        avoidable = [why for why in whys if not _ANY_RUN.search(why)]
        if avoidable or _is_limit(one):
            yield one, (avoidable or whys)[0]


def _guard_failures(frame: str) -> list[str]:
    """Why compiled versions of a frame did not fit, in the order in which they were tried."""
    from torch._dynamo import utils

    found: dict[Any, list[str]] = getattr(utils, "guard_failures", {})
    return [why for whys in found.values() for why in whys if why.startswith(f"{frame}/")]


def _plain(reason: str) -> str:
    """Without the number of the compilation, the line of torch that asked and where the user's code stood."""
    return (reason.partition(": ")[2] or reason).partition("\n")[0].partition("  #")[0].strip().rstrip(".")


def _seconds(one: Any, among: list[Any]) -> float:
    """For the forward and, a record of its own, the backward."""
    return sum((other.duration_us or 0) / 1e6 for other in among if other.compile_id == one.compile_id)


def _is_limit(one: Any) -> bool:
    return "limit exceeded" in (one.fail_reason or "")
