"""One of the two processes of test_ranks.py: `python two_ranks.py DIRECTORY RANK`."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

from drivetrain import Callback, CheckpointCallback, ProcessGroupStrategy, Trainer, TrainingConfig, component, option
from drivetrain_checkpoint import Files, ranks, read_checkpoint, write_checkpoint
from drivetrain_checkpoint.lock import RunLock


class Averaging(ProcessGroupStrategy):
    """Data parallelism at its simplest."""

    def reduce_gradients(self, parameters):
        for parameter in parameters:
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.world_size


class Failing(Files):
    def __init__(self, number: int, name: str = "saving", times: int = 99) -> None:
        self.number, self.name, self.times = number, name, times

    def mkdir(self, path):
        if self.name in path.name and self.times:
            self.times -= 1
            raise OSError(self.number, os.strerror(self.number))
        super().mkdir(path)


@component
class Watch(Callback):
    stop_at: int = option(default=0)
    announced: list = option(factory=list)
    restored: str = option(default="")

    def on_run_start(self, ctx):
        self.restored = "" if ctx.checkpoint_path is None else ctx.checkpoint_path.name

    def on_step_end(self, ctx):
        if ctx.step == self.stop_at:
            ctx.stop("far enough")

    def on_checkpoint_saved(self, ctx):
        self.announced.append(int(ctx.checkpoint_path.name[5:13]))


@component
class OwnMetric(Callback):
    def on_evaluate_end(self, ctx):
        if ctx.is_main:
            ctx.eval_metrics["eval/score"] = 1.0


class PreemptedOnRank1(CheckpointCallback):
    """Hears of a preemption on one rank only."""

    def on_step_end(self, ctx):
        if ctx.step == 8 and not ctx.is_main:
            self.on_preempt(ctx)


def trainer_of(folder: Path, name: str, *callbacks: Any, resume: str = "auto") -> Trainer:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    generator = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(64, 4, generator=generator), torch.randn(64, 1, generator=generator))
    settings = {"standard_callbacks": False, "log_interval": "1st", "eval_interval": "2st", "resume": resume}
    config = TrainingConfig(max_duration="8st", per_device_batch_size=4, output_dir=folder, run_name=name, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    given = {"loss": nn.MSELoss(), "optimizer": optimizer, "scheduler": lambda position: 1.0, "device": "cpu"}
    return Trainer(model, config, data, data, callbacks=callbacks, strategy=Averaging(60.0), **given)


def train(folder: Path, name: str, *more: Callback, kind: type = CheckpointCallback, **options: Any) -> dict[str, Any]:
    files, stop_at, resume = options.pop("files", Files()), options.pop("stop_at", 0), options.pop("resume", "auto")
    callback = kind(**{"every": "2st", "keep_last": None, **options})
    callback.files = files
    watch = Watch(stop_at=stop_at)
    trainer, error = trainer_of(folder, name, *more, watch, callback, resume=resume), ""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            trainer.train()
        except Exception as caught:
            error = str(caught)
    return {
        "error": error,
        "step": trainer.ctx.step,
        "weights": torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()]).tolist(),
        "announced": watch.announced,
        "from": watch.restored,
        "warnings": sum("checkpoint" in str(w.message) for w in said),
    }


def main(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for mode in ("background", "at once"):
        given = {"every": "3st", "files": Failing(errno.ENOSPC), "asynchronous": mode == "background"}
        found[f"full disk, {mode}"] = train(folder, "full-" + mode.replace(" ", "-"), **given)
    found["warn"] = train(folder, "warn", files=Failing(errno.ENOSPC, times=1), on_error="warn")
    found["read-only"] = train(folder, "read-only", files=Failing(errno.EROFS, "probing"))
    (folder / "in-use").mkdir(exist_ok=True)
    lock = RunLock(folder / "in-use")
    if rank == 0:
        lock.acquire()
    found["in use"] = train(folder, "in-use")
    lock.release()
    found["nowhere"] = train(folder, "nowhere", resume=str(folder / "no such run"))

    found["reference"] = train(folder, "reference")
    train(folder, "resumed", stop_at=6)
    dist.barrier()
    if rank == 0:
        (folder / "resumed" / "checkpoints" / "step-00000006" / "model.safetensors").write_bytes(b"damaged")
        shutil.copytree(folder / "resumed", folder / "visible to rank 0" / "only here" / "split")
        shutil.copytree(folder / "resumed", folder / "again" / "split")
    dist.barrier()
    os.chdir(folder / ("visible to rank 0" if rank == 0 else "again"))
    found["not shared"] = train(Path("only here" if rank == 0 else "."), "split")
    os.chdir(folder)
    with_agreement = ranks.on_rank_0, ranks.on_every_rank
    import drivetrain_checkpoint.callback as module

    module.on_rank_0 = module.on_every_rank = lambda ctx, action: action()
    found["each for itself"] = restored_alone(folder / "again" if rank == 0 else folder / "nothing")
    module.on_rank_0, module.on_every_rank = with_agreement
    found["resumed"] = train(folder, "resumed")
    train(folder, "shared", stop_at=6)
    dist.barrier()
    if rank == 0:  # as if only one rank's random state had been saved
        path = folder / "shared" / "checkpoints" / "step-00000006"
        tree = read_checkpoint(path)
        tree["rng"][1] = tree["rng"][0]
        shutil.rmtree(path)
        write_checkpoint(folder / "shared", tree, 6)
    dist.barrier()
    found["one random state for both"] = train(folder, "shared")
    found["own metric"] = train(folder, "own", OwnMetric(), every="99st", best="eval/score", save_at_end=False)
    found["preempted on rank 1"] = train(folder, "preempted", every="99st", save_at_end=False, kind=PreemptedOnRank1)
    return found


def restored_alone(folder: Path) -> dict[str, str]:
    """Only the choice: training would wait for ever."""
    trainer = trainer_of(folder, "split", Watch(), CheckpointCallback())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.restore()
    return {"from": "" if trainer.ctx.checkpoint_path is None else trainer.ctx.checkpoint_path.name}


if __name__ == "__main__":
    where, number = Path(sys.argv[1]), int(sys.argv[2])
    os.environ["DRIVETRAIN_PLUGINS"] = "drivetrain-checkpoint"
    Files.fsync = Files.fsync_dir = lambda self, path: None
    torch.set_num_threads(1)
    store = dist.FileStore(str(where / "meeting"), 2)
    dist.init_process_group("gloo", store=store, rank=number, world_size=2, timeout=timedelta(seconds=60))
    result = main(where, number)
    (where / f"{number}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
