"""Turns of steps, one training after another, so that whatever else the machine does hits all alike."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import nn

from drivetrain import ConfigError, DrivetrainError, Trainer, TrainingConfig, is_installed, make_component
from drivetrain_bench.advice import Change, changes, name_of
from drivetrain_bench.loops import by_engine, by_hand, trainer
from drivetrain_bench.report import Advice, Report

RAW, BARE, WATCHED = "loop by hand", "engine, no callbacks", "engine, your callbacks"
_said = logging.getLogger("drivetrain.bench")


@frozen
class Speed:
    """One training's time.

    Attributes:
        seconds: of one step, in each turn.
        samples, tokens: in one step, of all processes; no tokens where batches have none.
        first: seconds of the first step, compilation included.
    """

    seconds: tuple[float, ...]
    samples: float
    tokens: float
    first: float

    @property
    def middle(self) -> float:
        """The median of `seconds`."""
        return statistics.median(self.seconds)

    def over(self, other: Speed) -> float:
        """How long a sample takes, the other's being 1: the median over turns that lie side by side."""
        return self.quartiles(other)[1]

    def quartiles(self, other: Speed) -> tuple[float, float, float]:
        """The lower one, the median and the upper one over these turns."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        ratios = [a / b * other.samples / self.samples for a, b in pairs]
        low, middle, high = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
        return low, middle, high


class Turns:
    """A training that is held open, from `begin` to `close`."""

    def __init__(self, made: Trainer, steps: Iterator[Any]) -> None:
        self.made, self._steps = made, steps
        self.seconds: list[float] = []
        self.first = 0.0

    def begin(self) -> None:
        """The first step, and the second: in that one drivetrain-throughput counts what torch does, whoever's step comes next."""
        self.first = self._timed(1)
        self.go(1)

    def take(self, count: int) -> None:
        """Some steps, with the device's work."""
        self.seconds.append(self._timed(count) / count)

    def go(self, count: int) -> None:
        """Some steps, as far as the host has to do with them."""
        for _ in range(count):
            if next(self._steps, None) is None:
                ctx = self.made.ctx
                raise DrivetrainError(
                    f"the run ended after {ctx.step} steps ({ctx.stop_reason}); measure fewer, or without that."
                )

    def _timed(self, count: int) -> float:
        began = time.perf_counter()
        self.go(count)
        self.made.ctx.run.devices.synchronize()
        return time.perf_counter() - began

    def close(self) -> None:
        """End it in good order; it may still save."""
        self._steps.close()  # type: ignore[attr-defined]

    def speed(self, per_step: tuple[float, float]) -> Speed:
        """What was measured; the first turn was to warm up."""
        return Speed(tuple(self.seconds[1:]), *per_step, self.first)


