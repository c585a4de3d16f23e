"""What a training says about itself: one line before it, a few after it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from drivetrain import __version__
from drivetrain_cli.terminal import bold, clean, shown_path

if TYPE_CHECKING:
    from torch import nn

    from drivetrain import CallbackContext, Trainer, TrainOutput

_SHOWN_ELSEWHERE = (
    "precision:",
    "strategy:",
    "callback:Beginning",
    "callback:Requests",
)  # with the device and the processes; this program's own


def banner(ctx: CallbackContext) -> str:
    """One line with everything that decides how a run goes: name, device, precision, processes, size and plugins."""
    run = f"run {bold(clean(ctx.config.run_name), sys.stderr)}"
    name, reason = ctx.precision.name, ctx.precision.reason
    precision = reason if reason.startswith(name) else f"{name}: {reason}"
    parts = [f"drivetrain {__version__}", run, clean(f"{ctx.device} ({precision})")]
    if ctx.strategy.world_size > 1:
        why = ctx.strategy.reason.partition(" since ")[2]
        parts.append(clean(f"{ctx.strategy.world_size} processes ({ctx.strategy.name}{': ' if why else ''}{why})"))
    return " · ".join([*parts, parameters(ctx.trainer.model), f"plugins: {', '.join(_plugins(ctx.trainer))}"])


def parameters(model: nn.Module) -> str:
    """How many parameters a model has, and which part of them is trained when it is not all: "0.87 M parameters"."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, is_trained in sizes if is_trained)
    part = "" if trained == total else f" ({100 * trained / total:.2g} % trained)"
    return f"{_count(total)} parameters{part}"


def _count(number: int) -> str:
    for unit, size, from_ in (("B", 1e9, 1e9), ("M", 1e6, 1e5), ("k", 1e3, 1e3)):
        if number >= from_:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _plugins(trainer: Trainer) -> list[str]:
    return [clean(name.partition(":")[2]) for name in trainer.plugins() if not name.startswith(_SHOWN_ELSEWHERE)]


def summary(output: TrainOutput) -> str:
    """Why the run ended, its result, and where everything is."""
    word = "done" if output.completed else "stopped"
    took = f"{steps(output)}, {duration(output.seconds)}"
    lines = [f"{bold(word, sys.stdout)}: {clean(output.stop_reason)} ({took})"]
    lines += [f"  {line}" for line in _aligned([*_results(output.metrics), *_places(output)])]
    return "\n".join(lines)


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def _results(metrics: dict[str, float]) -> Iterator[tuple[str, str]]:
    """The values of the last evaluation; without one, the last training loss."""
    chosen = {name: value for name, value in metrics.items() if name.startswith("eval/")}
    if not chosen and "train/loss" in metrics:
        chosen = {"train/loss": metrics["train/loss"]}
    yield from ((clean(name), f"{value:.4g}") for name, value in chosen.items())


def _places(output: TrainOutput) -> Iterator[tuple[str, str]]:
    if output.run_dir is None:
        return
    yield "run directory", shown_path(output.run_dir)
    if output.checkpoint is not None:
        yield "checkpoint", shown_path(output.checkpoint)
    if (metrics := output.run_dir / "metrics.jsonl").is_file():
        yield "metrics", shown_path(metrics)
    if any(output.run_dir.rglob("events.out.tfevents.*")):
        yield "curves", f"tensorboard --logdir {shown_path(output.run_dir)}"


def how_to_go_on(output: TrainOutput) -> str:
    """What to do after an interruption."""
    if output.run_dir is None or output.checkpoint is None:
        return "no checkpoint was saved, so the same command begins anew (see: drivetrain plugins show checkpoint)"
    return f"go on with: drivetrain resume {shown_path(output.run_dir)}"


def steps(output: TrainOutput) -> str:
    """How many steps the run has taken: "1 step", "1600 steps"."""
    return f"{output.steps} step{'s' if output.steps != 1 else ''}"


def duration(seconds: float) -> str:
    """Seconds as "4.2 s", "1:38" or "2:05:07"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
