"""What somebody else may have put into a checkpoint's files, and who may read what we write there."""

from __future__ import annotations

import hashlib
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from drivetrain_checkpoint import CheckpointError, find_checkpoints, read_checkpoint, write_checkpoint
from drivetrain_checkpoint.manifest import MANIFEST_FILE, FileEntry, Manifest, read_manifest

SLOTS = ["manifest.json", "model.safetensors", "state.json", "state.safetensors"]


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __reduce__(self) -> Any:
        return os.mkdir, (self.where,)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "run", {"model": {"w": torch.ones(3)}, "optimizer": {"m": torch.ones(2)}}, 1)


def replace(checkpoint: Path, name: str, data: bytes) -> None:
    """Put a file in another's place, with a manifest that fits: whoever attacks can compute hashes too."""
    (checkpoint / name).write_bytes(data)
    if name != MANIFEST_FILE:
        manifest = read_manifest(checkpoint)
        entries = dict(manifest.files) | {name: FileEntry(len(data), hashlib.sha256(data).hexdigest())}
        (checkpoint / MANIFEST_FILE).write_bytes(Manifest(manifest.step, entries).to_bytes())


@pytest.mark.parametrize("form", ["pickle", "torch"])
@pytest.mark.parametrize("name", SLOTS)
def test_a_crafted_pickle_in_any_slot_never_runs(tmp_path: Path, checkpoint: Path, name: str, form: str) -> None:
    """S1."""
    ran, bomb = tmp_path / "ran", tmp_path / "bomb"
    if form == "pickle":
        data = pickle.dumps(Bomb(str(ran)))
    else:
        torch.save(Bomb(str(ran)), bomb)
        data = bomb.read_bytes()
    replace(checkpoint, name, data)
    with pytest.raises(CheckpointError):
        read_checkpoint(checkpoint)
    find_checkpoints(tmp_path / "run")
    assert not ran.exists()
    pickle.loads(pickle.dumps(Bomb(str(ran))))
    assert ran.exists()  # the bomb is one


def test_the_slots_above_are_all_there_are(checkpoint: Path) -> None:
    assert sorted(path.name for path in checkpoint.iterdir()) == SLOTS


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_get_the_modes_that_the_umask_leaves(tmp_path: Path, mask: int) -> None:
    """S13: nothing is more open than what the person's other programs write, and nothing is open to all for writing."""
    before = os.umask(mask)
    try:
        path = write_checkpoint(tmp_path / "run", {"w": torch.ones(3)}, 1)
    finally:
        os.umask(before)
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in [tmp_path / "run", path, *path.iterdir()]}
    assert all(mode == (0o777 if p.is_dir() else 0o666) & ~mask for p, mode in modes.items()), modes
