"""Text files as bytes in windows of fixed length, with a part held out for evaluation."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from drivetrain import Component, ConfigError, ModelError, Problem, component, option
from drivetrain_lm.model import BYTES

if TYPE_CHECKING:
    from drivetrain import CallbackContext

STDLIB = "stdlib"
_OF_ONE_MACHINE = "_sysconfigdata"  # how a file begins that holds settings of its build
# Folders of the standard library that are no library code: tests, what pip put there, generated tables.
_TESTS = ("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo")
_SKIPPED = frozenset((*_TESTS, "encodings", "pydoc_data", "site-packages", "dist-packages"))


class TextDataset(Dataset[dict[str, Tensor]]):
    """Windows of bytes, each with the bytes that follow.

    Sample i holds "input_ids", int64 [context]: the bytes from i x context on, and "labels", the same one byte further.
    Together the windows cover the text without gap or overlap; less than one window may be left over at its end.

    Args:
        text: uint8 [bytes].
        context: bytes in a window.
    """

    def __init__(self, text: Tensor, context: int) -> None:
        self.text, self.context = text, context
        self.fingerprint = _fingerprint(text)  # by which a run that goes on knows its data again
        self._windows = text.unfold(0, context + 1, context)  # [samples, context + 1], a view: consecutive rows share one byte

    def __len__(self) -> int:
        return self._windows.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        window = self._windows[index].long()
        return {"input_ids": window[:-1], "labels": window[1:]}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Several samples, gathered at once; what torch's DataLoader asks for."""
        batch = self.fetch(indices)
        return [{"input_ids": x, "labels": y} for x, y in zip(batch["input_ids"], batch["labels"], strict=True)]

    def fetch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A whole batch at once: "input_ids" and "labels", int64 [len(indices), context]."""
        rows = self._windows[torch.as_tensor(indices, dtype=torch.int64)]
        return {"input_ids": rows[:, :-1].long(), "labels": rows[:, 1:].long()}


def _fingerprint(text: Tensor) -> str:
    """A hash of the text; of a long one of its length and of three parts of 16 MiB, its beginning, middle and end."""
    found, part = hashlib.sha256(str(text.numel()).encode()), 1 << 24
    starts = [0] if text.numel() <= 3 * part else [0, (text.numel() - part) // 2, text.numel() - part]
    for start in starts:
        piece = text[start : start + (part if len(starts) > 1 else text.numel())].contiguous()
        if piece.numel():
            found.update((ctypes.c_char * piece.numel()).from_address(piece.data_ptr()))
    return found.hexdigest()[:16]


@component
class TextComponent(Component):
    """Text files as byte tokens; without further options the source code of Python's standard library.

    Files are taken in the order of their names and joined to one text. Whole files are held out for evaluation, chosen by the
    SHA-256 hash of their names, so the choice is the same everywhere and other files coming or going does not change it; of a
    single file the end is held out.
    """

    kind: ClassVar[str] = "dataset"

    path: str = option(default=STDLIB, help="a file, a folder, a glob such as 'books/**/*.txt', or stdlib")
    pattern: str = option(default="*.txt", help="which files of a folder, at any depth (stdlib: always *.py)")
    context: int = option(default=128, at_least=1, help="bytes in a window; at most the model's context")
    held_out: float = option(default=0.05, at_least=0, below=1, help="share of the files kept for evaluation; 0 for none")
    max_bytes: int | None = option(default=None, at_least=1, help="read at most this much of each part; false for all")

    def make_dataset(self, ctx: CallbackContext) -> TextDataset:
        """The part to train on."""
        return self._windows(ctx, held_out=False)

    def make_eval_dataset(self, ctx: CallbackContext) -> TextDataset | None:
        """The part held out, None when there is none."""
        return self._windows(ctx, held_out=True) if self.held_out else None

    def _windows(self, ctx: CallbackContext, held_out: bool) -> TextDataset:
        root, names = find_files(self.path, self.pattern)
        if len(names) == 1:
            text = _read([root / names[0]], None)
            cut = round(len(text) * (1 - self.held_out))
            text = text[cut:][: self.max_bytes] if held_out else text[:cut][: self.max_bytes]
        else:
            chosen = held_out_names(names, self.held_out)
            text = _read([root / name for name in names if (name in chosen) == held_out], self.max_bytes)
        if len(text) <= self.context:
            raise ConfigError([self._too_little(len(text), held_out, len(names))])
        found = torch.frombuffer(text, dtype=torch.uint8)
        _check_vocabulary(getattr(ctx, "model", None), found)
        return TextDataset(found, self.context)

    def _too_little(self, size: int, held_out: bool, files: int) -> Problem:
        if size == 0 and not held_out:
            what = "the file is" if files == 1 else f"all {files} files are"
            return Problem("path", f"{what} empty at {self.path!r}. Give another path.")
        part, remedy = ("held-out ", ", raise held_out or set it to 0") if held_out else ("", "")
        said = f"the {part}files of path {self.path!r} hold {size} bytes, less than one window of context + 1 = {self.context + 1}."
        return Problem("context", f"{said} Lower it{remedy}.")


def _check_vocabulary(model: Any, text: Tensor) -> None:
    """Refuse a model with fewer tokens than the text has, which would fail in the middle of a step."""
    known = getattr(model, "vocab_size", None)
    if isinstance(known, int) and known < BYTES and (highest := int(text.max())) >= known:
        raise ModelError(
            f"model.vocab_size = {known} is too small for the text, which has the byte {highest}: set it to {BYTES}."
        )


def find_files(path: str, pattern: str) -> tuple[Path, list[str]]:
    """The folder that `path` means and the files to read, relative to it, with forward slashes, sorted.

    Raises:
        ConfigError: when nothing is there, or no file matches, or it is no path.
    """
    try:
        return _find_files(path, pattern)
    except (OSError, RuntimeError, ValueError) as error:  # too long, forbidden, ~nobody; a pattern that is none
        shown = path if len(path) < 200 else f"{path[:200]}…"
        said = str(getattr(error, "strerror", None) or error).rstrip(".")
        raise _wrong_path(f"{shown!r} with the pattern {pattern!r} cannot be read: {said}.") from error


def _find_files(path: str, pattern: str) -> tuple[Path, list[str]]:
    if path == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return root, _library(root)
    root, wanted = _root_and_glob(Path(path).expanduser(), pattern)
    if not root.exists():
        raise _wrong_path(f"nothing is at {path!r}. Give a file, a folder, a glob or {STDLIB!r}.")
    if root.is_file():
        return root.parent, [root.name]
    names = sorted(found.relative_to(root).as_posix() for found in root.glob(wanted) if found.is_file())
    if not names:
        raise _wrong_path(f"no file matches {wanted!r} in {path!r}. Set pattern (for a folder) or another path.")
    return root, names


def _wrong_path(message: str) -> ConfigError:
    return ConfigError([Problem("path", message)])


def _root_and_glob(path: Path, pattern: str) -> tuple[Path, str]:
    """Split a path at its first wildcard; a folder without one takes `pattern`."""
    magic = next((i for i, part in enumerate(path.parts) if any(c in part for c in "*?[")), None)
    if magic is None or path.exists():
        return path, f"**/{pattern}"
    return Path(*path.parts[:magic]), "/".join(path.parts[magic:])


def _library(root: Path) -> list[str]:
    """The standard library's own files; not even looked at is what lies beside them, ten times as many in site-packages."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        sources = [Path(folder, name) for name in files if name.endswith(".py")]
        names += [path for path in sources if path.is_file() and not path.name.startswith(_OF_ONE_MACHINE)]
    return sorted(path.relative_to(root).as_posix() for path in names)


def held_out_names(names: Iterable[str], share: float) -> set[str]:
    """The names whose hash falls into the lowest `share`; at least one, and never all, of several names if share > 0."""
    if share == 0:
        return set()
    places = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 for name in names}
    first, last = min(places, key=lambda name: places[name]), max(places, key=lambda name: places[name])
    return {name for name, place in places.items() if place < share} - {last} | {first}


def _read(files: Sequence[Path], limit: int | None) -> bytearray:
    """The files' bytes in order, the first `limit` of them."""
    text = bytearray()
    for file in files:
        try:
            with file.open("rb") as stream:
                text += stream.read(-1 if limit is None else limit - len(text))
        except OSError as error:
            raise _wrong_path(f"{file} cannot be read: {error.strerror or error}.") from error
        if limit is not None and len(text) >= limit:
            break
    return text
