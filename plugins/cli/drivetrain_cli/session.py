"""One sitting of a training from the command line. This module imports torch; the commands import it when they run."""

from __future__ import annotations

import sys

from drivetrain import Callback, CallbackContext, Trainer, TrainingConfig, TrainOutput, component, hook
from drivetrain_cli.interrupt import Interruptible
from drivetrain_cli.names import SAVED_CONFIG
from drivetrain_cli.requests import Requests
from drivetrain_cli.summary import banner, how_to_go_on, steps, summary
from drivetrain_cli.terminal import clean, shown_path, wrapped

PREEMPTED = 75  # EX_TEMPFAIL: run the same command again


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
        else:
            ctx.config.save(ctx.run_dir / SAVED_CONFIG)


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
