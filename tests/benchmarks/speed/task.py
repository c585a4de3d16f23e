"""What every engine is given: the same model, data, optimizer and number of steps. Nothing here belongs to one of them.

The model's own forward keeps the time, so that no engine needs a hook for it: the clock runs from the forward of step `warmup` to
that of the last step, over whole steps. A GPT's steps on a CPU are long, and what else the machine does hits some of them: there the
forward also hands over to the next engine after every few steps (`Task.turn`), and a turn's time is that of its middle step.
"""

from __future__ import annotations

import statistics
import sysconfig
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from quantized import quantize
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

VOCABULARY = 256


@dataclass(frozen=True)
class Task:
    """One training.

    Attributes:
        model: "mlp" (32-32-1), "gpt" (GPT-2's layout) or "llama" (RMSNorm, rotary positions, SwiGLU, 8 heads of keys and values).
        best: the engine's best documented settings, equal for all; else what it does by itself.
        steps: optimizer updates, of which the first `warmup` are not timed.
        turn: steps after which the next engine has its turn; 0 for a whole training.
        qlora: frozen matrices in four bits and adapters beside them; a GPT's.
        folder: where an engine may write.
    """

    model: str = "mlp"
    best: bool = True
    steps: int = 1000
    warmup: int = 50
    turn: int = 0
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    max_norm: float = 1.0
    seed: int = 0
    layers: int = 4
    width: int = 256
    heads: int = 4
    context: int = 128
    vocabulary: int = VOCABULARY
    device: str = "cpu"
    bf16: bool = False
    compiled: bool = False
    qlora: bool = False
    folder: str = "."

    @property
    def per_step(self) -> int:
        """Samples of a step, or its tokens."""
        return self.batch * (1 if self.model == "mlp" else self.context)


def keep_on(seconds: float | None) -> None:
    """Called when a turn is over, with the time of a step in it (None before the first): whoever has others waiting replaces it."""


hand_over: Callable[[float | None], None] = keep_on


class Timed(nn.Module):
    """A model that knows when its forwards began."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.begins, self.ends, self.turn = task.warmup, task.steps - 1, task.turn
        self.passes, self.times = 0, list[float]()

    def tick(self) -> None:
        """A training forward begins."""
        since = self.passes - self.begins
        if self.turn and since >= 0:
            self.times.append(self._now())
            if since % self.turn == 0:
                hand_over(self.seconds_per_step if since else None)
                self.times = [self._now()]
        elif self.passes in (self.begins, self.ends):
            self.times.append(self._now())
        self.passes += 1

    def _now(self) -> float:
        if next(self.parameters()).is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @property
    def seconds_per_step(self) -> float:
        """Between the first and the last timed forward; in turns, of the newest turn's middle step."""
        if self.turn:
            return statistics.median(after - before for before, after in pairwise(self.times))
        return (self.times[-1] - self.times[0]) / (self.ends - self.begins)


