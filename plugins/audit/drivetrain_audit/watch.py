"""Seeing what makes a step wait, write or communicate, while an audit listens; afterwards everything is as it was.

Three ways, since none sees everything: the methods of tensors that hand values to the host are replaced (`tolist` and `numpy` reach no
dispatcher on a CPU), a dispatch mode sees the operations whose result or shape depends on values (a boolean index, `nonzero`) and
the collectives, and `sys.addaudithook` the files that are opened, renamed and removed. On CUDA torch's own sync debug mode takes the
place of the dispatch mode's first half.
"""

from __future__ import annotations

import builtins
import functools
import os
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from drivetrain import at_hand

READ, COLLECTIVE, WRITE = "reads a tensor", "collective", "writes a file"
Tell = Callable[[str, str, Any], None]  # kind, what, and the tensor or None

_READERS = {
    "item": "item()",
    "tolist": "tolist()",
    "numpy": "numpy()",
    "cpu": "cpu()",
    "__float__": "float()",
    "__int__": "int()",
    "__bool__": "bool()",
    "__index__": "as an index",
    "__array__": "as an array",
    "__repr__": "as text",
    "__format__": "as text",
}
_WAITERS = ((torch.cuda, "synchronize"), (torch.cuda.Stream, "synchronize"), (torch.cuda.Event, "synchronize"))
_COLLECTIVES = ("c10d", "_c10d_functional")
_BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_FILE_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.link", "os.symlink", "os.truncate", "sqlite3.connect")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_SYNC_WARNING = "called a synchronizing CUDA operation"

_listening: list[Tell] = []
_undo: list[Callable[[], None]] = []
_hooked = False  # a hook of the interpreter stays for the life of the process
_thread = threading.local()


def listen(tell: Tell) -> None:
    """Call `tell` for all that is seen, in whichever thread and run; the first listener puts the watch in place."""
    _listening.append(tell)
    if len(_listening) == 1:
        _install()


def leave(tell: Tell) -> None:
    """End that; the last listener takes the watch away."""
    if tell in _listening:
        _listening.remove(tell)
        if not _listening:
            while _undo:
                _undo.pop()()


@contextmanager
def once() -> Iterator[None]:
    """What happens within has been told of: `print(tensor)` is one reading, not five."""
    outer, _thread.inside = getattr(_thread, "inside", False), True
    try:
        yield
    finally:
        _thread.inside = outer


def said(kind: str, what: str, tensor: Any = None) -> None:
    """Tell the listeners."""
    if not getattr(_thread, "inside", False):
        with once():  # the listeners read files and positions of their own
            for tell in tuple(_listening):
                tell(kind, what, tensor)


def _install() -> None:
    global _hooked
    for name, what in _READERS.items():
        _replace(Tensor, name, READ, what)
    _replace(Tensor, "to", READ, 'to("cpu")', lambda _, *args, **kwargs: "cpu" in (*args, kwargs.get("device")))
    for owner, name in _WAITERS:
        _replace(owner, name, READ, f"{getattr(owner, '__module__', owner.__name__)}.{name}()")
    _replace(builtins, "print", WRITE, "print(file=…)", lambda *_, file=None, **__: is_file(file))
    _watch_warnings()
    if not _hooked:
        _hooked = True
        sys.addaudithook(_on_audit_event)


def _replace(owner: Any, name: str, kind: str, what: str, applies: Callable[..., bool] | None = None) -> None:
    original, inherited = getattr(owner, name), name not in vars(owner)

    @functools.wraps(original)
    def spy(*args: Any, **kwargs: Any) -> Any:
        if getattr(_thread, "inside", False) or (applies is not None and not _safely(applies, args, kwargs)):
            return original(*args, **kwargs)
        if sys._getframe(1).f_code is not at_hand.__code__:  # which reads nothing from a device
            said(kind, what, args[0] if args and isinstance(args[0], Tensor) else None)
        with once():
            return original(*args, **kwargs)

    setattr(owner, name, spy)
    _undo.append((lambda: delattr(owner, name)) if inherited else (lambda: setattr(owner, name, original)))


