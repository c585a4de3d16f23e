"""The callback: a thread that notices when nothing goes on, and writes down where its process stands."""

from __future__ import annotations

import faulthandler
import json
import os
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import Callback, component, option

if TYPE_CHECKING:
    from drivetrain import CallbackContext

FOLDER = "hang"


@component
class Watchdog(Callback):
    """When a run makes no progress, every process writes its Python stacks, its step and its last collective to RUN_DIR/hang.

    `drivetrain hang RUN_DIR` reads them and says who keeps the others waiting. A thread looks at the step's number a few times in each
    `after`; a step costs nothing.
    """

    after: float = option(default=120.0, above=0, help="seconds without a step or an evaluated batch")

    _evaluated: int = attrs.field(default=0, init=False, repr=False)
    _ended: threading.Event = attrs.field(factory=threading.Event, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "256")  # read by torch when the processes meet, which is later

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Start to watch; all ranks write into rank 0's directory."""
        folder = Path(ctx.strategy.gather(str(ctx.run_dir.absolute()) if ctx.is_main else "")[0]) / FOLDER
        for name in ("json", "txt"):
            (folder / f"rank-{ctx.strategy.rank}.{name}").unlink(missing_ok=True)
        self._ended = threading.Event()
        threading.Thread(target=self._watch, args=(ctx, folder, self._ended), name="watchdog", daemon=True).start()

    def on_evaluate_batch(self, ctx: CallbackContext) -> None:
        """Evaluation is progress too."""
        self._evaluated += 1

    def on_run_end(self, ctx: CallbackContext) -> None:
        """Stop watching."""
        self._ended.set()

    def _watch(self, ctx: CallbackContext, folder: Path, ended: threading.Event) -> None:
        limit = getattr(ctx.strategy, "timeout", None)
        after = min(self.after, limit.total_seconds() / 2) if isinstance(limit, timedelta) else self.after
        seen, since, written = (-1, -1, -1), time.monotonic(), False
        while not ended.wait(min(after / 8, threading.TIMEOUT_MAX)):
            now = (ctx.step, ctx.skipped_steps, self._evaluated)
            if now != seen:
                seen, since, written = now, time.monotonic(), False
            elif not written and time.monotonic() - since >= after:
                write(ctx, folder, time.monotonic() - since)
                written = True


def write(ctx: CallbackContext, folder: Path, idle: float) -> None:
    """Write where this process stands; what cannot be written is left out, for this is no time for another error."""
    strategy = ctx.strategy
    found = {
        "rank": strategy.rank,
        "world_size": strategy.world_size,
        "host": os.uname().nodename if hasattr(os, "uname") else "",
        "pid": os.getpid(),
        "time": time.time(),
        "idle": idle,
        "step": ctx.step,
        "epoch": ctx.epoch,
        "main_thread": threading.main_thread().ident,
        "collectives": collectives(),
        "peers": [{"rank": p.rank, "host": p.host, "pid": p.pid, "state": p.state} for p in strategy.peers],
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"rank-{strategy.rank}.txt", "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        (folder / f"rank-{strategy.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    except OSError:
        return


def collectives() -> list[dict[str, Any]]:
    """The last collective of each process group, as torch's flight recorder has it: name, number, and whether it has ended."""
    dump = getattr(getattr(torch._C, "_distributed_c10d", None), "_dump_fr_trace_json", None)
    if dump is None:
        return []
    trace = json.loads(dump(True, False))
    last: dict[str, dict[str, Any]] = {}
    for entry in trace.get("entries", []):
        group, number = ":".join(entry["process_group"]), int(entry["collective_seq_id"])
        last[group] = {"group": group, "number": number, "name": entry["profiling_name"], "ended": bool(entry["retired"])}
    return list(last.values())
