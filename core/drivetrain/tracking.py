"""Where a run's values go: the interface of trackers (kind `tracker`), so that nobody who writes one depends on a plugin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from drivetrain.components import Component, component

if TYPE_CHECKING:
    from torch import Tensor

    from drivetrain.context import CallbackContext


@component
class Tracker(Component):
    """Base of trackers: a file, a board, a server. The logging callback makes them, and calls them on rank 0 only.

    `start` comes first and `close` last, once each in a sitting; the rest in between, in the order of the steps. What `start`
    raises ends the run before it trains. What the other methods raise is said once and training goes on, so let errors out.
    The fields made with `state()` are saved with the run and restored before `start`: the place for a server's run id.
    """

    kind: ClassVar[str] = "tracker"

    def start(self, ctx: CallbackContext) -> None:
        """Open the tracker. After a resume (`ctx.resumed`) what it already holds beyond `ctx.step` is to be taken back."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record values under their names ("train/loss", "eval/accuracy"). A step may come twice, with different names."""
        raise NotImplementedError(f"{type(self).__name__} must define log(values, step)")

    def rewind(self, step: int) -> None:
        """The run goes back to `step`, and will train the steps behind it anew: take back what is recorded beyond, or, where that
        cannot be, leave out what will be repeated. No step may be there twice."""

    def config(self, values: Mapping[str, Any], step: int) -> None:
        """Record the run's configuration, nested plain data without its secrets; by default as a text."""
        self.text("config", json.dumps(values, indent=2, default=str), step)

    def text(self, name: str, text: str, step: int) -> None:
        """Record a text. A tracker that cannot show texts leaves this out."""

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Record the distribution of a tensor's values. A tracker that cannot show it leaves this out."""

    def image(self, name: str, image: Tensor, step: int) -> None:
        """Record an image: (channels, height, width), 1 or 3 channels, floats from 0 to 1 or bytes. May be left out as well."""

    def close(self) -> None:
        """Write what is left and let go of files and connections. Called whether the run went well or not."""


def printable(name: str) -> str:
    """A text in which newlines, escape codes and whatever else a page or a terminal would act on are written as `\\x1b` and so on."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in name)
