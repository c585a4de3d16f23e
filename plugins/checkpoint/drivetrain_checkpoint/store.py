"""The checkpoints of one run directory: written as transactions, chosen by what is in them, removed when told.

One save, in this order: a directory with a name of ours beside the target → the files, each made durable → the manifest, made
durable → the directory made durable → renamed to its final name → the parent made durable. Killed anywhere, or losing whatever
was not durable yet, it leaves either the whole checkpoint or none, and all older ones. Only after that are old ones removed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from attrs import define, field

from drivetrain_checkpoint.errors import CheckpointError, CheckpointFailure
from drivetrain_checkpoint.files import Files
from drivetrain_checkpoint.find import DIRECTORY, find_checkpoints
from drivetrain_checkpoint.format import Layout, Outline, Packed, Tree, outline, pack
from drivetrain_checkpoint.manifest import MANIFEST_FILE, FileEntry, Manifest, check_file, check_files, read_manifest, unlisted

# Failures that may be gone a moment later, as on network file systems; a full or read-only disk is not among them.
_TRANSIENT = {errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}  # another directory was to be named
_FIRST_PAUSE = 0.2  # seconds before the first retry; each further one waits four times as long
T = TypeVar("T")
_TEMPORARY = re.compile(r"\.drivetrain-(saving|removing|probing)-[0-9a-f]{16}")


@define
class Loaded:
    """A checkpoint that can be read.

    Attributes:
        verified: whether the content of every file has been found as the manifest says; if not, a file's is before it is read.
    """

    path: Path
    manifest: Manifest
    verified: bool
    _outline: Outline
    _tree: Tree = None

    @property
    def step(self) -> int:
        """Optimizer updates so far."""
        return self.manifest.step

    @property
    def tree(self) -> Tree:
        """The whole state, in host memory; read when first asked for."""
        if self._tree is None:
            self._tree = self.read()
        return self._tree

    def read(self, layout: Layout | None = None) -> Tree:
        """The state as one process of `layout` has it: of divided tensors its own parts, nothing else of them is read.

        Raises:
            CheckpointError: when a file has been damaged meanwhile, or is not what the others say of it.
        """
        checked: set[str] = set()

        def check(name: str) -> None:
            if name in checked:
                return
            checked.add(name)
            if problem := check_file(self.path / name, self.manifest.files[name]):
                raise CheckpointError(problem)

        with _naming(self.path):
            return self._outline.read(layout, None if self.verified else check)


def read_checkpoint(path: str | os.PathLike[str]) -> Tree:
    """Read one checkpoint's tree after checking every file's size and hash. Tensors are on the CPU.

    Raises:
        CheckpointError: with everything that is wrong with it.
    """
    return load_checkpoint(Path(path)).tree


def write_checkpoint(run_dir: str | os.PathLike[str], tree: Tree, step: int, files: Files | None = None) -> Path:
    """Write a state tree as a checkpoint of a run; return its directory, which is durable by then.

    Raises:
        CheckpointError: when the tree holds what a checkpoint cannot, or the disk refuses; nothing is left behind then.
    """
    return Store(Path(run_dir), files or Files()).save(tree, step)


def load_newest(run_dir: Path) -> tuple[Loaded | None, dict[Path, str]]:
    """The newest checkpoint that is whole, None when there is no checkpoint, and why newer ones were rejected.

    Raises:
        CheckpointError: when there are checkpoints and none is whole. A fresh start would be the silent loss of a run.
    """
    candidates = find_checkpoints(run_dir)
    rejected = {c.path: c.problem for c in candidates if c.problem}
    newest: Loaded | None = None
    for candidate in candidates:
        if candidate.path in rejected or (newest is not None and candidate.is_named_by_its_step):
            continue
        try:  # one whose name says another step may be a newer one with a wrong manifest: at least it is reported
            loaded = load_checkpoint(candidate.path)
            newest = newest or loaded
        except CheckpointError as error:
            rejected[candidate.path] = str(error).removeprefix(f"{candidate.path}: ")
    if rejected and newest is None:
        listed = "".join(f"\n  {path}: {why}" for path, why in rejected.items())
        raise CheckpointFailure(
            f"{run_dir / DIRECTORY}: none of its checkpoints can be used:{listed}\n"
            "To start afresh, give another run_name or remove them."
        )
    return newest, rejected


def probe(directory: Path, files: Files) -> None:
    """Find out now, not at the first save, whether checkpoints can be written below `directory`; nothing is left behind.

    Raises:
        CheckpointError: when they cannot.
    """
    place = next(path for path in (directory / DIRECTORY, directory, *directory.absolute().parents) if path.exists())
    temporary = place / f".drivetrain-probing-{secrets.token_hex(8)}"
    try:
        files.mkdir(temporary)
        files.write(temporary / MANIFEST_FILE, (b"probe",))
        files.remove(temporary / MANIFEST_FILE)
        files.rmdir(temporary)
    except OSError as error:
        for remove, path in ((files.remove, temporary / MANIFEST_FILE), (files.rmdir, temporary)):
            with suppress(OSError):
                remove(path)
        kind = CheckpointError if error.errno in _NOT_ALLOWED else CheckpointFailure
        raise kind(
            f"{directory}: checkpoints cannot be written here: {error.strerror or error}. "
            "Give another output_dir, or leave the checkpoint callback out."
        ) from error


def load_checkpoint(path: Path, verified: bool = True) -> Loaded:
    """Open a checkpoint.

    Args:
        verified: look now at the content of every file; otherwise at those files that something is read from.

    Raises:
        CheckpointError: with everything that is wrong with it.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such checkpoint directory")
    with _naming(path):
        manifest = read_manifest(path)
        if problems := check_files(path, manifest, only_sizes=not verified):
            raise CheckpointError("; ".join(problems))
        loaded = Loaded(path, manifest, verified, outline(path, manifest.files))
    if strangers := unlisted(path, manifest):
        warnings.warn(f"{path}: ignored what is not part of the checkpoint: {', '.join(strangers)}", stacklevel=2)
    return loaded


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which checkpoint an error is of."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