def bench(
    config: TrainingConfig,
    *,
    steps: int = 10,
    turns: int = 5,
    advice: bool = True,
    say: Callable[[str], None] = _said.info,
) -> Report:
    """Measure a configuration: a loop by hand, the engine alone, the engine with its callbacks, and changes that may be faster.

    Every training starts from the same weights and data. Nothing of it stays, and the configuration's runs are not touched.

    Args:
        config: one that names its model and data.
        steps: of one turn.
        turns: of each training; one more, before, is not counted.
        advice: whether to try changes.
        say: is told what is being measured.

    Raises:
        DrivetrainError: for whatever the run itself could not do, and with several processes.
    """
    if config.model is None or config.data is None:
        raise DrivetrainError("bench needs a configuration that names its model and its data, as `drivetrain train` does.")
    folder = Path(tempfile.mkdtemp(prefix="drivetrain-bench-"))
    try:
        with warnings.catch_warnings(), _quiet(say) as say:
            warnings.simplefilter("ignore")
            return _bench(config, steps, turns, advice, say, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _quiet(say: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Let what the callbacks print go nowhere; `say` still speaks as before."""
    out, err = sys.stdout, sys.stderr

    def aloud(text: str) -> None:
        with redirect_stdout(out), redirect_stderr(err):
            say(text)

    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield aloud


def _bench(config: TrainingConfig, steps: int, turns: int, advice: bool, say: Callable[[str], None], folder: Path) -> Report:
    say("the loop by hand, the engine, and the engine with your callbacks")
    made = {
        RAW: trainer(config, folder / "raw", False),
        BARE: trainer(config, folder / "bare", False),
        WATCHED: trainer(config, folder / "watched", True),
    }
    if made[BARE].ctx.strategy.world_size > 1:
        raise DrivetrainError("bench measures one process; start it without a launcher.")
    context = made[BARE].ctx
    facts: dict[str, Any] = {
        "device": context.run.devices.name,
        "precision": context.precision.name,
        "parameters": sum(p.numel() for p in made[BARE].model.parameters()),
        "torch": str(torch.__version__),
    }
    evaluates = config.eval_interval is not None and context.eval_batches != 0
    left_out = f"evaluation (eval_interval = {config.eval_interval}) and what callbacks do in it" if evaluates else ""
    convolves = any(isinstance(module, nn.Conv2d) for module in made[BARE].model.modules())
    speeds, losses = _take_turns(made, steps, turns)
    del made, context
    parts = _goodput(config, folder / "goodput", steps, turns, say)
    found = []
    waiting = parts.get("data wait", 0.0) / (sum(parts.values()) or 1.0)
    for change in changes(config, facts["precision"], facts["device"], waiting, convolves) if advice else ():
        say(f"with {change}")
        found.append(_try(config, change, steps, turns, folder / "trial"))
    return Report(facts, speeds, losses, parts, tuple(sorted(found, key=lambda row: -(row.gain or 0.0))), left_out)


def _take_turns(
    made: Mapping[str, Trainer], steps: int, turns: int, apart: bool = False
) -> tuple[dict[str, Speed], dict[str, float]]:
    """The speeds, and the losses of as many steps of each. Whatever comes between, all have ended when this returns: they may save in
    their end, which needs their folders.

    Args:
        made: by name; none of them has begun.
        steps: of one turn.
        turns: that count.
        apart: whether each has all its turns, and ends, before the next one begins.
    """
    running = {name: Turns(one, by_hand(one) if name == RAW else by_engine(one)) for name, one in made.items()}
    for together in [[turn] for turn in running.values()] if apart else [[*running.values()]]:
        with ExitStack() as ends:
            for turn in together:
                ends.callback(turn.close)
                turn.begin()
            for first in (index % len(together) for index in range(turns + 1)):
                for turn in together[first:] + together[:first]:
                    turn.take(steps)
    gc.collect()
    engines = [name for name in made if name != RAW]  # which count their samples
    losses = {name: float(made[name].ctx.loss_tensor or 0.0) for name in engines}
    return {name: running[name].speed(_per_step(made[engines[0] if name == RAW else name])) for name in made}, losses


def _per_step(made: Trainer) -> tuple[float, float]:
    """Samples and tokens of a step, as the engine counts them."""
    ctx = made.ctx
    done = max(1, ctx.step + ctx.skipped_steps)
    return ctx.samples / done, ctx.tokens / done


def _goodput(config: TrainingConfig, folder: Path, steps: int, turns: int, say: Callable[[str], None]) -> dict[str, float]:
    """Seconds by part of the steps after the warm-up, with the configuration's callbacks; what they do once, at the begin and the end,
    does not count. Empty when drivetrain-goodput is not installed."""
    if not is_installed("callback", "goodput"):
        return {}
    say("where the time goes")
    clock: Any = make_component("callback", {"use": "goodput", "show": False})
    others = [one for one in config.callbacks if name_of(one) != "goodput" and not isinstance(one, type(clock))]
    made = trainer(config, folder, True, own=[clock], callbacks=others)
    with closing(Turns(made, by_engine(made))) as running:
        running.begin()
        running.take(steps)
        clock.on_run_end(made.ctx)  # it accounts for what comes now as for another sitting
        clock.on_run_start(made.ctx)
        running.go(steps * turns)
        clock.on_run_end(made.ctx)  # before the others' end
    parts = json.loads((folder / "goodput.json").read_text(encoding="utf-8"))["sittings"][-1]["parts"]
    return {name: seconds for name, seconds in parts.items() if name != "start"}


def _try(config: TrainingConfig, change: Change, steps: int, turns: int, folder: Path) -> Advice:
    """One change against the configuration as it is, with its callbacks, in turns.

    Where one of the two has worker processes, not in turns but one after the other: workers would go on fetching while the other
    training has its turn, and give what looks like a gain. What else the machine does then may hit one of them only.
    """
    try:
        made = {
            "as it is": trainer(config, folder / "base", True),
            "changed": trainer(config, folder / "changed", True, **change.keys),
        }
        apart = any(one.config.dataloader.num_workers > 0 for one in made.values())
        speeds, losses = _take_turns(made, steps, turns, apart)
    except Exception as error:  # whatever a change breaks is said beside it; the others are still of use
        why = "; ".join(map(str, error.problems)) if isinstance(error, ConfigError) else str(error).partition("\n")[0]
        return Advice(str(change), None, f"fails: {type(error).__name__}: {why[:150]}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what many trials save would fill a disk
        gc.collect()
    low, gain, high = speeds["as it is"].quartiles(speeds["changed"])
    notes = [change.note] if change.note else []
    if change.rounds:
        notes.append(f"loss {losses['changed']:.3f} instead of {losses['as it is']:.3f} after as many steps")
    if (extra := speeds["changed"].first - speeds["as it is"].first) > 1:
        notes.append(f"the first step takes {extra:.0f} s longer")
    return Advice(str(change), gain, "; ".join(notes), (low, high))