def _safely(applies: Callable[..., bool], args: Any, kwargs: Any) -> bool:
    with once():  # comparing arguments may itself read a tensor
        try:
            return bool(applies(*[a if isinstance(a, (str, Tensor)) else None for a in args], **kwargs))
        except Exception:
            return False


# -- operations ------------------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Sees the operations of this thread that need a value on the host, and collectives."""

    def __init__(self, reads: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads = reads

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Leave compiled code compiled."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look, and do what was asked for."""
        if not getattr(_thread, "inside", False):
            if func.namespace in _COLLECTIVES:
                if "wait" not in func._schema.name:
                    said(COLLECTIVE, func._schema.name.rpartition("::")[2].strip("_"))
            elif self.reads and (what := _by_value(func, args)):
                said(READ, what, next((a for a in args if isinstance(a, Tensor)), None))
        return func(*args, **(kwargs or {}))


def _by_value(func: Any, args: Any) -> str | None:
    """What of an operation needs a tensor's values on the host; None when nothing does."""
    name = func._schema.name
    if name in _INDEXING:
        masks = [i for i in args[1] if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)]
        return "a boolean index" if masks else None
    return name.rpartition("::")[2] if _BY_VALUE & set(func.tags) else None


# -- CUDA ------------------------------------------------------------------------------------------------------------------


@contextmanager
def cuda_sync_warnings(device: torch.device) -> Iterator[None]:
    """Let torch warn of every operation that waits for the GPU."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _watch_warnings() -> None:
    show = warnings.showwarning

    def spy(message: Any, *args: Any, **kwargs: Any) -> None:
        if str(message).startswith(_SYNC_WARNING):
            said(READ, "an operation that waits for the GPU")
        else:
            show(message, *args, **kwargs)

    warnings.filterwarnings("always", message=_SYNC_WARNING)
    entry = warnings.filters[0]
    warnings.showwarning = spy

    def undo() -> None:
        if warnings.showwarning is spy:
            warnings.showwarning = show
        if entry in warnings.filters:
            warnings.filters.remove(entry)  # type: ignore[attr-defined]

    _undo.append(undo)


# -- files -----------------------------------------------------------------------------------------------------------------


def _on_audit_event(event: str, args: tuple[Any, ...]) -> None:
    if not _listening or getattr(_thread, "inside", False):
        return
    if event == "open":
        path, mode, flags = args
        writes = any(c in mode for c in "wax+") if isinstance(mode, str) else isinstance(flags, int) and flags & _WRITING
        if writes and isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path) != os.devnull:
            said(WRITE, f"open {_base(path)}")
    elif event in _FILE_EVENTS:
        said(WRITE, f"{event.partition('.')[2]} {_base(args[0])}")


def _base(path: Any) -> str:
    return os.path.basename(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else "?"


_WRITERS = ("write", "writelines", "truncate", "writerow", "writerows", "tofile")


@contextmanager
def file_calls() -> Iterator[None]:
    """See calls that write to a file which is open already. Not while another profiler is at work."""
    if sys.getprofile() is not None:
        yield
        return

    def look(frame: Any, event: str, called: Any) -> None:
        if event == "c_call" and getattr(called, "__name__", "") in _WRITERS:
            owner = getattr(called, "__self__", None)
            if is_file(owner) if hasattr(owner, "fileno") else type(owner).__module__ in ("_csv", "numpy"):
                said(WRITE, f"{called.__name__}()")

    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(None)


def is_file(stream: Any) -> bool:
    """Whether a stream is a regular file, and none of the standard streams."""
    standard = [s for s in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__) if s is not None]
    if stream is None or any(stream is s or stream is getattr(s, "buffer", s) for s in standard):
        return False
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError, AttributeError):
        return False
