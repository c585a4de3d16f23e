"""What one process of the tests of sharded training does: train one small language model as told, and write down what came out."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from drivetrain import Callback, CallbackContext, DrivetrainError, Trainer, TrainingConfig
from drivetrain.cluster import detect

WORLD, RANK = detect().world_size, detect().rank


def gpt(**given: Any) -> nn.Module:
    from drivetrain_lm.model import GPT

    torch.manual_seed(1)
    made = GPT(**{"layers": 2, "heads": 2, "width": 32, "context": 16, "vocab_size": 64} | given)
    for parameter in made.parameters():  # its branches end in zeros: what is inside would get no gradient in the first step
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return made


def llama(**given: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads | given))


def rows(n: int = 40, unequal: bool = True) -> list[dict[str, torch.Tensor]]:
    """Sequences of 16 tokens, with unequal numbers of targets for models that give `Loss(total, weight)`."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for row in range(n):
        ids = torch.randint(0, 64, (16,), generator=generator)
        labels = ids.roll(-1)
        labels[4 + row % 12 if unequal else 12 :] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def whole(tensors: Any) -> list[float]:
    """The values of all tensors; sharded ones are put together, in which every rank takes part."""
    return torch.cat(
        [(t.full_tensor() if hasattr(t, "full_tensor") else t).detach().float().reshape(-1) for t in tensors]
    ).tolist()


def digest(ctx: CallbackContext) -> str:
    """A hash of every bit of weights and optimizer state, as a checkpoint has them; on rank 0."""
    state, found = ctx.state_dict(), hashlib.sha256()
    if ctx.is_main:
        for path, value in tree_flatten_with_path((state["model"], state["optimizer"]["state"]))[0]:
            data = value.contiguous().view(-1).view(torch.uint8) if isinstance(value, Tensor) else value
            found.update(f"{path} {data.tolist() if isinstance(data, Tensor) else data}".encode())
    return found.hexdigest()


class Record(Callback):
    """Losses, gradient norms, and which samples each step saw."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.samples: list[list[int]] = []
        self.at_start = ""

    def on_run_start(self, ctx: CallbackContext) -> None:
        self.at_start = digest(ctx)

    def on_step_start(self, ctx: CallbackContext) -> None:
        assert ctx.sample_order is not None
        self.samples.append(ctx.sample_order.step(ctx.epoch, ctx.step_in_epoch).tolist())

    def on_log(self, ctx: CallbackContext) -> None:
        self.losses.append(ctx.metrics["train/loss"])
        self.norms.append(ctx.metrics.get("train/grad_norm", 0.0))


def run(model: nn.Module, record: Record, *, data_ranks: int = WORLD, batch: int = 8, **given: Any) -> Trainer:
    """Train six steps on global batches of 8 in 2 microbatches of each rank, unless told otherwise."""
    settings: dict[str, Any] = {
        "max_duration": "6st",
        "per_device_batch_size": batch // data_ranks // 2,
        "gradient_accumulation_steps": 2,
        "standard_callbacks": False,
        "log_interval": "1st",
        "max_grad_norm": 0.5,
        "precision": "fp32",
        "scheduler": "constant",
        "optimizer": {"use": "adamw", "lr": 0.01},
        "eval_interval": False,
        "dataloader": {"shuffle": True},
    }
    callbacks = [record, *given.pop("callbacks", ())]
    data = rows(unequal=not hasattr(model, "config"))  # models of transformers give a mean
    trainer = Trainer(model, TrainingConfig(**settings | given), data, callbacks=callbacks)
    trainer.train()
    return trainer


def one(model: str = "gpt", sizes: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
    """One training; what is wrong with its configuration is a result too."""
    record = Record()
    try:
        trainer = run(MODELS[model](**sizes or {}), record, **given)
    except DrivetrainError as error:
        return {"error": str(error)}
    parameters = list(trainer.ctx.model.parameters())
    state = trainer.ctx.strategy.model_state(trainer.ctx.model)
    return {
        "at_start": record.at_start,
        "at_end": digest(trainer.ctx),
        "checkpoint": str(trainer.ctx.checkpoint_path),
        "losses": record.losses,
        "norms": record.norms,
        "samples": record.samples,
        "weights": whole(state.values()) if state else [],
        "local": [list(getattr(p, "_local_tensor", p).shape) for p in parameters],
    }


MODELS = {"gpt": gpt, "llama": llama}

if __name__ == "__main__":
    found = {name: one(**arguments) for name, arguments in json.loads(sys.argv[2]).items()}
    if RANK == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