@define
class Store:
    """Writes and removes the checkpoints of one run. Those in `rejected` are known to be damaged: not counted, not touched."""

    run_dir: Path
    files: Files = field(factory=Files)
    rejected: set[Path] = field(factory=set)
    retries: int = 0  # after errors that may be gone a moment later
    _leftovers: set[Path] = field(factory=set, init=False)  # of failed saves, not removable at that moment

    @property
    def root(self) -> Path:
        """Where the checkpoints are."""
        return self.run_dir / DIRECTORY

    def save(self, tree: Tree, step: int) -> Path:
        """Write one checkpoint as a transaction and return its directory.

        Raises:
            CheckpointError: when the tree cannot be stored, or the disk refuses. What was written so far is removed.
        """
        return self.save_packed(pack(tree), step)

    def save_packed(self, packed: Packed, step: int) -> Path:
        """Write a tree that has been packed; after a transient error, again from the start."""
        if type(step) is not int or step < 0:
            raise CheckpointError(f"a checkpoint's step is a whole number of at least 0, got {step!r}")
        return self._retried(step, lambda: self._transaction(packed, step))

    def _transaction(self, packed: Packed, step: int) -> Path:
        temporary = self._make_temporary()
        try:
            final, stages = self._committing(temporary, step, self._write(temporary, packed))
            for stage in stages:
                stage()
        except BaseException:
            self.give_up(temporary)
            raise
        return final

    # -- a save by several processes ---------------------------------------------------------------------------------------

    def begin(self, step: int) -> Path:
        """Make the directory into which all processes write their parts; the first process does."""
        return self._retried(step, self._make_temporary)

    def write_part(self, directory: Path, packed: Packed, step: int) -> dict[str, FileEntry]:
        """Write one process's files, durably; each again after a transient error."""
        entries: dict[str, FileEntry] = {}
        for name, _ in packed.files():
            entries[name] = self._retried(step, partial(self._write_again, directory / name, packed))
        return entries

    def _write_again(self, path: Path, packed: Packed) -> FileEntry:
        return self._write_anew(path, next(chunks for name, chunks in packed.files() if name == path.name))

    def _write_anew(self, path: Path, chunks: Iterable[bytes | memoryview]) -> FileEntry:
        if path.exists():  # half of it, from the attempt before
            self.files.remove(path)
        return self._write_durably(path, chunks)

    def write_note(self, path: Path, text: bytes, step: int) -> None:
        """Write a small file that appears whole or not at all. It is not durable."""
        half = path.with_suffix(".half")

        def write() -> None:
            if half.exists():
                self.files.remove(half)
            self.files.write(half, (text,))
            self.files.rename(half, path)

        self._retried(step, write)

    def commit(self, directory: Path, step: int, entries: Mapping[str, FileEntry]) -> Path:
        """Make of what all have written a checkpoint; the first process does, when all are done."""
        try:
            final, stages = self._committing(directory, step, entries)
            for stage in stages:
                self._retried(step, stage)
        except BaseException:
            self.give_up(directory)
            raise
        return final

    def give_up(self, directory: Path) -> None:
        """Remove what has been written of a save, now or at the next one."""
        if not self._is_removed(directory):
            self._leftovers.add(directory)

    def _retried(self, step: int, action: Callable[[], T]) -> T:
        """Do `action`; after a transient error again from the start."""
        for attempt in range(self.retries + 1):
            self._leftovers = {path for path in self._leftovers if not self._is_removed(path)}
            try:
                return action()
            except OSError as error:
                if attempt == self.retries or error.errno not in _TRANSIENT:
                    tried = f" ({attempt + 1} attempts)" if attempt else ""
                    raise CheckpointFailure(
                        f"{self.root}: the checkpoint of step {step} could not be written: {error.strerror or error}{tried}. "
                        "Older checkpoints are as they were; make room or mend the file system."
                    ) from error
            time.sleep(_FIRST_PAUSE * 4**attempt)
        raise AssertionError("unreachable")

    def rotate(self, keep_last: int, keep: Collection[Path] = ()) -> None:
        """Remove all but the `keep_last` newest checkpoints and those in `keep`. A failure is a warning: nothing is lost by it.

        Of several checkpoints of one step only the last one counts. Left alone are damaged ones, links, and directories that
        hold anything which the manifest does not list.
        """
        if complaint := self.rotate_quietly(keep_last, keep):
            warnings.warn(complaint, stacklevel=2)

    def rotate_quietly(self, keep_last: int, keep: Collection[Path] = ()) -> str:
        """The same, for a thread whose warnings nobody would place: what went wrong, or an empty text."""
        try:
            known = [c for c in find_checkpoints(self.run_dir) if not c.problem and c.path not in self.rejected]
            newest = list({c.step: c.path for c in reversed(known)}.values())[-max(keep_last, 1) :]
            surplus = [c.path for c in known if c.path not in newest and c.path not in keep]
            self._remove([path for path in surplus if _only_ours(path)])
        except (OSError, CheckpointError) as error:
            return f"{self.root}: an old checkpoint could not be removed: {error}"
        return ""

    def clean(self) -> None:
        """Remove what an earlier process left unfinished: directories with a temporary name of ours and nothing else."""
        for folder in (self.run_dir, self.root):  # a probe is made where there are no checkpoints yet
            try:
                leftovers = [e for e in os.scandir(folder) if _TEMPORARY.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
            except OSError:
                continue
            for entry in leftovers:
                try:
                    self._remove_flat(folder / entry.name)
                except OSError as error:
                    warnings.warn(f"{folder / entry.name}: a leftover could not be removed: {error}", stacklevel=2)

    # -- steps of a transaction ------------------------------------------------------------------------------------------

    def _make_temporary(self) -> Path:
        temporary = self._temporary("saving")
        try:
            self._make_root()
            self.files.mkdir(temporary)
        except BaseException:
            self.give_up(temporary)
            raise
        return temporary

    def _write(self, directory: Path, packed: Packed) -> dict[str, FileEntry]:
        return {name: self._write_durably(directory / name, chunks) for name, chunks in packed.files()}

    def _committing(
        self, directory: Path, step: int, entries: Mapping[str, FileEntry]
    ) -> tuple[Path, list[Callable[[], object]]]:
        """The name that the checkpoint gets, and what remains to be done for it, one after another."""
        final, manifest = self._free_name(step), Manifest(step, entries).to_bytes()
        return final, [
            lambda: self._write_anew(directory / MANIFEST_FILE, (manifest,)),
            lambda: self.files.fsync_dir(directory),
            lambda: self.files.rename(directory, final),
            lambda: self.files.fsync_dir(self.root),
        ]

    def _write_durably(self, path: Path, chunks: Iterable[bytes | memoryview]) -> FileEntry:
        digest, size = hashlib.sha256(), 0

        def hashed() -> Iterator[bytes | memoryview]:
            nonlocal size
            for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                yield chunk

        self.files.write(path, hashed())
        self.files.fsync(path)
        return FileEntry(size, digest.hexdigest())

    def _make_root(self) -> None:
        """Make the directory, and make its name durable, and the run's own, which may be as new."""
        missing = [path for path in (self.run_dir, self.root) if not path.exists()]
        for path in missing:
            self.files.mkdir(path)
        if missing:
            self.files.fsync_dir(self.run_dir)
            self.files.fsync_dir(self.run_dir.parent)

    def _free_name(self, step: int) -> Path:
        """A name that nothing has. None of the same step is replaced: between two renames there would be none at all."""
        name = self.root / f"step-{step:08d}"
        number = 1
        while os.path.lexists(name):
            name = self.root / f"step-{step:08d}-{number}"
            number += 1
        return name

    def _temporary(self, purpose: str) -> Path:
        return self.root / f".drivetrain-{purpose}-{secrets.token_hex(8)}"

    def _remove(self, paths: Iterable[Path]) -> None:
        """Take the names away at once and durably, then the contents: a half-removed checkpoint is never seen as one."""
        doomed = []
        for path in paths:
            doomed.append(self._temporary("removing"))
            self.files.rename(path, doomed[-1])
        if doomed:
            self.files.fsync_dir(self.root)
        for directory in doomed:
            self._remove_flat(directory)

    def _is_removed(self, directory: Path) -> bool:
        """Try to remove a directory that failed."""
        try:
            self._remove_flat(directory)
        except OSError as error:
            return isinstance(error, FileNotFoundError)
        return True

    def _remove_flat(self, directory: Path) -> None:
        """Remove a directory of files. One that holds a directory is not ours and stays."""
        entries = list(os.scandir(directory))
        if any(entry.is_dir(follow_symlinks=False) for entry in entries):
            return
        for entry in entries:
            self.files.remove(directory / entry.name)
        self.files.rmdir(directory)


def _only_ours(path: Path) -> bool:
    """Whether rotation may remove a checkpoint: a real directory that holds what its manifest lists and nothing else."""
    if path.is_symlink():
        return False
    manifest = read_manifest(path)
    return not unlisted(path, manifest)
