"""Damage is found, the newest whole checkpoint is taken, and nothing is removed but what must be."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from drivetrain_checkpoint import CheckpointError, Files, Store, find_checkpoints, read_checkpoint, verify, write_checkpoint
from drivetrain_checkpoint.store import load_newest, probe


def tree(step: int) -> dict:
    torch.manual_seed(step)
    return {"progress": {"step": step}, "model": {"w": torch.randn(9, 7)}, "optimizer": {"state": {0: torch.randn(9, 7)}}}


def save(run_dir, step, files):
    return write_checkpoint(run_dir, tree(step), step, files)


def names(run_dir) -> list[str]:
    return sorted(os.listdir(run_dir / "checkpoints"))


# -- damage ------------------------------------------------------------------------------------------------------------------


def damages(directory: Path, other: Path):
    """Every kind of damage to every file, as (description, what to do to the file)."""
    rng = random.Random(0)

    def put(data: bytes):
        return lambda file: file.write_bytes(data)

    for name in sorted(os.listdir(directory)):
        data = (directory / name).read_bytes()
        for size in {0, 1, len(data) // 2, len(data) - 1}:
            yield name, f"cut to {size}", put(data[:size])
        yield name, "longer", put(data + b"\0")
        for start in range(0, len(data), 512):
            page = data[start : start + 512]
            if any(page):
                yield name, f"zeroed from {start}", put(data[:start] + bytes(len(page)) + data[start + 512 :])
        for place in rng.sample(range(len(data) * 8), 50):
            flipped = bytearray(data)
            flipped[place // 8] ^= 1 << place % 8
            yield name, f"bit {place} flipped", put(bytes(flipped))
        yield name, "missing", lambda file: file.unlink()
        yield name, "from the other step", put((other / name).read_bytes())
        yield name, "a directory", lambda file: (file.unlink(), file.mkdir())
        yield name, "a link", lambda file: (file.rename(file.parent.parent / "moved"), file.symlink_to("../moved"))
        yield name, "a pipe", lambda file: (file.unlink(), os.mkfifo(file))


def test_no_damage_is_silent(tmp_path, quick, diff):
    """A file swapped with another step's is damage too, although each of the two is whole by itself."""
    old, new = save(tmp_path, 10, quick), save(tmp_path, 20, quick)
    whole = tmp_path / "whole"
    shutil.copytree(new, whole)
    silent, count = [], 0
    for name, what, damage in damages(whole, old):
        damage(new / name)
        with pytest.raises(CheckpointError, match=str(new)):
            read_checkpoint(new)
        loaded, rejected = load_newest(tmp_path)
        if not verify(new) or loaded is None or loaded.step != 10 or list(rejected) != [new] or diff(tree(10), loaded.tree):
            silent.append(f"{name} {what}")
        shutil.rmtree(new)
        shutil.copytree(whole, new)
        count += 1
    assert silent == [] and count > 230
    assert load_newest(tmp_path)[0].step == 20  # control: undamaged, it is the one taken


def test_every_length_of_a_torn_manifest(tmp_path, quick):
    path = save(tmp_path, 1, quick)
    data = (path / "manifest.json").read_bytes()
    for size in range(len(data)):
        (path / "manifest.json").write_bytes(data[:size])
        assert verify(path), size


def test_an_extra_file_is_said_and_not_read(tmp_path, quick, diff):
    path = save(tmp_path, 1, quick)
    (path / "notes.txt").write_text("best so far")
    with pytest.warns(UserWarning, match=r"ignored what is not part of the checkpoint: notes\.txt"):
        assert diff(tree(1), read_checkpoint(path)) == []


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "a/b", "..", ".", "", ".hidden", "a\0b", "x" * 300, "manifest.json"]
)
def test_a_manifest_names_files_of_its_own_directory_only(tmp_path, quick, name):
    from drivetrain_checkpoint.manifest import Manifest, read_manifest

    path = save(tmp_path, 1, quick)
    files = dict(read_manifest(path).files)
    (path / "manifest.json").write_bytes(Manifest(1, {**files, name: files["state.json"]}).to_bytes())
    assert "which cannot be a file of a checkpoint" in verify(path)[0]


def test_a_manifest_of_a_later_format_says_so(tmp_path, quick, monkeypatch):
    from drivetrain_checkpoint import manifest

    with monkeypatch.context() as later:
        later.setattr(manifest, "VERSION", 2)
        path = save(tmp_path, 1, quick)
    assert "format version 2" in verify(path)[0] and "update it" in verify(path)[0]


def test_sizes_are_believed_from_the_disk_before_reading(tmp_path, quick, monkeypatch):
    from drivetrain_checkpoint import manifest

    path = save(tmp_path, 1, quick)
    monkeypatch.setattr(manifest, "MAX_TREE_BYTES", 10)
    assert "more than the 10 allowed" in verify(path)[0]
    monkeypatch.undo()
    for name, said in (("model.safetensors", f"has {1 << 40} bytes, not"), ("manifest.json", "more than any checkpoint needs")):
        with open(path / name, "r+b") as file:
            file.truncate(1 << 40)  # sparse: reading it would take all memory, or hours
        assert f"{name} has" in verify(path)[0] and said in verify(path)[0]


