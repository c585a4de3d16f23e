"""Changes of a configuration that may be faster. Which of them are is measured, not guessed."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

from attrs import frozen

from drivetrain import TrainingConfig, is_installed

_SHORT_OF_DATA = 0.02  # of the time spent waiting for data: from here on workers are tried


@frozen
class Change:
    """Keys of a configuration with other values.

    Attributes:
        text: as one would write it in a file.
        rounds: whether the training computes in other numbers.
        note: what else it changes.
    """

    text: str
    keys: dict[str, Any]
    rounds: bool = False
    note: str = ""

    def __str__(self) -> str:
        return self.text


def changes(config: TrainingConfig, precision: str, device: str, waiting: float, convolves: bool = False) -> Iterator[Change]:
    """What is worth trying.

    Args:
        config: the configuration as it is.
        precision: the one that it resolves to.
        device: "cpu", or an accelerator's name.
        waiting: the part of the time spent waiting for data.
        convolves: whether the model has 2-D convolutions.
    """
    callbacks = set(map(name_of, config.callbacks))
    if precision in ("fp32", "tf32") and is_installed("precision", "bf16"):
        yield Change('precision = "bf16"', {"precision": "bf16"}, rounds=True)
    if precision == "fp32" and device != "cpu" and is_installed("precision", "tf32"):
        yield Change('precision = "tf32"', {"precision": "tf32"}, rounds=True)
    if precision in ("bf16", "fp16") and device == "cpu" and is_installed("precision", "fp32"):  # emulated there, often
        yield Change('precision = "fp32"', {"precision": "fp32"}, rounds=True)
    if not config.compile:
        yield Change("compile = true", {"compile": True}, rounds=True)
    if convolves and not config.channels_last:
        yield Change("channels_last = true", {"channels_last": True}, rounds=True)
    if device != "cpu" and is_installed("callback", "cuda_graphs") and "cuda_graphs" not in callbacks:
        more = [*config.callbacks, "cuda_graphs"]
        yield Change('callbacks = [..., "cuda_graphs"]', {"callbacks": more}, note="takes more memory")
    if config.activation_checkpointing:
        yield Change("activation_checkpointing = false", {"activation_checkpointing": False}, note="takes more memory")
    yield from _batches(config)
    if "workers_finder" in callbacks:  # their number is its business
        return
    if waiting > _SHORT_OF_DATA and config.dataloader.num_workers < (cores := os.cpu_count() or 1):
        for count in sorted({min(2, cores), min(8, cores)}):
            loader = copy.copy(config.dataloader)
            loader.num_workers = count
            yield Change(f"dataloader.num_workers = {count}", {"dataloader": loader})


def name_of(spec: Any) -> str:
    """The name by which a callback was asked for; "" for a ready object."""
    return str(spec.get("use")) if isinstance(spec, dict) else spec if isinstance(spec, str) else ""


def _batches(config: TrainingConfig) -> Iterator[Change]:
    """The same step in half as many microbatches; without accumulation, twice the samples in a step."""
    size, count = config.per_device_batch_size, config.gradient_accumulation_steps
    if config.global_batch_size is not None:
        if config.global_batch_size % (2 * size) == 0:
            yield Change(f"per_device_batch_size = {2 * size}", {"per_device_batch_size": 2 * size}, note="the same step")
    elif count % 2 == 0:
        keys = {"per_device_batch_size": 2 * size, "gradient_accumulation_steps": count // 2}
        text = f"per_device_batch_size = {2 * size}, gradient_accumulation_steps = {count // 2}"
        yield Change(text, keys, note="the same step")
    else:
        note = "gain for each sample; steps of twice the samples want another learning rate"
        yield Change(f"per_device_batch_size = {2 * size}", {"per_device_batch_size": 2 * size}, note=note)
