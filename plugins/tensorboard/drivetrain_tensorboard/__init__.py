"""TensorBoard: a tracker for the logging callback."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from drivetrain import Tracker, component, option
from drivetrain.tracking import printable

if TYPE_CHECKING:
    from torch import Tensor

    from drivetrain import CallbackContext

__all__ = ["TensorboardTracker"]


@component
class TensorboardTracker(Tracker):
    """Write TensorBoard event files to `tensorboard/` in the run's directory: scalars, texts, histograms and images under their names,
    and the configuration as text and as hyperparameters (tab HPARAMS, where runs are compared).

    Look at them with `tensorboard --logdir RUN_DIRECTORY`. After a resume from step S the board hides what an earlier sitting
    wrote beyond S. Values reach the disk within a second or two.
    """

    compared_by: list[str] = option(
        factory=lambda: ["train/loss", "eval/loss"], help="metrics that the HPARAMS tab shows beside the hyperparameters"
    )

    _folder: str = attrs.field(default="", init=False, repr=False)
    _writer: Any = attrs.field(default=None, init=False, repr=False)

    def start(self, ctx: CallbackContext) -> None:
        """Open a new event file beside those of earlier sittings."""
        self._folder = str(ctx.run_dir / "tensorboard")
        self._open(ctx.step + 1 if ctx.step else 0)

    def _open(self, purge: int) -> None:
        _next_second(Path(self._folder))
        # TensorBoard hides what earlier files hold from this step on: steps that are run again, or all if the run begins anew.
        # A thread writes; it would keep events for two minutes, and flushing them here would cost a log a millisecond.
        self._writer = SummaryWriter(self._folder, purge_step=purge, max_queue=1000, flush_secs=1)

    def rewind(self, step: int) -> None:
        """Open a new event file that hides what the others have beyond `step`."""
        self.close()
        self._open(step + 1)

    def config(self, values: Mapping[str, Any], step: int) -> None:
        """Record the configuration as text, and flat as hyperparameters."""
        super().config(values, step)
        for summary in hparams(dict(_flat(values, "")), dict.fromkeys(self.compared_by, 0)):
            self._writer.file_writer.add_summary(summary, step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record scalars."""
        for name, value in values.items():
            self._writer.add_scalar(printable(name), value, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Record a text, shown as it is."""
        block = "\n".join(f"    {line}" for line in text.splitlines())  # four spaces: preformatted in markdown
        self._writer.add_text(printable(name), block, step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Record the distribution of the finite values; a histogram has no place for others."""
        kept = values.detach().float().flatten()
        kept = kept[kept.isfinite()]
        if len(kept):
            self._writer.add_histogram(printable(name), kept.cpu(), step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        """Record an image."""
        self._writer.add_image(printable(name), image.detach().cpu(), step)

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None


def _next_second(folder: Path) -> None:
    """Wait until a new file's name sorts behind all others. Names begin with the second, and TensorBoard reads in the order of names:
    of two files of one second it might take the older for the newer."""
    newest = max((path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")), default="")
    while newest == f"{int(time.time()):010d}":
        time.sleep(0.01)


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Nested plain data as names with dots; what the board cannot show as text, and "true" and "false", which it takes for numbers."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        shown = str(value).lower() if isinstance(value, bool) else value
        yield name, shown if isinstance(shown, (int, float, str)) else str(shown)
