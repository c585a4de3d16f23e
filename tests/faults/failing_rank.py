"""What each process of the failure table runs: `failing_rank.py FOLDER HOW WHERE RANK`. One of them fails once; the rerun does not."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from drivetrain import Callback, CallbackContext, CheckpointCallback, Precision, Trainer, TrainingConfig

AT = 4  # the step in, or after, which it fails
ERROR = "the data went away"


class Fault:
    """Happens at most once for a folder."""

    def __init__(self, folder: Path, how: str, where: str, is_mine: bool) -> None:
        self.mark, self.how, self.where, self.is_mine = folder / "happened", how, where, is_mine

    def at(self, where: str, after: float = 0.0) -> None:
        if not self.is_mine or where != self.where or self.mark.exists():
            return
        self.mark.write_text(str(time.time() + after))
        if after:  # while this thread waits in a collective
            threading.Timer(after, self.happen).start()
        else:
            self.happen()

    def happen(self) -> None:
        if self.how == "raise":
            raise RuntimeError(ERROR)
        if self.how == "exit":
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL if self.how == "kill" else signal.SIGSTOP)


class Model(nn.Module):
    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.line, self.fault, self.step = nn.Linear(4, 1), fault, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.step == AT:
            self.fault.at("forward")
            if self.fault.where == "reduction" and self.fault.how != "raise":
                self.fault.at("reduction", after=0.7)
                time.sleep(0 if self.fault.is_mine else 2.0)  # so that the one that fails is waiting for this one
        out = self.line(x)
        if self.training and self.step == AT and out.requires_grad:
            out.register_hook(lambda _: self.fault.at("reduction"))  # a hook's error comes out of backward
        return out


class Acts(Callback):
    def __init__(self, fault: Fault, model: Model) -> None:
        self.fault, self.model, self.now = fault, model, 0

    def on_step_start(self, ctx: CallbackContext) -> None:
        self.model.step = ctx.step

    def on_run_start(self, ctx: CallbackContext) -> None:
        """Let the fault happen where the ranks ask each other whether to stop."""
        meet = ctx.strategy.meet

        def at_the_vote(wanted: bool) -> bool:
            if ctx.step == AT:
                self.fault.at("vote")
            return meet(wanted)

        ctx.strategy.meet = at_the_vote  # type: ignore[method-assign]

    def on_step_end(self, ctx: CallbackContext) -> None:
        self.now = ctx.step
        if self.fault.where == "vote" and self.now == AT and not self.fault.is_mine and not self.fault.mark.exists():
            ctx.stop("enough")

    def on_evaluate_batch(self, ctx: CallbackContext) -> None:
        if ctx.step == AT:
            self.fault.at("evaluation")

    def state_dict(self) -> dict[str, int]:
        if self.now == AT:
            self.fault.at("saving")
        return {"now": self.now}

    def load_state_dict(self, saved: object) -> None:
        pass


def main(folder: Path, how: str, where: str, rank: int) -> None:
    strategy = "mpi" if "OMPI_COMM_WORLD_RANK" in os.environ else os.environ.get("STRATEGY", "ddp")
    mine = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("RANK", "0")))
    (folder / f"pid-{mine}").write_text(str(os.getpid()))
    torch.manual_seed(0)
    model = Model(Fault(folder, how, where, mine == rank))
    data = TensorDataset(torch.rand(64, 4), torch.rand(64, 1))
    config = TrainingConfig(
        max_duration="8st",
        per_device_batch_size=4,
        eval_interval="2st",
        output_dir=folder,
        run_name="a",
        standard_callbacks=False,
        distributed={"use": strategy, "timeout": float(os.environ.get("TIMEOUT", "8"))},
    )
    parts = {"optimizer": torch.optim.AdamW(model.parameters(), lr=0.1), "precision": Precision(), "loss": nn.MSELoss()}
    callbacks = [Acts(model.fault, model), CheckpointCallback(every="2st", keep_last=None)]
    output = Trainer(model, config, data, data, callbacks=callbacks, **parts).train()
    assert output.completed
    if mine == 0:
        torch.save(model.state_dict(), folder / "final.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
