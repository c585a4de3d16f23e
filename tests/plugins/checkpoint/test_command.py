"""`drivetrain checkpoint`, as the program calls it."""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import suppress

import pytest
import torch

from drivetrain import CheckpointCallback
from drivetrain_checkpoint import CheckpointError, find_checkpoints, read_checkpoint, write_checkpoint
from drivetrain_checkpoint.command import CheckpointCommand


def tree(change: float = 0.0) -> dict:
    return {
        "progress": {"step": 3, "best": float("inf"), "note": "a\nb\x1b[2J"},
        "model": {"w": torch.arange(6.0).reshape(2, 3) + change, "tied": torch.ones(4, dtype=torch.bfloat16)},
        "optimizer": {"state": {0: {"m": torch.zeros(2, dtype=torch.complex64), "n": torch.tensor(7, dtype=torch.uint8)}}},
        "list": [1, 2, (3, "x")],
        "long": list(range(100)),
        "empty": {},
    }


@pytest.fixture
def command(capsys):
    """Runs the command and returns its exit code and its lines."""

    def run(*words) -> tuple[int, list[str]]:
        parser = argparse.ArgumentParser()
        one = CheckpointCommand()
        one.add_arguments(parser)
        code = one.run(parser.parse_args([str(word) for word in words]))
        return code, capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def path(tmp_path, quick):
    return write_checkpoint(tmp_path / "run", tree(), 3, quick)


def test_inspect_shows_every_tensor_and_value(command, path):
    code, lines = command("inspect", path)
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert code == 0 and lines[0].startswith(f"{path}: step 3, ") and lines[0].endswith(" in 3 files")
    for part in (
        "w float32 (2, 3), 24 B",
        "tied bfloat16 (4,), 8 B",
        "m complex64 (2,), 16 B",
        "n uint8 (), 1 B",
        "best inf",
        r"note 'a\nb\x1b[2J'",
        "long [0, 1, 2,",
        "empty {}",
    ):
        assert part in text, part
    assert "\x1b" not in text and next(line for line in lines if line.strip().startswith("m ")).startswith("      m ")


def test_inspect_names_types_as_torch_does(command, tmp_path, quick):
    from drivetrain_checkpoint.format import NATIVE

    tensors = {str(dtype).removeprefix("torch."): torch.zeros(2, dtype=dtype) for dtype in NATIVE}
    _, lines = command("inspect", write_checkpoint(tmp_path, tensors, 1, quick))
    shown = dict(line.split()[:2] for line in lines[5:])
    assert {name: kind for name, kind in shown.items() if name in tensors} == {name: name for name in tensors}


def test_inspect_of_a_run_lists_its_checkpoints(command, path, tmp_path, quick):
    newer = write_checkpoint(tmp_path / "run", tree(), 12, quick)
    (newer / "manifest.json").write_text("{}")
    for where in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        code, lines = command("inspect", where)
        assert code == 0 and lines[0].endswith(": 2 checkpoints")
        assert "step-00000003  step 3, " in lines[1] and "step-00000012  cannot be used: manifest.json is damaged" in lines[2]


def test_verify_says_what_is_wrong(command, path, tmp_path, quick):
    assert command("verify", path) == (0, [f"{path}: whole"])
    write_checkpoint(tmp_path / "run", tree(), 4, quick)
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-1])
    (path / "state.json").unlink()
    for where, others in ((path, 0), (tmp_path / "run", 1)):
        code, lines = command("verify", where)
        assert code == 1 and lines[others] == f"{path}: damaged"
        assert {line.split()[0] for line in lines[others + 1 :]} == {"model.safetensors", "state.json"}


@pytest.mark.parametrize("action", ["inspect", "verify"])
def test_damage_never_ends_in_a_traceback(command, path, action):
    for name in ("state.json", "model.safetensors", "state.safetensors", "manifest.json"):
        whole = (path / name).read_bytes()
        for data in (
            b"",
            whole[:9],
            b"\xff" * 64,
            b'{"a":{"$tensor":[]}}',
            b"[" * 5000,
            whole.replace(b"data_offsets", b"data_offsetz"),
        ):
            (path / name).write_bytes(data)
            with suppress(CheckpointError):
                command(action, path)
        (path / name).write_bytes(whole)


