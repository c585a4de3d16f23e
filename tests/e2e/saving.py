"""Divided checkpoints of real runs: `python saving.py DIRECTORY KILL…` prints what came of it as one line of JSON.

It imports torch once and forks the processes of each run, which makes a start cheap.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path
from torch.utils.data import TensorDataset

import drivetrain_fsdp.strategy
import drivetrain_optimizers
from drivetrain import Callback, CheckpointCallback, Trainer, TrainingConfig
from drivetrain_checkpoint import Files, find_checkpoints, read_checkpoint
from drivetrain_checkpoint.store import load_newest

STEPS = 6
assert drivetrain_fsdp and drivetrain_optimizers


class Dying(Files):
    """Kills its process at the n-th operation of a name on a path that contains a text: half done, or done and not yet answered."""

    def __init__(self, operation: str, part: str, count: int, before: bool) -> None:
        self.operation, self.part, self.count, self.before = operation, part, count, before

    def is_due(self, operation: str, path: Path) -> bool:
        if operation != self.operation or self.part not in str(path):
            return False
        self.count -= 1
        return self.count == 0

    def write(self, path: Path, chunks: Any) -> None:
        if self.is_due("write", path):
            path.write_bytes(bytes(next(iter(chunks)))[:20])
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(path, chunks)

    def fsync(self, path: Path) -> None:
        self.around("fsync", path, path)

    def fsync_dir(self, path: Path) -> None:
        self.around("fsync_dir", path, path)

    def rename(self, source: Path, target: Path) -> None:
        self.around("rename", target, source, target)

    def remove(self, path: Path) -> None:
        self.around("remove", path, path)

    def around(self, operation: str, where: Path, *paths: Path) -> None:
        due = self.is_due(operation, where)
        if due and self.before:
            os.kill(os.getpid(), signal.SIGKILL)
        getattr(super(), operation)(*paths)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer_of(folder: Path, name: str, width: int, *callbacks: Any, steps: int = STEPS, strategy: str = "fsdp") -> Trainer:
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1), nn.Tanh()) for _ in range(4)))
    generator = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(32, width, generator=generator), torch.randn(32, width, generator=generator))
    config = TrainingConfig(
        max_duration=f"{steps}st",
        per_device_batch_size=2,
        output_dir=folder,
        run_name=name,
        standard_callbacks=False,
        log_interval="1st",
        distributed=strategy,
        precision="fp32",
        scheduler="constant",
        optimizer={"use": "adamw", "lr": 0.01},
    )
    return Trainer(model, config, data, loss=nn.MSELoss(), callbacks=callbacks)


def forked(ranks: int, act: Callable[[int], None]) -> list[int]:
    """The exit codes of so many processes that do something together; one that waits for ever is killed after 90 seconds."""
    meeting = Path(tempfile.mkdtemp()) / "meeting"
    children = []
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                store = dist.FileStore(str(meeting), ranks)  # type: ignore[attr-defined]
                given: dict[str, Any] = {"store": store, "rank": rank, "world_size": ranks, "timeout": timedelta(seconds=60)}
                dist.init_process_group("gloo", **given)
                act(rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                for thread in threading.enumerate():
                    if thread.name == "drivetrain-checkpoint":
                        thread.join()
                os._exit(code)
        children.append(child)
    end, codes = time.monotonic() + 90, {}
    while len(codes) < ranks:
        for child in children:
            if child not in codes and (found := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(found[1])
            elif child not in codes and time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    shutil.rmtree(meeting.parent)
    return [codes[child] for child in children]


def train(folder: Path, name: str, dying: dict[int, Dying] | None = None, asynchronous: bool = True) -> list[int]:
    def act(rank: int) -> None:
        from drivetrain_checkpoint import together

        together.GRACE = 0.3
        callback = CheckpointCallback(every="2st", keep_last=1, asynchronous=asynchronous)
        callback.files = (dying or {}).get(rank, Files())
        trainer_of(folder, name, 16, callback).train()

    return forked(2, act)


# -- kills -----------------------------------------------------------------------------------------------------------------

# rank, operation, part of the path, which one of them, before the operation (or after it)
KILLS = {
    "rank 1 writes": (1, "write", "model-00001", 2, True),
    "rank 1 has written": (1, "fsync", "state-00001", 2, False),
    "rank 1 leaves its note": (1, "write", "written-00001", 2, True),
    "rank 1 has left its note": (1, "rename", "written-00001", 2, False),
    "rank 0 writes": (0, "write", "state-00000", 2, True),
    "rank 0 takes the note": (0, "remove", "written-00001", 2, True),
    "rank 0 writes the manifest": (0, "write", "manifest", 3, True),  # the first one is of the trial write at the start
    "rank 0 has written the manifest": (0, "fsync", "manifest", 2, False),
    "rank 0 renames": (0, "rename", "step-", 2, True),
    "rank 0 has renamed": (0, "rename", "step-", 2, False),
    "rank 0 rotates": (0, "rename", "removing", 1, False),
    "rank 0 removes": (0, "remove", "removing", 3, True),
}


def leaves(tree: Any) -> dict[str, Any]:
    """Every value of a state but what is measured in seconds or names the run."""
    found = tree_flatten_with_path({key: tree[key] for key in ("model", "optimizer", "rng", "precision")})[0]
    return {str(path): value for path, value in found}


def unequal(one: Any, other: Any) -> list[str]:
    a, b = leaves(one), leaves(other)
    different = [path for path in a.keys() & b.keys() if not equal(a[path], b[path])]
    return sorted(a.keys() ^ b.keys()) + different


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)
    return type(a) is type(b) and bool(a == b)


def kills(folder: Path, names: list[str]) -> dict[str, Any]:
    """What came of a kill at each of these points, and of the same call again."""
    assert train(folder, "reference") == [0, 0]
    end = read_checkpoint(find_checkpoints(folder / "reference")[0].path)
    found: dict[str, Any] = {}
    for number, name in enumerate(names):
        rank, *point = KILLS[name]
        run, dying = f"trial-{number}", Dying(*point)
        codes = train(folder, run, {rank: dying})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            newest, rejected = load_newest(folder / run)
        again = train(folder, run)
        left = sorted(path.name for path in (folder / run / "checkpoints").iterdir())
        result = read_checkpoint(find_checkpoints(folder / run)[0].path)
        found[name] = {
            "codes": codes,
            "killed": codes[rank] == -signal.SIGKILL,
            "newest": newest.step if newest else 0,
            "rejected": len(rejected),
            "again": again,
            "left": left,
            "unequal": unequal(end, result),
        }
    return found


# -- a disk that refuses one of them ---------------------------------------------------------------------------------------


class Full(Files):
    """A disk that has no room for this process's part of the second checkpoint."""

    saves = 0

    def write(self, path: Path, chunks: Any) -> None:
        if path.name.startswith("model-"):
            self.saves += 1
            if self.saves == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(path, chunks)


