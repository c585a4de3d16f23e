"""A small GPT: pre-norm RMSNorm, rotary positions, causal attention, SwiGLU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drivetrain import Component, ConfigError, Loss, ModelError, Problem, component, option
from drivetrain_lm.loss import IGNORED, linear_cross_entropy

if TYPE_CHECKING:
    from drivetrain import CallbackContext

BYTES = 256
_MANY = 2**25  # logits, from where on they are computed in parts: 128 MiB in fp32, and as much again for each copy
_COLD = 1e-30  # where logits divided by it could be more than fp32 holds; the likeliest token it is long before
_AT_ONCE, _LEAST_ROWS = 2**23, 256  # logits of a part, and rows: with fewer the products are slow


class GPT(nn.Module):
    """A decoder-only transformer.

    Sources: RMSNorm, Zhang and Sennrich 2019 (arXiv:1910.07467, eq. 4); rotary positions, Su et al. 2021 (arXiv:2104.09864,
    eq. 34); SwiGLU, Shazeer 2020 (arXiv:2002.05202, eq. 6); branches that end in zeros, Zhang et al. 2019 (arXiv:1901.09321).

    Args:
        layers: number of blocks.
        heads: attention heads in each block; must divide `width` into even parts.
        width: size of the residual stream.
        context: the longest sequence it can take, in tokens.
        vocab_size: number of tokens; 256 for bytes.
        dropout: probability of dropping in training, on the embedding, the attention weights and each block's two branches.
        tied: share one matrix between the embedding and the output.
        loss_in_parts: compute the loss, and its gradients with it, some rows at a time: True, False, or None for where there are
            more than 33 million logits. Same numbers but for rounding, no second derivatives; see `linear_cross_entropy`.
    """

    # how the layers can be divided among processes, in transformers' words; qkv is three matrices in one, gate_up two
    tensor_parallel_plan: ClassVar[dict[str, str]] = {
        "blocks.*.qkv": "colwise:3",
        "blocks.*.attention_out": "rowwise",
        "blocks.*.gate_up": "colwise:2",
        "blocks.*.down": "rowwise",
        "head": "colwise_gather_output",
    }

    def __init__(
        self,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        context: int = 128,
        vocab_size: int = BYTES,
        dropout: float = 0.0,
        tied: bool = False,
        loss_in_parts: bool | None = None,
    ) -> None:
        super().__init__()
        self.context, self.vocab_size, self.loss_in_parts = context, vocab_size, loss_in_parts
        self.embedding = nn.Embedding(vocab_size, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocab_size, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        cos, sin = rotary_table(context, width // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        """Variance 1 / fan-in inside the blocks, whose branches end in zeros: each block begins as the identity."""
        for name, module in self.blocks.named_modules():
            if name.endswith((".attention_out", ".down")):
                nn.init.zeros_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
        nn.init.normal_(self.embedding.weight, std=0.2)  # on bytes better than 0.02 and 1 by a tenth of a bit after 400 steps
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor | Loss:
        """Predict the next token at every position.

        Args:
            input_ids: tokens, int64 [batch, time] with time ≤ `context`.
            labels: the token that follows each position, int64 [batch, time]; -100 where a position does not count.

        Returns:
            Logits [batch, time, vocab_size]; with `labels` the `Loss`: summed cross entropy in nats, and the number of labels
            that count.
        """
        time = input_ids.shape[1]
        if time > self.context:
            raise ModelError(
                f"the input has {time} tokens, the model takes {self.context}: raise model.context or shorten the data."
            )
        x = self.dropout(self.embedding(input_ids))
        cos, sin = self.get_buffer("cos")[:time], self.get_buffer("sin")[:time]
        for block in self.blocks:
            x = block(x, cos, sin)
        x = self.norm(x)
        if labels is None:
            logits: Tensor = self.head(x)
            return logits
        if self._goes_in_parts(labels.numel()):
            rows = max(_LEAST_ROWS, _AT_ONCE // self.vocab_size)
            total = linear_cross_entropy(x.flatten(0, 1), self.head.weight, labels.flatten(), rows)
        else:
            # In fp32 whatever the model computes in: a sum of thousands of terms has no place in 8 bits of mantissa.
            logits = self.head(x).float().flatten(0, 1)
            total = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return Loss(total, (labels != IGNORED).sum())

    def _goes_in_parts(self, tokens: int) -> bool:
        """Whether the loss takes the head's weight itself. Not of an adapter or a sharded matrix, and by itself not in fp16, whose
        gradients it would take before they are scaled."""
        if type(self.head) is not nn.Linear or hasattr(self.head.weight, "to_local"):
            return False
        if self.loss_in_parts is not None:
            return self.loss_in_parts
        kind = self.head.weight.device.type
        half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        return tokens * self.vocab_size > _MANY and not half

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue sequences, in the mode (train or eval) that the model is in.

        Args:
            ids: the beginnings, int64 [batch, time], at least one token each; the last `context` of them are looked at.
            max_new_tokens: how many tokens to add.
            temperature: divides the logits; 0 takes the most likely token each time.
            top_k: sample among this many most likely tokens only.
            generator: source of random numbers, on the device of `ids`; None for the global one.

        Returns:
            The beginnings with their continuations, int64 [batch, time + max_new_tokens].
        """
        if temperature < 0 or ids.shape[1] == 0:
            raise ModelError(
                f"generate needs a temperature of at least 0 and a token to begin with, got {temperature}, {tuple(ids.shape)}"
            )
        for _ in range(max_new_tokens):
            logits = self(ids[:, -self.context :])[:, -1].float()
            ids = torch.cat((ids, _choose(logits, temperature, top_k, generator)), dim=1)
        return ids