def test_diff_of_equals(command, path, tmp_path, quick):
    same = write_checkpoint(tmp_path / "other", tree(), 3, quick)
    assert command("diff", path, same) == (0, ["0 differences"])


def test_diff_names_the_first_and_all(command, path, tmp_path, quick):
    other = tree(0.5)
    other["model"]["w"][0, 0] = 0.0
    other["optimizer"]["state"][0]["n"] = torch.tensor(7, dtype=torch.int16)
    other["progress"] |= {"step": 4, "best": float("nan")}
    other["list"].append("more")
    del other["empty"]
    code, lines = command("diff", path, write_checkpoint(tmp_path / "other", other, 4, quick))
    assert code == 1 and lines[0].endswith("differ, first at progress.step") and lines[-1] == "6 differences"
    assert [line.strip() for line in lines[1:-1]] == [
        "progress.step: 3 → 4",
        "progress.best: inf → nan",
        "model.w: 5 of 6 elements differ, by at most 0.5 (float32 (2, 3))",
        "optimizer.state.0.n: uint8 () → int16 ()",
        "list[3]: only in the second",
        "empty: only in the first",
    ]


def test_diff_sees_single_bits(command, tmp_path, quick):
    """-0.0 is not 0.0, and NaN is what it was."""
    nan, zero = torch.tensor([float("nan"), 1.0]), torch.tensor([0.0, 1.0])
    a = write_checkpoint(tmp_path / "a", {"nan": nan, "zero": zero}, 1, quick)
    b = write_checkpoint(tmp_path / "b", {"nan": nan.clone(), "zero": -zero * torch.tensor([1.0, -1.0])}, 1, quick)
    code, lines = command("diff", a, b)
    assert (code, lines[1:]) == (1, ["  zero: 1 of 2 elements differ, by at most 0 (float32 (2,))", "1 difference"])


def test_diff_of_two_runs_takes_their_newest(command, trainer, tmp_path):
    for name, steps in (("a", 4), ("b", 4), ("c", 5)):
        trainer(CheckpointCallback(), name=name, steps=steps).train()
    code, lines = command("diff", tmp_path / "a", tmp_path / "b")
    assert not [line for line in lines if "model" in line or "optimizer" in line]  # they took their own time
    code, lines = command("diff", tmp_path / "a", tmp_path / "c" / "checkpoints")
    assert code == 1 and any("model.0.weight: 32 of 32 elements differ" in line for line in lines)


def test_a_path_that_is_none_is_said(command, tmp_path):
    for words in (("inspect", tmp_path), ("diff", tmp_path, tmp_path)):
        with pytest.raises(CheckpointError, match="neither a checkpoint nor a run with checkpoints"):
            command(*words)
    assert command("verify", tmp_path / "nowhere")[0] == 1


def test_looking_and_verifying_wait_for_no_torch(path):
    code = (
        "import argparse, sys; from drivetrain_checkpoint.command import CheckpointCommand as C; parser = argparse.ArgumentParser();"
        "c = C(); c.add_arguments(parser); [c.run(parser.parse_args([w, sys.argv[1]])) for w in ('inspect', 'verify')];"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "float32 (2, 3)" in done.stdout and done.stdout.endswith("whole\n")


def test_inspect_of_a_real_run(command, trainer, tmp_path):
    trainer(CheckpointCallback()).train()
    (found,) = find_checkpoints(tmp_path / "run")
    _, lines = command("inspect", found.path)
    names = {line.split()[0] for line in lines if line}
    assert {"0.weight", "1.running_mean", "momentum_buffer", "step", "rng"} <= names
    assert len(lines) > len(read_checkpoint(found.path)["model"])
