"""`drivetrain export`: a trained model as files that other programs load."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain import DrivetrainError, load_training_config

if TYPE_CHECKING:
    import torch
    from torch import nn

    from drivetrain import Trainer

SAVED_CONFIG = "config.json"
_DTYPES = ("bf16", "fp16", "fp32")


class Export:
    """Write the model of a run, from its newest checkpoint, as a directory of safetensors files."""

    help = "write the model of a run as safetensors, with its adapters merged if wanted"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("run_dir", metavar="RUN", type=Path, help="the run's directory, such as runs/tidy-otter")
        parser.add_argument(
            "out",
            metavar="OUT",
            type=Path,
            nargs="?",
            help="the directory to write, which must not exist or be empty; by default RUN/merged with --merge, else RUN/exported",
        )
        parser.add_argument(
            "--merge", action="store_true", help="write the whole model with the adapters' effect in its weights"
        )
        parser.add_argument("--dtype", choices=_DTYPES, help="type of merged weights; by default bf16")

    def run(self, arguments: argparse.Namespace) -> int:
        """Rebuild the run's model, load its newest checkpoint, and write."""
        out: Path = arguments.out or arguments.run_dir / ("merged" if arguments.merge else "exported")
        if arguments.dtype and not arguments.merge:
            raise DrivetrainError("--dtype goes with --merge: without it, weights are written as they were trained.")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DrivetrainError(f"{out} exists and is not an empty directory; give another one.")
        trainer, step = restored(arguments.run_dir)
        model: Any = trainer.model
        if arguments.merge:
            from drivetrain_qlora.mode import merge

            model = merge(model, dtypes()[arguments.dtype or "bf16"])
        write(trainer, model, out)
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        print(
            f"{'merged model' if arguments.merge else 'model'} of step {step} of {arguments.run_dir}: {size / 1e6:.1f} MB in {out}"
        )
        return 0


def dtypes() -> Mapping[str, torch.dtype]:
    """torch's types by our names."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def restored(run_dir: Path) -> tuple[Trainer, int]:
    """A trainer with a run's model as its newest checkpoint has it, and that checkpoint's step. The data are not touched.

    Raises:
        DrivetrainError: when the directory is no run of the command line, or has no checkpoint.
    """
    file = run_dir.absolute() / SAVED_CONFIG
    if not file.is_file():
        raise DrivetrainError(
            f"{run_dir} is no run of drivetrain train (no {SAVED_CONFIG}). A model trained from Python is saved from there: "
            "drivetrain_qlora.merge(trainer.model).save_pretrained(…)."
        )
    from drivetrain import Trainer

    config = load_training_config(file)
    config.output_dir, config.run_name = file.parent.parent, file.parent.name  # it may have been moved
    config.data = config.eval_data = None
    config.distributed, config.resume_changed = "none", "allow"  # it is another run, with the same weights
    config.dataloader.num_workers, config.dataloader.drop_last = 0, False
    trainer = Trainer(None, config, train_dataset=[{}], scheduler=lambda position: 1.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the run goes on with changes")
        step = trainer.restore("auto")
    if not step:
        raise DrivetrainError(f"{run_dir} has no checkpoint, so there is nothing to export.")
    return trainer, step


def write(trainer: Trainer, model: nn.Module, out: Path) -> None:
    """Write a model in its own format: by the model component's `save`, `save_pretrained`, or as one safetensors file."""
    builder: Any = trainer.config.components({"data"}).single.get("model")
    own: Any = getattr(model, "save_pretrained", None)
    out.mkdir(parents=True, exist_ok=True)
    if callable(getattr(builder, "save", None)):
        builder.save(model, out)
    elif callable(own):
        own(out)
    else:
        from safetensors.torch import save_model

        save_model(model, str(out / "model.safetensors"))