class Block(nn.Module):
    """Attention, then a gated MLP, each added to the residual stream."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        hidden = (
            -(-8 * width // 3 // 32) * 32
        )  # two thirds of 4 x width for three matrices instead of two (Shazeer 2020, section 2)
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One step of the residual stream, [batch, time, width]; `cos` and `sin` are [time, width / heads / 2]."""
        x = x + self.dropout(self.attention_out(self._attend(self.attention_norm(x), cos, sin)))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        x = x + self.dropout(self.down(F.silu(gate) * up))
        return x

    def _attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, width = x.shape
        # under tensor parallelism these are this process's heads only
        heads = self.qkv(x).view(batch, time, -1, width // self.heads).transpose(1, 2)
        mine = heads.shape[1] // 3
        qk, v = heads.split((2 * mine, mine), dim=1)
        q, k = rotate(qk, cos, sin).chunk(2, dim=1)
        dropout = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, time, -1)


def rotary_table(context: int, size: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position x frequency, [context, size / 2] each (arXiv:2104.09864, section 3.2.2)."""
    frequencies = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.outer(torch.arange(context, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + size / 2]) of [..., time, size] by their position's angles."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)  # under autocast x is 16-bit: stay there
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """The next tokens [batch, 1] from the logits [batch, vocab_size]."""
    if temperature < _COLD:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)


@component
class GPTComponent(Component):
    """A small decoder-only transformer (RMSNorm, rotary positions, SwiGLU), by default over bytes.

    In evaluation it reports `bits_per_byte`, or `bits_per_token` when the vocabulary is not the 256 bytes.
    """

    kind: ClassVar[str] = "model"

    layers: int = option(default=4, at_least=1, help="number of blocks")
    heads: int = option(default=4, at_least=1, help="attention heads in each block")
    width: int = option(default=128, at_least=2, help="size of the residual stream")
    context: int = option(default=128, at_least=1, help="longest sequence, in tokens")
    vocab_size: int = option(default=BYTES, at_least=2, help="number of tokens; 256 for bytes")
    dropout: float = option(default=0.0, at_least=0, below=1, help="probability of dropping in training")
    tied: bool = option(default=False, help="share one matrix between the embedding and the output")
    loss_in_parts: bool | None = option(
        default=None, help="compute the loss some rows at a time; by default where that saves memory (large vocabularies)"
    )

    def __attrs_post_init__(self) -> None:
        if self.width % (2 * self.heads):
            even = "the width must be an even multiple of the heads"
            raise ConfigError([Problem("heads", f"{self.heads} heads do not fit a width of {self.width}: {even}")])

    def make_model(self, ctx: CallbackContext) -> GPT:
        """Build the model; its weights come from the random state of the caller."""
        shape = (self.layers, self.heads, self.width, self.context, self.vocab_size)
        return GPT(*shape, self.dropout, self.tied, self.loss_in_parts)

    def make_metrics(self, ctx: CallbackContext) -> Callable[[Any, Any], dict[str, Loss]]:
        """The loss in bits: nats / ln 2."""
        name = "bits_per_byte" if self.vocab_size == BYTES else "bits_per_token"

        def metrics(outputs: Any, batch: Any) -> dict[str, Loss]:
            return {name: Loss(outputs.total / math.log(2), outputs.weight)} if isinstance(outputs, Loss) else {}

        return metrics
