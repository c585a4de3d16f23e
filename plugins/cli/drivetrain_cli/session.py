"""One sitting of a training from the command line. This module imports torch; the commands import it when they run."""

from __future__ import annotations

import errno
import os
import secrets
import sys
from pathlib import Path

from drivetrain import Callback, CallbackContext, Trainer, TrainingConfig, TrainOutput, component, hook
from drivetrain_cli.interrupt import Interruptible
from drivetrain_cli.names import SAVED_CONFIG
from drivetrain_cli.requests import Requests
from drivetrain_cli.summary import banner, how_to_go_on, steps, summary
from drivetrain_cli.terminal import clean, shown_path, wrapped

PREEMPTED = 75  # EX_TEMPFAIL: run the same command again


_SAID = ("resume", "resume_changed", "run_name", "output_dir")  # in the banner, or by the command itself


@component
class Beginning(Callback):
    """Says which run begins and keeps its configuration beside it, for `drivetrain resume`."""

    began_at = 0  # the step; not an option, and not a state, since each sitting has its own

    @hook(tryfirst=True)
    def on_run_start(self, ctx: CallbackContext) -> None:
        """Print the banner. A run that goes on keeps the configuration it began with."""
        self.began_at = ctx.step
        if not ctx.is_main:
            return
        print(wrapped(banner(ctx), sys.stderr), file=sys.stderr)
        if ctx.resumed:
            print(f"going on after step {ctx.step}", file=sys.stderr)
            for change in ctx.trainer.resume_changes:
                if change.verdict == "safe" and change.key not in _SAID:  # the others have been warned of
                    print(clean(f"  changed: {change}"), file=sys.stderr)
        else:
            _keep(ctx.config, ctx.run_dir / SAVED_CONFIG)


def _keep(config: TrainingConfig, path: Path) -> None:
    """Write the configuration so that a crash leaves the whole file or none: `drivetrain resume` needs it."""
    for leftover in path.parent.glob(f".{'[0-9a-f]' * 16}-{path.name}"):
        leftover.unlink(missing_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}-{path.name}")
    try:
        config.save(temporary)
        _make_durable(temporary)
        os.replace(temporary, path)
        _make_durable(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _make_durable(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that do without
            raise
    finally:
        os.close(descriptor)


def train(config: TrainingConfig) -> int:
    """Train, say how it went, and return the exit code."""
    beginning = Beginning()
    trainer = Trainer(None, config, callbacks=[beginning, Requests()])
    with Interruptible(trainer.stop, speaks=trainer.ctx.is_main):
        try:
            output = trainer.train()
        except Exception as error:
            if trainer.output.checkpoint is not None:
                error.add_note(how_to_go_on(trainer.output))
            raise
    if trainer.ctx.is_main:
        print(_closing(output, beginning.began_at), flush=True)
    trainer.ctx.strategy.barrier()  # launchers end all processes soon after the first: leave together
    return 0 if output.completed else PREEMPTED


def _closing(output: TrainOutput, began_at: int) -> str:
    if output.completed and output.steps == began_at:
        where = f"; see {shown_path(output.run_dir)}" if output.run_dir else ""
        return f"the run was already complete: {clean(output.stop_reason)} ({steps(output)}){where}"
    return summary(output) if output.completed else f"{summary(output)}\n{how_to_go_on(output)}"