class Mlp(Timed):
    """Three small layers: what is left of a step is the engine."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.hidden, self.out = nn.Linear(32, 32), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 32] to [batch, 1]."""
        if self.training:
            self.tick()
        return self.out(F.relu(self.hidden(x)))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, width] to the same."""
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x = x + self.proj(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LlamaBlock(nn.Module):
    """Llama's: RMSNorm, rotary positions, grouped heads, SwiGLU."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, (heads + 2 * groups) * self.size, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 8 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, width] to the same."""
        batch, length, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, -1, self.size).transpose(1, 2)
        q, k, v = heads.split((self.heads, self.groups, self.groups), dim=1)
        angles = torch.outer(
            torch.arange(length, device=x.device), 10_000 ** -torch.linspace(0, 1, self.size // 2, device=x.device)
        )
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        mixed = F.scaled_dot_product_attention(_turn(q, cos, sin), _turn(k, cos, sin), v, is_causal=True, enable_gqa=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Gpt(Timed):
    """A language model: over bytes for a CPU, of published shapes for a GPU."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        llama = task.model == "llama"
        self.tokens = nn.Embedding(task.vocabulary, task.width)
        self.positions = None if llama else nn.Embedding(task.context, task.width)
        self.blocks = nn.ModuleList(
            LlamaBlock(task.width, task.heads, min(8, task.heads)) if llama else Block(task.width, task.heads)
            for _ in range(task.layers)
        )
        self.norm = nn.RMSNorm(task.width) if llama else nn.LayerNorm(task.width)
        self.head = nn.Linear(task.width, task.vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Ids [batch, time] to logits [batch, time, vocabulary]."""
        if self.training:
            self.tick()
        hidden = self.tokens(x)
        if self.positions is not None:
            hidden = hidden + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(outputs, targets)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over tokens, in nats."""
    return F.cross_entropy(outputs.flatten(0, 1).float(), targets.flatten())


def build(task: Task) -> tuple[Timed, Any]:
    """The model with its first weights, and the loss function."""
    torch.manual_seed(task.seed)
    if task.model == "mlp":
        return Mlp(task), mse
    model = Gpt(task)
    if task.qlora:
        quantize(model, task.device)
    return model, cross_entropy


def autocast_of(task: Task) -> AbstractContextManager[Any]:
    """For the forward and its loss."""
    return torch.autocast(task.device, torch.bfloat16) if task.bf16 else nullcontext()


@cache
def text() -> Tensor:
    """Bytes of Python's standard library, as much as any of the tasks needs."""
    folder = Path(sysconfig.get_path("stdlib"))
    joined = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:120])
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()


def data(task: Task, held_out: bool = False) -> TensorDataset:
    """In memory: pairs of inputs and targets."""
    if task.model == "mlp":
        generator = torch.Generator().manual_seed(1 + held_out)
        x = torch.randn(task.batch * 256, 32, generator=generator)
        return TensorDataset(x, x[:, :4].sin().sum(1, keepdim=True))
    if task.vocabulary != VOCABULARY:  # of published shapes only the speed is asked
        generator = torch.Generator().manual_seed(1 + held_out)
        rows = torch.randint(task.vocabulary, (task.batch * 64 + 64, task.context + 1), generator=generator)
    else:
        rows = text().unfold(0, task.context + 1, task.context)
    rows = rows[-64:] if held_out else rows[:-64]
    return TensorDataset(rows[:, :-1].clone(), rows[:, 1:].clone())


class Whole(Dataset[Any]):
    """The same data for `DataLoader(..., collate_fn=whole)`: a batch is fetched at once, as torch's `__getitems__` allows."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return tuple(tensor[indices] for tensor in self.tensors)


def whole(batch: Any) -> Any:
    """What `Whole` fetched is a batch already."""
    return batch


def loader(task: Task) -> Any:
    """What a person writes, or the fastest that torch's DataLoader has for tensors in memory."""
    generator = torch.Generator().manual_seed(task.seed)
    given: dict[str, Any] = {"batch_size": task.batch, "shuffle": True, "generator": generator, "drop_last": True}
    if task.best:
        pinned = task.device != "cpu"
        return torch.utils.data.DataLoader(Whole(data(task).tensors), collate_fn=whole, pin_memory=pinned, **given)
    return torch.utils.data.DataLoader(data(task), **given)


def optimizer(model: nn.Module, task: Task) -> torch.optim.Optimizer:
    """AdamW as the task says; `fused` where the best is wanted, which is not torch's default on a CPU."""
    fused = {"fused": True} if task.best else {}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=task.lr, weight_decay=task.weight_decay, **fused)


def schedule(optimizer: torch.optim.Optimizer, task: Task) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear to zero."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / task.steps))


@torch.no_grad()
def held_out_loss(model: nn.Module, loss: Any, task: Task) -> float:
    """In fp32, whatever the model was trained in; one in four bits as it was trained."""
    count = 64 if task.vocabulary == VOCABULARY else 2
    x, y = (tensor[:count].to(task.device) for tensor in data(task, held_out=True).tensors)
    model.eval()
    if not task.qlora:
        model.float()
    with torch.autocast(task.device, torch.bfloat16, enabled=task.qlora):
        return float(loss(model(x), y))