# -- choice ------------------------------------------------------------------------------------------------------------------


def test_no_checkpoint_is_a_fresh_start_and_none_whole_is_an_error(tmp_path, quick):
    assert load_newest(tmp_path) == (None, {})
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".drivetrain-saving-0123456789abcdef").mkdir()
    assert load_newest(tmp_path) == (None, {})
    first, second = save(tmp_path, 1, quick), save(tmp_path, 2, quick)
    (first / "model.safetensors").unlink()
    (second / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of its checkpoints can be used") as caught:
        load_newest(tmp_path)
    assert f"{first}: model.safetensors is missing" in str(caught.value)
    assert f"{second}: manifest.json is damaged" in str(caught.value)


def test_the_recorded_step_decides_not_names_nor_times(tmp_path, quick):
    """Case 46."""
    paths = [save(tmp_path, step, quick) for step in (100, 200, 300)]
    root = tmp_path / "checkpoints"
    paths[2].rename(root / "swap")
    paths[0].rename(paths[2])
    (root / "swap").rename(paths[0])
    for when, path in enumerate(root.iterdir()):
        os.utime(path, (when, when))
    os.utime(paths[0], (0, 0))
    assert [c.step for c in find_checkpoints(tmp_path)] == [300, 200, 100]
    loaded, _ = load_newest(tmp_path)
    assert loaded.step == 300 and loaded.path == paths[0]
    Store(tmp_path, quick).rotate(1)
    assert names(tmp_path) == ["step-00000100"]


def test_steps_beyond_the_width_of_names(tmp_path, quick):
    for step in (99_999_999, 100_000_000, 2**40):
        save(tmp_path, step, quick)
    assert [c.step for c in find_checkpoints(tmp_path)] == [2**40, 100_000_000, 99_999_999]


def test_power_cut_leaves_two_empty_directories(tmp_path, quick):
    """Case 32: the newest two hold files of size 0."""
    for step in (1, 2, 3):
        path = save(tmp_path, step, quick)
        if step > 1:
            for file in path.iterdir():
                file.write_bytes(b"")
    loaded, rejected = load_newest(tmp_path)
    assert loaded.step == 1 and len(rejected) == 2


# -- rotation ----------------------------------------------------------------------------------------------------------------


def test_rotation_keeps_the_newest(tmp_path, quick):
    store = Store(tmp_path, quick)
    for step in range(1, 6):
        path = store.save(tree(step), step)
        store.rotate(2, keep={path})
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


def test_incomplete_and_damaged_ones_do_not_count_and_stay(tmp_path, quick):
    """Case 37."""
    store = Store(tmp_path, quick)
    for step in (1, 2, 3):
        store.save(tree(step), step)
    (tmp_path / "checkpoints" / "step-00000004").mkdir()
    bad = store.save(tree(5), 5)
    (bad / "model.safetensors").write_bytes(b"")  # its manifest is whole; that it is not was found when it was read
    store.rejected.add(bad)
    store.rotate(2)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004", "step-00000005"]


def test_the_best_is_kept_although_it_is_the_oldest(tmp_path, quick):
    """Case 39."""
    store = Store(tmp_path, quick)
    best = store.save(tree(1), 1)
    for step in (2, 3, 4):
        path = store.save(tree(step), step)
        store.rotate(2, keep={path, best})
    assert names(tmp_path) == ["step-00000001", "step-00000003", "step-00000004"]


def test_the_one_just_saved_survives_older_ones_with_greater_steps(tmp_path, quick):
    """Case 42."""
    store = Store(tmp_path, quick)
    store.save(tree(1000), 1000)
    path = store.save(tree(10), 10)
    store.rotate(1, keep={path})
    assert "step-00000010" in names(tmp_path)


def test_what_is_not_ours_is_not_touched(tmp_path, quick):
    """Case 41 and S7: notes in a checkpoint, links, other names, other runs."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    outside = save(elsewhere, 1, quick)
    run = tmp_path / "run"
    run.mkdir()
    store = Store(run, quick)
    annotated = store.save(tree(2), 2)
    (annotated / "notes.txt").write_text("keep")
    root = run / "checkpoints"
    (root / "step-00000003").symlink_to(outside)
    (root / "my-favourite").mkdir()
    (root / "step-00000004.bak").mkdir()
    (root / "step-00000005").write_text("a file")
    inside = root / ".drivetrain-saving-0123456789abcdef"
    inside.symlink_to(outside)
    (root / ".drivetrain-removing-0123456789abcdef" / "nested").mkdir(parents=True)
    (root / ".drivetrain-saving-mine").mkdir()
    before = names(run)
    store.save(tree(10), 10)
    store.clean()
    store.rotate(1)
    assert names(run) == sorted([*before, "step-00000010"])
    assert verify(outside) == []


def test_leftovers_are_removed_and_their_links_not_followed(tmp_path, quick):
    store = Store(tmp_path, quick)
    kept = store.save(tree(1), 1)
    leftover = tmp_path / "checkpoints" / ".drivetrain-saving-0123456789abcdef"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    (leftover / "link").symlink_to(kept / "manifest.json")
    store.clean()
    assert names(tmp_path) == ["step-00000001"] and verify(kept) == []


def test_the_same_step_again_replaces_nothing(tmp_path, quick):
    paths = [write_checkpoint(tmp_path, {"time": time}, 5, quick) for time in range(12)]
    assert [verify(path) for path in paths] == [[]] * 12 and paths[11].name == "step-00000005-11"
    assert load_newest(tmp_path)[0].tree == {"time": 11}
    save(tmp_path, 4, quick)
    Store(tmp_path, quick).rotate(2)
    assert names(tmp_path) == ["step-00000004", "step-00000005-11"]


# -- a disk that refuses -----------------------------------------------------------------------------------------------------


class Refusing(Files):
    """Raises at the n-th operation, and at all later ones if the disk stays as it is."""

    def __init__(self, at: int, number: int, forever: bool) -> None:
        self.at, self.number, self.forever, self.count = at, number, forever, 0

    def _step(self) -> None:
        self.count += 1
        if self.count == self.at or (self.forever and self.count > self.at):
            raise OSError(self.number, os.strerror(self.number))

    def mkdir(self, path):
        self._step()
        super().mkdir(path)

    def write(self, path, chunks):
        self._step()

        def torn():
            for chunk in chunks:
                yield bytes(chunk)[: max(1, len(chunk) // 2)]
                self._step()
                yield bytes(chunk)[max(1, len(chunk) // 2) :]

        super().write(path, torn())

    def fsync(self, path):
        self._step()

    def fsync_dir(self, path):
        self._step()

    def rename(self, source, target):
        self._step()
        super().rename(source, target)

    def remove(self, path):
        if self.number != errno.ENOSPC:  # a full disk lets one remove
            self._step()
        super().remove(path)

    def rmdir(self, path):
        if self.number != errno.ENOSPC:
            self._step()
        super().rmdir(path)


@pytest.mark.parametrize(("number", "forever"), [(errno.ENOSPC, True), (errno.EIO, False), (errno.EROFS, True)])
def test_an_error_at_any_operation_leaves_the_old_ones_whole(tmp_path, quick, diff, number, forever):
    """Cases 31 and 38, with keep_last = 1: the old one goes only when the new one is durable."""
    for at in range(1, 100):
        run = tmp_path / str(at)
        run.mkdir()
        save(run, 1, quick)
        files = Refusing(at, number, forever)
        store = Store(run, files)
        try:
            path = store.save(tree(2), 2)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that an old one could not be removed
                store.rotate(1, keep={path})
        except CheckpointError as error:
            assert str(run / "checkpoints") in str(error) and os.strerror(number) in str(error)
        loaded, rejected = load_newest(run)
        assert loaded is not None and not rejected and diff(tree(loaded.step), loaded.tree) == []
        if number == errno.ENOSPC:
            assert not [name for name in names(run) if "saving" in name]
        Store(run, quick).clean()
        assert not [name for name in names(run) if name.startswith(".")]
        if files.count < at:  # the fault has been at every operation
            break
    assert at > 20 and names(run) == ["step-00000002"]


def test_a_failed_rotation_is_a_warning(tmp_path, quick):
    for step in (1, 2):
        save(tmp_path, step, quick)
    with pytest.warns(UserWarning, match="an old checkpoint could not be removed"):
        Store(tmp_path, Refusing(1, errno.EACCES, True)).rotate(1)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_an_interrupted_save_cleans_up_and_lets_the_interrupt_through(tmp_path, quick):
    class Interrupted(type(quick)):
        def write(self, path, chunks):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1, Interrupted())
    assert names(tmp_path) == []


def test_the_probe_leaves_nothing_and_finds_what_cannot_be_written(tmp_path, quick):
    probe(tmp_path / "runs" / "new", quick)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="checkpoints cannot be written here"):
        probe(tmp_path / "file", quick)
    for at in range(1, 7):
        with pytest.raises(CheckpointError, match=f"{tmp_path}.*Read-only") if at < 6 else nullcontext():
            probe(tmp_path, Refusing(at, errno.EROFS, False))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("step", [-1, 1.0, True, "7"])
def test_a_step_is_a_whole_number(tmp_path, quick, step):
    with pytest.raises(CheckpointError, match="whole number"):
        write_checkpoint(tmp_path, {}, step, quick)


def test_modes_follow_the_umask(tmp_path, quick):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            path = save(tmp_path, mask, quick)
        finally:
            os.umask(before)
        assert {p.stat().st_mode & 0o777 for p in path.iterdir()} == {mode}


def test_the_manifest_can_be_checked_by_hand(tmp_path, quick):
    """What the README says: sizes and hashes by the tools of any system."""
    import hashlib

    path = save(tmp_path, 3, quick)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 3 and manifest["version"] == 1
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
