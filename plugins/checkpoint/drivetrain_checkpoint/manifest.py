"""The manifest: what a checkpoint consists of, and how anyone can tell that it is whole.

It is written last. A directory without a manifest that fits its files is no checkpoint, whatever its name says.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

from drivetrain_checkpoint.errors import CheckpointError
from drivetrain_checkpoint.text import INDEX_FILE, MAX_TREE_BYTES, TREE_FILE, dump_json, load_json

MANIFEST_FILE = "manifest.json"
FORMAT, VERSION = "drivetrain-checkpoint", 1
_MAX_BYTES = 1 << 24
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")  # neither a path, nor hidden, nor ".."
_HASH = re.compile(r"[0-9a-f]{64}")


@frozen
class FileEntry:
    """A file's size in bytes and the SHA-256 of its content."""

    size: int
    sha256: str


@frozen
class Manifest:
    """The step (optimizer updates so far) that a checkpoint holds, and its files by name, the manifest's own left out."""

    step: int
    files: Mapping[str, FileEntry]

    def to_bytes(self) -> bytes:
        """The content of `manifest.json`. It carries its own hash: a flipped bit in the step would be believed otherwise."""
        files = {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in sorted(self.files.items())}
        body = {"format": FORMAT, "version": VERSION, "step": self.step, "files": files}
        return dump_json({**body, "sha256": hashlib.sha256(dump_json(body)).hexdigest()}, indent=1) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read a manifest.

        Raises:
            CheckpointError: when it is not exactly what `to_bytes` writes.
        """
        try:
            table = load_json(data)
            known = table["format"], table["version"]
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise CheckpointError(f"{MANIFEST_FILE} is damaged ({type(error).__name__}: {error})") from error
        if known[0] == FORMAT and type(known[1]) is int and known[1] > VERSION:
            raise CheckpointError(
                f"{MANIFEST_FILE} has the format version {known[1]}, "
                f"this release of drivetrain-checkpoint reads up to {VERSION}; update it"
            )
        try:
            entries = {name: FileEntry(entry["size"], entry["sha256"]) for name, entry in table["files"].items()}
            manifest = cls(table["step"], entries)
            whole = _plausible(manifest) and manifest.to_bytes() == data
        except (ValueError, TypeError, LookupError, AttributeError):
            whole = False
        if not whole:
            raise CheckpointError(f"{MANIFEST_FILE} is damaged (its content does not fit its own sha256)")
        _check_names(manifest)
        return manifest


def _plausible(manifest: Manifest) -> bool:
    numbers = [manifest.step, *(entry.size for entry in manifest.files.values())]
    hashes = [entry.sha256 for entry in manifest.files.values()]
    return all(type(n) is int and n >= 0 for n in numbers) and all(type(h) is str and _HASH.fullmatch(h) for h in hashes)


def _check_names(manifest: Manifest) -> None:
    for name in manifest.files:
        if not _NAME.fullmatch(name) or len(name) > 255 or name == MANIFEST_FILE:
            raise CheckpointError(f"{MANIFEST_FILE} names {name!r:.80}, which cannot be a file of a checkpoint")
    if TREE_FILE not in manifest.files:
        raise CheckpointError(f"{MANIFEST_FILE} does not list {TREE_FILE}")


def read_manifest(directory: Path) -> Manifest:
    """Read a checkpoint's manifest, without looking at the other files.

    Raises:
        CheckpointError: when there is none, or it cannot be read or believed.
    """
    path = directory / MANIFEST_FILE
    try:
        size = _regular_size(path)
        if size > _MAX_BYTES:
            raise CheckpointError(f"{MANIFEST_FILE} has {size} bytes, more than any checkpoint needs")
        return Manifest.from_bytes(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST_FILE} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{MANIFEST_FILE} cannot be read ({error.strerror or error})") from error


def check_files(directory: Path, manifest: Manifest, only_sizes: bool = False) -> list[str]:
    """What is wrong with a checkpoint's files; empty when every size and hash is as the manifest says."""
    found = (check_file(directory / name, entry, only_sizes) for name, entry in manifest.files.items())
    return [problem for problem in found if problem]


def unlisted(directory: Path, manifest: Manifest) -> list[str]:
    """Names in the directory that the manifest does not list: put there by somebody else, and never read."""
    return sorted(set(os.listdir(directory)) - {MANIFEST_FILE, *manifest.files})


def check_file(path: Path, entry: FileEntry, only_size: bool = False) -> str:
    """What is wrong with a file of a checkpoint; an empty text when size and hash are as the manifest says."""
    try:
        size = _regular_size(path)
        if size != entry.size:
            return f"{path.name} has {size} bytes, not {entry.size}"
        if path.name in (TREE_FILE, INDEX_FILE) and size > MAX_TREE_BYTES:
            return f"{path.name} has {size} bytes, more than the {MAX_TREE_BYTES} allowed"
        if only_size:
            return ""
        with open(path, "rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
        return "" if same else f"{path.name} is damaged (its sha256 differs)"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror or error})"


def _regular_size(path: Path) -> int:
    """The size of a file that is a file: a link could lead anywhere, a pipe could block for ever."""
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path.name} is not a regular file")
    return status.st_size
