"""What one process of test_two_ranks does: runs with averaged weights and with anomalies; rank 0 writes what came out."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from drivetrain import CheckpointCallback, ModelError, Trainer, TrainingConfig
from drivetrain_anomaly import EVENTS_FILE, AnomalyCallback
from drivetrain_ema import EmaCallback

STEPS, BAD = 16, 9


def net() -> nn.Module:
    torch.manual_seed(0)
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)))
    return nn.Sequential(nn.Linear(4, 8), blocks, nn.Dropout(0.25), nn.Linear(8, 1))


def batches(accumulation: int, bad: str = "", without: bool = False) -> DataLoader[Any]:
    """Two batches for each microbatch, one for each rank. In window BAD the last one, rank 1's, is spoiled or left out."""
    generator = torch.Generator().manual_seed(1)
    size = 2 * accumulation
    made = [(torch.randn(4, 4, generator=generator), torch.randn(4, 1, generator=generator)) for _ in range(STEPS * size)]
    if bad == "nan":
        made[BAD * size + size - 1][0][2, 1] = math.nan
    elif bad:
        made[BAD * size + size - 1][1].fill_(math.inf if bad == "inf" else 1000.0)
    if without:
        del made[BAD * size : (BAD + 1) * size]
    return DataLoader(made, batch_size=None)


def run(folder: Path, name: str, data: Any, *callbacks: Any, **options: Any) -> Trainer:
    given = {"max_duration": "1ep", "log_interval": "4st", "standard_callbacks": False, "device": "cpu", "max_grad_norm": 1.0}
    config = TrainingConfig(output_dir=folder, run_name=name, **{**given, "distributed": "ddp", **options})
    model = net()
    return Trainer(
        model,
        config,
        data,
        loss=nn.MSELoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.05),
        scheduler=lambda position: 1 / (1 + position / 10),
        callbacks=callbacks,
    )


def flat(model: nn.Module) -> Tensor:
    """All weights in one, sharded ones put together."""
    return torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().reshape(-1) for p in model.parameters()])


def anomalies(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for how, accumulation, precision, strategy in (
        ("nan", 1, None, "ddp"),
        ("inf", 2, None, "ddp"),
        ("spike", 2, None, "ddp"),
        ("nan", 2, "fp16", "ddp"),
        ("inf", 1, "fp16", "ddp"),
        ("spike", 1, "fp16", "ddp"),
        ("loss", 2, None, "ddp"),  # a spike by the limit of the loss
        ("nan", 1, None, "fsdp"),
        ("spike", 2, None, "fsdp"),
        ("nan", 2, "fp16", "fsdp"),
    ):
        name = f"{how}-{accumulation}-{precision}-{strategy}"
        options: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "distributed": strategy}
        if precision is not None:
            options["precision"] = {"use": precision, "init_scale": 1.0 if how == "spike" else 1024.0}  # nothing overflows
        reference = run(folder, f"{name}-reference", batches(accumulation, without=True), **options)
        reference.train()
        for policy in ("rollback", "skip", "raise", "ignore"):
            if policy == "ignore" and how in ("nan", "inf") and precision is None and (accumulation, strategy) != (1, "ddp"):
                continue  # one is enough: from there on everything is NaN
            given = {"warmup": 4, "snapshot_every": 4, "renew_every": 4}
            given |= {"norm_factor": None, "loss_factor": 50.0} if how == "loss" else {}
            callback = AnomalyCallback(nonfinite=policy, spike=policy, **given)
            trainer = run(folder, f"{name}-{policy}", batches(accumulation, how), callback, **options)
            error = ""
            try:
                trainer.train()
            except ModelError as raised:
                error = str(raised)
            path = trainer.run_dir / EVENTS_FILE
            dist.barrier()
            weights = flat(trainer.model)
            found[f"{name}-{policy}"] = {
                "flat": weights.tolist(),
                "equal": torch.equal(weights, flat(reference.model)),
                "finite": bool(torch.isfinite(weights).all()),
                "steps": trainer.ctx.step,
                "errors": [error, *everybody(error)],
                "weights": [weights.tolist() == other for other in everybody(weights.tolist())],
                "events": [json.loads(line) for line in path.read_text().splitlines()],
            }
    return found


def everybody(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def averages(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    world = int(os.environ["WORLD_SIZE"])
    for strategy in ("ddp", "fsdp"):

        def trainer(name: str, duration: str, strategy: str = strategy) -> tuple[Trainer, EmaCallback]:
            ema = EmaCallback(decay=0.9, use_at_end=True)
            rows = batches(2 // world).dataset  # the same windows for one process and for two
            data = DataLoader(rows, batch_size=None)
            given = {
                "distributed": strategy,
                "max_duration": duration,
                "resume": "auto",
                "gradient_accumulation_steps": 2 // world,
            }
            made = run(folder, f"{strategy}-{name}", data, ema, CheckpointCallback(every="100st"), **given)
            made.model[2].p = 0.0
            return made, ema

        whole, ema = trainer("whole", "12st")
        whole.train()
        stopped, _ = trainer("resumed", "12st")
        for step in stopped.steps():
            if step.number == 5:
                break
        resumed, again = trainer("resumed", "12st")
        resumed.train()
        states = [part.state_dict()["averages"] for part in (ema, again)]
        found[strategy] = {
            "average": flat(whole.model).tolist(),
            "resumed": torch.equal(flat(whole.model), flat(resumed.model)),
            "state": all(torch.equal(states[0][name], states[1][name]) for name in states[0]),
            "step": resumed.ctx.step,
        }
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    target, what = Path(sys.argv[1]), sys.argv[2]
    result = {"anomalies": anomalies, "averages": averages}[what](target.parent / "runs" / target.stem)
    if not dist.is_initialized() or dist.get_rank() == 0:
        target.write_text(json.dumps(result))
