"""The loss of a causal language model as a sum over tokens with its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from drivetrain import Loss, ModelError

IGNORED = -100  # the label of a token that does not count, as in `F.cross_entropy`


def summed_cross_entropy(logits: Tensor, labels: Tensor, vocab_size: int | None = None, **_unused: Any) -> Loss:
    """Cross entropy of each next token, summed, with the number of tokens it is a sum of.

    Has the signature of transformers' loss functions, so that a model can be given it as `model.loss_function`: then its
    outputs carry a `Loss` where its own function gives the mean over the microbatch, which accumulation cannot weight.

    Args:
        logits: [batch, time, vocabulary], in any type; summed in fp32.
        labels: int64 [batch, time], not shifted: `labels[:, t]` is predicted by `logits[:, t - 1]`; -100 does not count.
        vocab_size: not used; some models, such as Gemma 2 and Mixtral, give it by position.

    Returns:
        `Loss(total, weight)`: nats, and the number of labels other than -100 after the shift.
    """
    wanted = F.pad(labels[:, 1:], (0, 1), value=IGNORED).to(logits.device)  # pads instead of cutting: the logits stay one block
    total = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
    return Loss(total, (wanted != IGNORED).sum())


def token_loss(outputs: Any, batch: Mapping[str, Any]) -> Loss:
    """The loss of any causal language model of transformers as `Loss(total, weight)`, for `Trainer(model, ..., loss=token_loss)`.

    The models' own `.loss` is a mean over the tokens of the microbatch; with several microbatches of unequal numbers of tokens
    a mean of such means is not the loss of the whole batch.

    Raises:
        ModelError: when there is nothing to compute it from.
    """
    loss = getattr(outputs, "loss", None)
    if isinstance(loss, Loss):
        return loss
    logits, labels = getattr(outputs, "logits", None), batch.get("labels")
    if logits is None or labels is None:
        missing = "the batch has no 'labels'" if labels is None else f"{type(outputs).__name__} has no logits"
        raise ModelError(f"transformers: the loss needs the model's logits and the batch's labels, but {missing}.")
    return summed_cross_entropy(logits, labels)