def refusal(folder: Path, on_error: str) -> dict[str, Any]:
    """What each rank of a run hears when rank 1's disk is full, and which checkpoints there are in the end."""

    def act(rank: int) -> None:
        callback = CheckpointCallback(every="2st", keep_last=None, on_error=on_error)
        callback.files = Full() if rank else Files()
        trainer, said = trainer_of(folder, on_error, 16, callback), ""
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                trainer.train()
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
        found = {
            "said": said,
            "step": trainer.ctx.step,
            "warned": sum("could not be written" in str(w.message) for w in warned),
        }
        (folder / f"{on_error}-{rank}.json").write_text(json.dumps(found))

    assert forked(2, act) == [0, 0]
    ranks = [json.loads((folder / f"{on_error}-{rank}.json").read_text()) for rank in (0, 1)]
    return {"ranks": ranks, "left": sorted(path.name for path in (folder / on_error / "checkpoints").iterdir())}


# -- memory ----------------------------------------------------------------------------------------------------------------


class Peak:
    """The most memory of its own (not of files) that this process has had meanwhile, above what it had at the start; in bytes."""

    def __enter__(self) -> Peak:
        self.start = self.most = anonymous()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def look(self) -> None:
        while not self.stop.wait(0.001):
            self.most = max(self.most, anonymous())

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.most = max(self.most, anonymous())

    @property
    def growth(self) -> int:
        return self.most - self.start


def anonymous() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Measure(Callback):
    """What a save and a load take, and what gathering the state would."""

    def __init__(self, callback: CheckpointCallback, loading: bool) -> None:
        self.callback, self.loading, self.found = callback, loading, dict[str, int]()

    def on_run_start(self, ctx: Any) -> None:
        if self.loading:
            return
        tensors = [*ctx.model.parameters()]
        self.found["weights"] = sum(t.numel() * 4 for t in tensors)

    def on_step_end(self, ctx: Any) -> None:
        if self.loading or ctx.step != 2:
            return
        with Peak() as gathering:
            whole = ctx.state_dict()
        self.found["gathering"] = gathering.growth
        del whole
        with Peak() as saving:
            self.callback._save(ctx)
            self.callback._land(ctx)
        self.found["saving"] = saving.growth


def memory(folder: Path, ranks: int, width: int) -> dict[str, Any]:
    """Bytes by which each rank's memory grows at most in a save and in a load."""

    def save(rank: int) -> None:
        callback = CheckpointCallback(every="99st", save_at_end=False)
        measure = Measure(callback, loading=False)
        trainer_of(folder, "run", width, callback, measure, steps=2).train()
        (folder / f"save-{rank}.json").write_text(json.dumps(measure.found))

    def load(rank: int) -> None:
        trainer = trainer_of(folder, "run", width, CheckpointCallback(every="99st", save_at_end=False), steps=2)
        with Peak() as loading:
            trainer.restore()
        assert trainer.ctx.step == 2
        (folder / f"load-{rank}.json").write_text(json.dumps({"loading": loading.growth}))

    assert forked(ranks, save) == [0] * ranks
    assert forked(ranks, load) == [0] * ranks
    parts = [json.loads((folder / f"{what}-{rank}.json").read_text()) for what in ("save", "load") for rank in range(ranks)]
    return {"weights": parts[0]["weights"], "ranks": [a | b for a, b in zip(parts[:ranks], parts[ranks:], strict=True)]}


if __name__ == "__main__":
    warm = nn.Parameter(torch.zeros(1))
    warm.grad = torch.zeros(1)
    torch.optim.AdamW([warm]).step()  # imports more
    where = Path(sys.argv[1])
    results = {on_error: refusal(where, on_error) for on_error in ("raise", "warn")}
    print(json.dumps({"memory": memory(where, 2, 1024), "kills": kills(where, sys.argv[2:]), "refusals": results}))
