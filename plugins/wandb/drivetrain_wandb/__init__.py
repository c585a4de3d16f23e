"""Weights & Biases: a tracker for the logging callback."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
import wandb
from PIL import Image
from torch import Tensor

from drivetrain import Tracker, component, option, state
from drivetrain.tracking import printable
from drivetrain_wandb.recorded import newest

if TYPE_CHECKING:
    from drivetrain import CallbackContext

__all__ = ["WandbTracker"]

_said = logging.getLogger("drivetrain.wandb")


@component
class WandbTracker(Tracker):
    """Record a run at Weights & Biases: values, configuration, texts, histograms and images.

    The run's id is part of every checkpoint, so a resumed run goes on as the same one; what it repeats is left out, by what W&B has in
    RUN_DIR/wandb, and what a kill has lost there is taken from RUN_DIR/metrics.jsonl. W&B takes nothing back: when a run goes back to
    an earlier state, the values from before, a NaN among them, stay the ones of those steps. `mode` is W&B's own: "offline" writes to
    RUN_DIR/wandb, for `wandb sync` later. When the server cannot be reached or refuses the login at the start, that is said once and
    the run is recorded offline. A server that is lost later is W&B's business, which keeps everything in RUN_DIR/wandb and sends it when
    it can; what it could not send by the end is said then.
    """

    project: str = option(default="drivetrain", help="the project at W&B")
    entity: str | None = option(default=None, help="the user or team; that of the login by default")
    name: str | None = option(default=None, help="the run's name; run_name by default")
    group: str | None = option(default=None, help="a group of runs")
    tags: list[str] = option(factory=list, help="tags of the run")
    notes: str | None = option(default=None, help="a longer description")
    mode: Literal["online", "offline"] | None = option(default=None, help="by default what WANDB_MODE says, else online")
    timeout: float = option(default=30.0, above=0, help="seconds to wait for the server at the start and at the end")

    run_id: str | None = state(default=None)

    _run: Any = attrs.field(default=None, init=False, repr=False)
    _memory: Any = attrs.field(default=None, init=False, repr=False)  # the path of drivetrain.json
    _before: tuple[int, set[str]] = attrs.field(
        default=(-1, set()), init=False, repr=False
    )  # the newest step of earlier sittings
    _newest: tuple[int, set[str]] = attrs.field(default=(-1, set()), init=False, repr=False)  # and of this one, with its names

    def start(self, ctx: CallbackContext) -> None:
        """Begin the run at W&B, or go on with it."""
        folder = ctx.run_dir / "wandb"
        folder.mkdir(exist_ok=True)
        if self.run_id is None or ctx.step == 0:
            self.run_id = secrets.token_hex(4)
        self._memory = folder / "drivetrain.json"
        recorded = (newest(folder, self.run_id), _closed_with(self._memory, self.run_id))
        self._before = self._newest = max(recorded, key=lambda place: (place[0], len(place[1])))
        given = {"project": self.project, "entity": self.entity, "group": self.group, "tags": self.tags, "notes": self.notes}
        given |= {"name": self.name or ctx.config.run_name, "id": self.run_id, "dir": str(ctx.run_dir), "resume": "allow"}
        self._run = self._begun(given)
        for step, values in _missing(ctx.run_dir / "metrics.jsonl", self._before[0], ctx.step):
            self.log(values, step)

    def _begun(self, given: dict[str, Any]) -> Any:
        options: dict[str, Any] = {
            "console": "off",
            "silent": True,
            "init_timeout": self.timeout,
            "login_timeout": self.timeout,
        }
        online = self.mode != "offline"
        try:
            waits: dict[str, Any] = {"finish_timeout": self.timeout} if online else {}
            return self._opened(**given, mode=self.mode, settings=wandb.Settings(**options, **waits))
        except wandb.Error as error:
            reason = printable(str(error).partition("\n")[0])
        _said.warning("W&B cannot be reached (%s). This run is recorded offline; `wandb sync` sends it later.", reason)
        wandb.teardown()
        return self._opened(**given, mode="offline", settings=wandb.Settings(**options))

    def _opened(self, **given: Any) -> Any:
        """Call `wandb.init`, again if W&B's service holds on to the id: for a moment after an attempt that failed, for ever after a kill.

        The latter when the service is of a process that started both the killed one and this; then this one gets its own.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                return wandb.init(**given, reinit="create_new")
            except Exception as error:
                if "in use" not in str(error) or time.monotonic() > deadline:
                    raise
            os.environ.pop("WANDB_SERVICE", None)
            wandb.teardown()
            time.sleep(0.5)

    def rewind(self, step: int) -> None:
        """Leave out what is repeated: W&B takes nothing back, and of two values of a step would show the last."""
        self._before = max(self._before, self._newest, key=lambda recorded: recorded[0])

    def config(self, values: Mapping[str, Any], step: int) -> None:
        """Record the configuration."""
        self._run.config.update(dict(values), allow_val_change=True)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record values; W&B joins those of one step to one row."""
        self._record({printable(name): value for name, value in values.items()}, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Record a text."""
        self._record({printable(name): wandb.Html(f"<pre>{_escaped(text)}</pre>", inject=False)}, step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Record the distribution of the finite values."""
        kept = values.detach().float().flatten()
        kept = kept[kept.isfinite()]
        if len(kept):
            counts, edges = torch.histogram(kept.cpu(), bins=64)
            histogram: Any = (counts.tolist(), edges.tolist())
            self._record({printable(name): wandb.Histogram(np_histogram=histogram)}, step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        """Record an image."""
        self._record({printable(name): wandb.Image(_picture(image.detach().cpu()))}, step)

    def close(self) -> None:
        """Finish the run. What could not be sent within the timeout stays in the run's directory, and that is said."""
        if self._run is None:
            return
        run, self._run, began = self._run, None, time.monotonic()
        # W&B writes on in a process of its own; of a sitting that is killed, only what is in its files is certain
        self._memory.write_text(json.dumps({"id": self.run_id, "step": self._newest[0], "names": sorted(self._newest[1])}))
        online = not run.offline
        run.finish()
        if online and time.monotonic() - began >= self.timeout:
            _said.warning(
                "W&B was lost, and did not take everything within %g s. It is kept: `wandb sync --no-skip-online %s` sends it.",
                *(self.timeout, Path(run.dir).parent),
            )

    def _record(self, row: dict[str, Any], step: int) -> None:
        before, names = self._before
        row = {name: value for name, value in row.items() if step > before or (step == before and name not in names)}
        if not row:
            return
        self._run.log(row, step=step)
        last, names = self._newest
        self._newest = (step, {*row, *names} if step == last else set(row))


def _closed_with(memory: Path, run_id: str) -> tuple[int, set[str]]:
    """The last step of the sitting before, with its names, if that was closed; -1 otherwise. Asked for once."""
    try:
        known = json.loads(memory.read_text())
        memory.unlink()
        return (int(known["step"]), set(known["names"])) if known["id"] == run_id else (-1, set())
    except (OSError, ValueError, KeyError, TypeError):
        return -1, set()


def _missing(path: Path, after: int, until: int) -> Iterator[tuple[int, dict[str, float]]]:
    """The values of a run's own log from the step `after` to `until`: what W&B may not have got."""
    if not path.exists() or until == 0:
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, TypeError, KeyError):  # a line that a crash cut short
            row = json.loads(line)
            if after <= (step := int(row["step"])) <= until:
                yield step, {name: float(value) for name, value in row.items() if name not in ("step", "time", "epoch")}


def _picture(image: Tensor) -> Any:
    if image.is_floating_point():
        image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    channels, height, width = image.shape
    pixels = bytes(image.permute(1, 2, 0).flatten().tolist())
    return Image.frombytes("L" if channels == 1 else "RGB", (width, height), pixels)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
