"""Runs with every built-in callback, killed and started again: `python -m tests.faults.watched FOLDER PLAN`, whose output is JSON.

Each sitting is a process of its own, forked from this one, which has imported everything and computed nothing. A plan is a list of
runs: {"name": …, "kills": [[event, step], …], "forget": class or null}. A sitting kills itself with SIGKILL in the event of that step;
the last one runs to the end. In runs with "forget", no component of that class takes back its state.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from tests.e2e.everything import Net
from torch import nn

from drivetrain import Callback, CallbackContext, Trainer, TrainingConfig, component, option

GRID: dict[str, dict[str, Any]] = {
    "goodput": {"show": False},
    "throughput": {},
    "progress": {},
    "logging": {"trackers": ["jsonl", "csv", "tensorboard"]},
    "checkpoint": {"every": "2st", "keep_last": 3},
    "early_stopping": {"mode": "max", "patience": 100},  # the first evaluation is the best, so what is forgotten is missed
    "ema": {"decay": 0.9, "update_every": 2},
    "anomaly": {
        "nonfinite": "rollback",
        "spike": "skip",
        "norm_factor": 3.0,
        "warmup": 2,
        "snapshot_every": 3,
        "renew_every": 4,
    },
    "ledger": {},
    "gc": {},
    "gradient_stats": {"steps": 3},
    "profiler": {"start": [5], "steps": 2, "top": 0},
    "watchdog": {},
    "sample_text": {"every": "5st", "length": 4},
    "batch_size_finder": {},
    "lr_finder": {"steps": 10, "lowest": 1e-4, "apply": True},
    "workers_finder": {"most": 1},
}


@component
class Die(Callback):
    """Kills its process in one event."""

    event: str = option()
    step: int = option()

    def _maybe(self, event: str, ctx: CallbackContext) -> None:
        if (event, ctx.step) == (self.event, self.step):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_start(self, ctx: CallbackContext) -> None:
        """Between two steps."""
        self._maybe("on_step_start", ctx)

    def on_clipped(self, ctx: CallbackContext) -> None:
        """In the middle of a step."""
        self._maybe("on_clipped", ctx)

    def on_log(self, ctx: CallbackContext) -> None:
        """In a log."""
        self._maybe("on_log", ctx)

    def on_evaluate_batch(self, ctx: CallbackContext) -> None:
        """In an evaluation."""
        self._maybe("on_evaluate_batch", ctx)


def rows() -> list[Any]:
    """Samples of 14 steps; one of them is broken, in step 9 of each epoch."""
    generator = torch.Generator().manual_seed(1)
    made = [(torch.randn(4, generator=generator), torch.randn(1, generator=generator)) for _ in range(4 * 14)]
    made[4 * 8 + 1][0].fill_(float("nan"))
    return made


def sitting(folder: Path, name: str, kill: list[Any] | None) -> None:
    """The same call each time, but for when it dies."""
    torch.manual_seed(3)
    model = Net(8, 1)
    model.insert(2, nn.Dropout(0.3))
    config = TrainingConfig(
        max_duration="2ep",
        per_device_batch_size=4,
        log_interval="3st",
        eval_interval="4st",
        dataloader={"shuffle": False},
        output_dir=folder,
        run_name=name,
        resume="auto",
        device="cpu",
        standard_callbacks=False,
        callbacks=[{"use": callback, **options} for callback, options in GRID.items()],
    )
    data = rows()
    more = [] if kill is None else [Die(event=kill[0], step=kill[1])]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    Trainer(
        model,
        config,
        data,
        data[:20],
        loss=nn.MSELoss(),
        optimizer=optimizer,
        scheduler=lambda position: 1 / (1 + position / 10),
        callbacks=more,
    ).train()


def forked(folder: Path, name: str, kill: list[Any] | None, forget: str | None) -> int:
    """The exit code of a sitting in a process of its own; negative for a signal."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            with open(os.devnull, "w") as silence:
                os.dup2(silence.fileno(), 1)
            if forget is not None:
                _let_forget(forget)
            sitting(folder, name, kill)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _let_forget(name: str) -> None:
    from drivetrain.registry import find

    cls: Any = find("callback", name).load()
    cls.load_state_dict = lambda self, saved: None


def main(folder: Path, plan: list[dict[str, Any]]) -> None:
    """Carry the plan out; one line of JSON with the exit codes of each run's sittings."""
    torch.set_num_threads(1)
    codes = {
        run["name"]: [forked(folder, run["name"], kill, run.get("forget")) for kill in [*run["kills"], None]] for run in plan
    }
    print(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
