"""What code does behind one's back, counted on ordinary steps: waits for the device, files, collectives, calls."""

from __future__ import annotations

import gc
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import drivetrain
from drivetrain import Callback, CallbackContext, Strategy, component, hook, option

T = TypeVar("T")
# What hands values of a tensor to Python, and so waits for the device that computes them.
_READS = (
    "item",
    "tolist",
    "cpu",
    "numpy",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__repr__",
    "__format__",
    "__array__",
)
_WAITING_OPS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "is_nonzero")
_OWN = tuple(os.path.dirname(str(file)) + os.sep for file in (__file__, torch.__file__, drivetrain.__file__))
_LIBRARY = os.path.dirname(os.__file__) + os.sep
_audited = threading.local()
_hooked = threading.Event()


def where() -> str:
    """The innermost line of the current call that is neither the engine's nor torch's nor the standard library's: "file.py:12"."""
    for frame in reversed(traceback.extract_stack()):
        library = frame.filename.startswith(_LIBRARY) and "site-packages" not in frame.filename
        if not library and not frame.filename.startswith((*_OWN, "<")):
            return f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.lineno}"
    return "an unknown place"


# What a run on the CPU is told that its device is: "cpu" without a number then means the host, as on a machine with a GPU.
ACCELERATOR = torch.device("cpu", 0)
_GET_DEVICE = torch.Tensor.device.__get__  # what reading `tensor.device` calls
_IS_CPU = torch.Tensor.is_cpu.__get__  # type: ignore[attr-defined]


class _Accelerator(TorchFunctionMode):
    """Tensors say that they are on `ACCELERATOR`."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == _IS_CPU:
            return False
        found = function(*args, **(kwargs or {}))
        return ACCELERATOR if isinstance(found, torch.device) and function == _GET_DEVICE and found.type == "cpu" else found


class _Reads(TorchFunctionMode):
    """Notes Python calls that read a tensor's values, except those of an optimizer's host counters."""

    def __init__(self, found: list[str], host: set[int]) -> None:
        self.found, self.host = found, host

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = getattr(function, "__name__", ""), kwargs or {}
        reads = name in _READS or (name == "to" and _to_host(args[1:], given))
        if reads and args and isinstance(args[0], Tensor) and args[0].data_ptr() not in self.host:
            self.found.append(f"Tensor.{name} at {where()}")
        return function(*args, **given)


def _to_host(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `tensor.to(*args, **kwargs)` copies to the host and waits until the copy is there."""
    places = [value for value in (*args[:1], kwargs.get("device")) if isinstance(value, (str, torch.device))]
    waits = not kwargs.get("non_blocking", any(value is True for value in args[1:]))
    return waits and any(torch.device(place) == torch.device("cpu") for place in places)


