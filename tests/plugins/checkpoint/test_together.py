"""Divided states: saved by several ranks, each its own parts, read by any other number of ranks, exact bit by bit."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import shutil
import threading
import warnings

import pytest
import torch
from safetensors.torch import load_file
from tests.plugins.checkpoint import cutting
from torch.distributed.checkpoint.api import CheckpointException

from drivetrain_checkpoint import CheckpointError, Files, Store, find_checkpoints, read_checkpoint, verify
from drivetrain_checkpoint.command import CheckpointCommand
from drivetrain_checkpoint.manifest import FileEntry, Manifest, read_manifest
from drivetrain_checkpoint.parts import NAME_AS_BYTES, NATIVE, Contents
from drivetrain_checkpoint.resharding import SafetensorsReader, SafetensorsWriter
from drivetrain_checkpoint.store import load_checkpoint, load_newest
from drivetrain_checkpoint.together import Together

RULES = list(cutting.RULES)


def state(step=1):
    """Uneven sizes, an empty and a tiny tensor, a tied weight, numbers, and state that is not divided."""
    generator = torch.Generator().manual_seed(step)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    tied = draw(10, 6)
    weights = {
        "a.weight": draw(7, 5),
        "b.weight": tied,
        "b.bias": draw(3),
        "c.tied": tied,
        "empty": draw(0, 4),
        "deep": draw(5, 4, 3),
    }
    moments = {i: {"step": torch.tensor(float(step)), "exp_avg": draw(*w.shape)} for i, w in enumerate(weights.values())}
    return {
        "step": step,
        "model": weights,
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1, 2]}]},
        "rng": [{"torch": torch.arange(9, dtype=torch.uint8)}],
    }


def saved(run_dir, tree, step=1, ranks=2, rule="rows", files=None):
    return cutting.save(run_dir, tree, step, ranks, cutting.RULES[rule], files)[0].result()


def pieces_as_read(path, rule, ranks):
    """What every rank reads: (path in the tree, offsets) and the piece."""
    found = []
    for rank in range(ranks):
        layout = cutting.Cut(cutting.RULES[rule], rank, ranks)
        load_checkpoint(path, verified=False).read(layout)
        found += [(where, offsets, piece) for where, pieces in layout.read.items() for offsets, piece in pieces.items()]
    return found


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_divided_state_is_whole_again_bit_by_bit(tmp_path, diff, quick, rule, ranks):
    path = saved(tmp_path, state(), ranks=ranks, rule=rule, files=dict.fromkeys(range(ranks), quick))
    assert verify(path) == []
    tree = read_checkpoint(path)
    assert diff(state(), tree) == []
    assert tree["model"]["b.weight"] is tree["model"]["c.tied"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("writers", [1, 2, 4])
def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path, diff, quick, rule, writers):
    path, tree = saved(tmp_path, state(), ranks=writers, rule=rule, files=dict.fromkeys(range(writers), quick)), state()
    for other in RULES:
        for readers in (1, 2, 3):
            volume = 0
            for where, offsets, piece in pieces_as_read(path, other, readers):
                ends = zip(offsets, piece.shape, strict=True)
                expected = at(tree, where)[tuple(slice(start, start + length) for start, length in ends)]
                assert torch.equal(expected, piece), (where, offsets)
                volume += piece.numel()
            copies = readers if other == "alike" else 1
            wanted = [at(tree, ("model", n)) for n in tree["model"]] + [
                m["exp_avg"] for m in tree["optimizer"]["state"].values()
            ]
            assert volume == copies * sum(t.numel() for t in wanted) + readers * len(tree["optimizer"]["state"])


def test_control_pieces_of_another_place_would_be_found(tmp_path, quick):
    """The comparison above sees a part that was read from one row further."""
    path = saved(tmp_path, {"model": {"w": state()["model"]["deep"]}}, files=dict.fromkeys(range(2), quick))
    shifted = lambda tensor, rank, ranks: {(1, 0, 0): tensor[:4]}  # noqa: E731
    layout = cutting.Cut(shifted, 0, 1)
    load_checkpoint(path).read(layout)
    assert not torch.equal(layout.read["model", "w"][1, 0, 0], state()["model"]["deep"][:4])


def test_every_type_of_tensor_is_divided_exactly(tmp_path, quick):
    generator = torch.Generator().manual_seed(3)
    tree = {"model": {}}
    for dtype in [*NATIVE, *NAME_AS_BYTES]:
        raw = torch.randint(
            0, 2 if dtype == torch.bool else 256, (6, 4 * dtype.itemsize), generator=generator, dtype=torch.uint8
        )
        tree["model"][str(dtype)] = raw.view(dtype)
    path = saved(tmp_path, tree, ranks=2, rule="grid", files=dict.fromkeys(range(2), quick))
    for where, offsets, piece in pieces_as_read(path, "striped", 2):
        expected = at(tree, where)[offsets[0] : offsets[0] + len(piece)]
        assert torch.equal(expected.contiguous().view(torch.uint8), piece.contiguous().view(torch.uint8)), where


def test_a_whole_checkpoint_is_read_by_parts(tmp_path, quick):
    tree = state()
    path = Store(tmp_path, quick).save(tree, 1)
    for where, offsets, piece in pieces_as_read(path, "grid", 4):
        region = tuple(slice(start, start + length) for start, length in zip(offsets, piece.shape, strict=True))
        assert torch.equal(at(tree, where)[region], piece)


def test_each_rank_writes_its_parts_and_nothing_is_written_twice(tmp_path, quick):
    tree = {"model": {f"w{i}": torch.randn(64, 32) for i in range(4)} | {"same": torch.randn(8)}, "note": torch.randn(3)}
    path = saved(tmp_path, tree, ranks=4, files=dict.fromkeys(range(4), quick))
    by_file = {p.name: sum(t.nbytes for t in load_file(p).values()) for p in path.glob("*.safetensors")}
    parts = [by_file[f"model-{rank:05d}.safetensors"] for rank in range(4)]
    assert sum(parts) == sum(t.nbytes for t in tree["model"].values())
    assert max(parts) <= sum(parts) / 4 + tree["model"]["same"].nbytes
    assert by_file["state.safetensors"] == tree["note"].nbytes
    again = saved(tmp_path, tree, step=2, ranks=4, rule="alike", files=dict.fromkeys(range(4), quick))
    shares = [sum(t.nbytes for t in load_file(p).values()) for p in again.glob("model-*.safetensors")]
    assert sum(shares) == sum(parts) and len(shares) == 4  # what all have alike is written once, by each about a quarter


def test_files_are_readable_by_hand(tmp_path, quick):
    """The index is JSON that says where to find a tensor; a program of three lines puts it together."""
    tree = state()
    path = saved(tmp_path, tree, ranks=2, rule="grid", files=dict.fromkeys(range(2), quick))
    index = json.loads((path / "index.json").read_text())
    entry = index["tensors"]["model/a.weight"]
    whole = torch.full(entry["shape"], float("nan"))
    for file, (row, column), (height, width), name in entry["chunks"]:
        whole[row : row + height, column : column + width] = load_file(path / index["files"][file])[name]
    assert torch.equal(whole, tree["model"]["a.weight"])


def test_torchs_own_load_works_with_the_reader(tmp_path, quick):
    from torch.distributed.checkpoint import load

    path = saved(tmp_path, state(), ranks=3, rule="striped", files=dict.fromkeys(range(3), quick))
    contents = Contents.of(path, read_manifest(path).files)
    name = "index.json/model/a.weight"
    mine = {name: torch.zeros(7, 5)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        load(mine, storage_reader=SafetensorsReader(contents), no_dist=True)
    assert torch.equal(mine[name], state()["model"]["a.weight"])


def test_torchs_own_save_works_with_the_writer(tmp_path, diff, quick):
    from torch.distributed.checkpoint import save

    tree = {
        "model/a.weight": torch.randn(3, 4),
        "state/moment": torch.randn(5),
        "model/tiny": torch.tensor(2, dtype=torch.int8),
    }
    writer = SafetensorsWriter(Store(tmp_path, quick), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        save(dict(tree), storage_writer=writer, no_dist=True)
        with pytest.raises(CheckpointException, match="only tensors"):
            save({"model/a": 3}, storage_writer=SafetensorsWriter(Store(tmp_path, quick), 5), no_dist=True)
    assert [found.path for found in find_checkpoints(tmp_path)] == [writer.path] and verify(writer.path) == []
    assert diff(tree, read_checkpoint(writer.path)) == []


# -- failures ----------------------------------------------------------------------------------------------------------------


class Failing(Files):
    """A disk that fails when a file of that name is written, so many times."""

    def __init__(self, name, number=errno.ENOSPC, times=99):
        self.name, self.number, self.times = name, number, times

    def fsync(self, path):
        pass

    fsync_dir = fsync

    def write(self, path, chunks):
        if self.name in path.name and self.times:
            self.times -= 1
            super().write(path, [next(iter(chunks))[:10]])  # half of it is there
            raise OSError(self.number, os.strerror(self.number))
        super().write(path, chunks)


@pytest.mark.parametrize(
    ("rank", "name"),
    [(1, "model-00001"), (1, "state-00001"), (1, "written-00001"), (0, "model-00000"), (0, "index"), (0, "manifest")],
)
def test_one_rank_that_cannot_write_is_an_error_on_rank_0_and_leaves_nothing(tmp_path, diff, quick, rank, name):
    older = saved(tmp_path, state(), files=dict.fromkeys(range(2), quick))
    found = cutting.save(tmp_path, state(2), 2, 2, cutting.rows, {0: quick, 1: quick} | {rank: Failing(name)})
    said = str(found[0].exception())
    assert "the checkpoint of step 2 could not be written: No space left on device" in said
    assert said.startswith("on rank 1: ") is (rank == 1)
    assert isinstance(found[0].exception().__cause__, OSError)
    assert [p.name for p in older.parent.iterdir()] == [older.name]
    assert diff(state(), load_newest(tmp_path)[0].tree) == []


def test_what_another_rank_writes_after_rank_0_has_failed_is_removed_too(tmp_path, quick):
    """Rank 1 is slower: it adds to the directory that rank 0 has given up."""
    failed = threading.Event()

    class First(Failing):
        def rmdir(self, path):
            failed.set()
            if not (path / "model-00001.safetensors").exists():  # as if it came in between
                assert arrived.wait(30)
            super().rmdir(path)

    class Slow(type(quick)):
        def write(self, path, chunks):
            assert failed.wait(30)
            super().write(path, chunks)
            arrived.set()

    arrived = threading.Event()
    found = cutting.save(tmp_path, state(), 1, 2, cutting.rows, {0: First("model-00000"), 1: Slow()})
    assert "No space left" in str(found[0].exception())
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_transient_error_of_one_rank_is_tried_again(tmp_path, diff, quick, monkeypatch):
    monkeypatch.setattr("drivetrain_checkpoint.store._FIRST_PAUSE", 0.001)
    files = {0: Failing("manifest", errno.EIO, 1), 1: Failing("model", errno.ESTALE, 1)}
    stores = [Store(tmp_path, files[rank], retries=2) for rank in range(2)]
    monkeypatch.setattr(cutting, "Store", lambda run_dir, given: stores[0] if given is files[0] else stores[1])
    path = saved(tmp_path, state(), files=files)
    assert diff(state(), read_checkpoint(path)) == [] and files[0].times == files[1].times == 0


def test_a_rank_that_is_gone_is_not_waited_for_when_the_run_has_failed(tmp_path, quick, monkeypatch):
    monkeypatch.setattr("drivetrain_checkpoint.together.GRACE", 0.05)
    store = Store(tmp_path, quick)
    one = Together(store, store.begin(7), 7, 0, 2)
    one.hurry()
    with pytest.raises(CheckpointError, match="given up: rank 1 has not written its part"):
        one.write(cutting.pack_own({"a": 1}, None)[0])
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_parts_that_do_not_make_up_the_whole_are_refused(tmp_path, quick):
    """A rank that does not have what it should: said before anything is written."""
    gap = lambda tensor, rank, ranks: {} if rank else cutting.rows(tensor, rank, ranks)  # noqa: E731
    found = cutting.save(tmp_path, {"model": {"w": torch.ones(4, 2)}}, 1, 2, gap)
    for one in found:
        assert "parts of the state do not fit together" in str(one.exception())


# -- damage ------------------------------------------------------------------------------------------------------------------


def damages(path):
    data = path.read_bytes()
    yield "missing", None
    yield "cut", data[:-1]
    yield "empty", b""
    yield "zeros", bytes(len(data))
    for place in (0, len(data) // 2, len(data) - 1):
        yield f"bit {place}", data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_every_damage_is_found_and_walked_back_from(tmp_path, diff, quick):
    files = dict.fromkeys(range(3), quick)
    older, newest = (saved(tmp_path, state(step), step, 3, files=files) for step in (1, 2))
    count = 0
    for one in sorted(newest.iterdir()):
        data = one.read_bytes()
        for what, damaged in damages(one):
            one.unlink()
            if damaged is not None:
                one.write_bytes(damaged)
            assert verify(newest), (one.name, what)
            loaded, rejected = load_newest(tmp_path)
            assert loaded.path == older and list(rejected) == [newest], (one.name, what)
            assert diff(state(1), loaded.tree) == []
            one.unlink(missing_ok=True)
            one.write_bytes(data)
            count += 1
    assert count == 7 * 10
    assert load_newest(tmp_path)[0].path == newest


def test_a_rank_of_which_nothing_is_there_is_found(tmp_path, quick):
    files = dict.fromkeys(range(3), quick)
    older, newest = (saved(tmp_path, state(step), step, 3, files=files) for step in (1, 2))
    for one in newest.glob("*-00001.safetensors"):
        one.unlink()
    assert verify(newest) == ["model-00001.safetensors is missing", "state-00001.safetensors is missing"]
    assert load_newest(tmp_path)[0].path == older


def test_a_file_is_verified_by_each_process_that_reads_from_it(tmp_path, quick):
    """Rank 0 verifies all when it chooses; the others what they use, when they use it."""
    path = saved(tmp_path, state(), ranks=2, files=dict.fromkeys(range(2), quick))
    one = path / "model-00001.safetensors"
    data = one.read_bytes()
    one.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    load_checkpoint(path, verified=False).read(Only({("model", "b.bias")}, cutting.rows, 0, 2))
    with pytest.raises(CheckpointError, match=r"model-00001.safetensors is damaged"):
        load_checkpoint(path, verified=False).read(cutting.Cut(cutting.rows, 1, 2))


class Only(cutting.Cut):
    """Wants some tensors of the model, and no others."""

    def __init__(self, wanted, *given):
        super().__init__(*given)
        self.wanted = wanted

    def room(self, path, shape, dtype):
        if path[0] == "model" and path not in self.wanted:
            empty = torch.empty(shape, dtype=dtype)
            return empty, cutting.Parts(shape, dtype, {})
        return super().room(path, shape, dtype)


INDEXES = {
    "a gap": lambda entry, files: entry["chunks"].pop(),
    "twice": lambda entry, files: entry["chunks"].append(entry["chunks"][0]),
    "beyond": lambda entry, files: entry["chunks"][0].__setitem__(1, [99, 0]),
    "negative": lambda entry, files: entry["chunks"][0].__setitem__(1, [-1, 0]),
    "same place": lambda entry, files: entry["chunks"][1].__setitem__(1, [0, 0]),
    "no size": lambda entry, files: entry.__setitem__("shape", "ab"),
    "another type": lambda entry, files: entry.__setitem__("dtype", "os.system"),
    "other name": lambda entry, files: entry["chunks"][0].__setitem__(3, "../x"),
    "other shape": lambda entry, files: entry["chunks"][0].__setitem__(2, [2, 10]),
    "file outside": lambda entry, files: files.__setitem__(0, "../../secret.safetensors"),
}


@pytest.mark.parametrize("what", INDEXES)
def test_an_index_that_lies_is_refused(tmp_path, quick, what):
    """Its hash is right: whoever wrote it wanted it so, or was mistaken."""
    path = saved(tmp_path, state(), ranks=2, files=dict.fromkeys(range(2), quick))
    table = json.loads((path / "index.json").read_text())
    INDEXES[what](table["tensors"]["model/b.weight"], table["files"])
    data = json.dumps(table).encode()
    (path / "index.json").write_bytes(data)
    manifest = read_manifest(path)
    entries = {**manifest.files, "index.json": FileEntry(len(data), hashlib.sha256(data).hexdigest())}
    (path / "manifest.json").write_bytes(Manifest(manifest.step, entries).to_bytes())
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


# -- looking ------------------------------------------------------------------------------------------------------------------


def command(capsys, *arguments):
    parser = argparse.ArgumentParser()
    subject = CheckpointCommand()
    subject.add_arguments(parser)
    code = subject.run(parser.parse_args([*map(str, arguments)]))
    return code, capsys.readouterr().out


def test_the_commands_read_it(tmp_path, quick, capsys):
    files = dict.fromkeys(range(2), quick)
    first, second = (saved(tmp_path / str(step), state(step), 1, 2, files=files) for step in (1, 2))
    code, text = command(capsys, "inspect", first)
    assert code == 0 and "a.weight" in text and "float32 (7, 5), 140 B in 2 parts" in text
    assert command(capsys, "verify", first) == (0, f"{first}: whole\n")
    code, text = command(capsys, "diff", first, second)
    assert code == 1 and "model.a.weight: 35 of 35 elements differ" in text
    shutil.copytree(first, tmp_path / "whole")
    assert command(capsys, "diff", first, tmp_path / "whole")[0] == 0
    Store(tmp_path / "one", quick).save(read_checkpoint(first), 1)
    assert command(capsys, "diff", first, find_checkpoints(tmp_path / "one")[0].path)[0] == 0