class _Operations(TorchDispatchMode):
    """Notes operations whose result the host must wait for, whoever calls them."""

    def __init__(self, found: list[str], host: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found, self.host = found, host

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.__name__.partition(".")[0]
        masked = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if (name in _WAITING_OPS or masked) and args[0].data_ptr() not in self.host:
            self.found.append(f"{name} at {where()}")
        return operation(*args, **(kwargs or {}))


@contextmanager
def reads_noted(found: list[str], host: set[int] | None = None) -> Iterator[None]:
    """Write down each place at which tensors are read by the host. `host`: addresses of tensors that live there anyway."""
    with _Reads(found, host or set()), _Operations(found, host or set()):
        yield


@contextmanager
def writes_noted(found: list[str]) -> Iterator[None]:
    """Write down each file that this thread opens for writing, makes, renames or removes, and how many bytes it writes."""
    if not _hooked.is_set():  # a hook cannot be taken away again; it does nothing outside of such a block
        sys.addaudithook(_on_audit)
        _hooked.set()
    before, _audited.found = _written(), found
    try:
        yield
    finally:
        _audited.found = None
        if (count := _written() - before) and not found:
            found.append(f"{count} bytes were written to something opened before")


def _on_audit(event: str, arguments: tuple[Any, ...]) -> None:
    found = getattr(_audited, "found", None)
    if found is None or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.truncate"):
        return
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        return
    found.append(f"{event} {arguments[0]!r} at {where()}")


def _written() -> int:
    """Bytes that this thread has handed to the system so far; 0 where the system does not count."""
    try:
        text = Path(f"/proc/self/task/{threading.get_native_id()}/io").read_text()
    except OSError:
        return 0
    return int(dict(line.split(": ") for line in text.splitlines())["wchar"])


class _Collectives(TorchDispatchMode):
    """Notes collectives of torch.distributed, whoever calls them."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.namespace in ("c10d", "_c10d_functional"):
            self.found.append(f"torch.distributed: {operation.__name__.partition('.')[0].strip('_')} at {where()}")
        return operation(*args, **(kwargs or {}))


@contextmanager
def pretended_group() -> Iterator[None]:
    """This process is rank 0 of a process group of two, whose collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


class PretendedRanks(Strategy):
    """One process that believes to be rank 0 of two, the other of which always has the same; notes each collective."""

    name = "pretended"
    world_size = 2

    def __init__(self) -> None:
        self.found: list[str] = []

    def sum(self, value: Tensor) -> Tensor:
        if sys._getframe(1).f_globals.get("__name__") != "drivetrain.loop":  # which adds up the weights of a `Loss`
            self.found.append(f"sum at {where()}")
        return value * 2

    def gather(self, value: T) -> list[T]:
        self.found.append(f"gather at {where()}")
        return [value, value]

    def barrier(self) -> None:
        self.found.append(f"barrier at {where()}")

    # What sharding strategies gather the shards for.

    def model_state(self, model: torch.nn.Module) -> dict[str, Any]:
        self.found.append(f"model_state at {where()}")
        return super().model_state(model)

    def optimizer_state(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        self.found.append(f"optimizer_state at {where()}")
        return super().optimizer_state(model, optimizer)


@component
class Watch(Callback):
    """Watches the ordinary steps of a run: those from `first` to `last`, which neither log nor evaluate.

    Give it as the first callback, so that its `on_step_start` comes before the others' and its `on_step_end` after them.
    """

    first: int = option(default=3, help="first step watched, from 1")
    last: int = option(default=5, help="last step watched")
    what: str = option(default="reads", help="reads, writes, calls or collectives")

    def __attrs_post_init__(self) -> None:
        self.found: list[str] = []
        self.calls = 0
        self._open: ExitStack | None = None
        self._whole = ExitStack()

    @hook(tryfirst=True)
    def on_run_start(self, ctx: CallbackContext) -> None:
        """Let tensors say that they are on a device, as `ctx.device` does."""
        if self.what == "reads":
            self._whole.enter_context(_Accelerator())

    @hook(tryfirst=True)
    def on_step_start(self, ctx: CallbackContext) -> None:
        """Begin to watch."""
        if not self.first <= ctx.step + 1 <= self.last:
            return
        self._open = ExitStack()
        if self.what == "reads":
            self._open.enter_context(reads_noted(self.found, _host_counters(ctx.optimizer)))
        elif self.what == "writes":
            self._open.enter_context(writes_noted(self.found))
        elif self.what == "calls":
            if gc.isenabled():  # what it would call belongs to whoever left the garbage, in whatever test
                gc.disable()
                self._open.callback(gc.enable)
            sys.setprofile(self._count)
            self._open.callback(sys.setprofile, None)
        else:
            strategy = ctx.strategy
            assert isinstance(strategy, PretendedRanks)
            before = len(strategy.found)
            self._open.callback(lambda: self.found.extend(strategy.found[before:]))
            self._open.enter_context(_Collectives(self.found))

    @hook(trylast=True)
    def on_step_end(self, ctx: CallbackContext) -> None:
        """End it."""
        if self._open is not None:
            self._open.close()
            self._open = None

    @hook(tryfirst=True)
    def on_run_end(self, ctx: CallbackContext) -> None:
        """Also when the step failed."""
        self.on_step_end(ctx)
        self._whole.close()

    def _count(self, frame: Any, event: str, argument: Any) -> None:
        self.calls += event in ("call", "c_call")


def _host_counters(optimizer: torch.optim.Optimizer) -> set[int]:
    """The addresses of the state `step`, which torch's optimizers keep on the host as a scalar tensor."""
    found = (state.get("step") for state in optimizer.state.values() if isinstance(state, dict))
    return {step.data_ptr() for step in found if isinstance(step, Tensor) and step.device.type == "cpu"}


def fields_kept_by(cls: type) -> dict[str, Any]:
    """The mutable attributes that all instances of a class share."""
    names = {name for base in cls.__mro__ for name in vars(base) if not name.startswith("__")}
    declared = {f.name for f in attrs.fields(cls)} if attrs.has(cls) else set()
    shared = {name: getattr(cls, name, None) for name in names - declared}
    return {name: value for name, value in shared.items() if isinstance(value, (list, dict, set, bytearray, Tensor))}
