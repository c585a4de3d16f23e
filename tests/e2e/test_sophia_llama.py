"""Sophia-G on a language model of transformers, whose loss shifts the labels: its curvature against an exact Gauss-Newton matrix."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from transformers import BertConfig, BertForTokenClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from drivetrain import Callback, CallbackContext, Precision, Trainer, TrainingConfig
from drivetrain_sophia import Sophia, SophiaGComponent, next_labels, shifts_labels
from drivetrain_transformers import token_loss

SIZES = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 5}
DRAWS = 400


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=8, attn_implementation="eager")).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_()
    return model


def batch() -> dict[str, Tensor]:
    """Two rows of seven tokens: of one, only the last five count; of the other, only two in the middle."""
    ids = torch.randint(0, 5, (2, 7), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, :2] = -100
    labels[1, :3], labels[1, 5:] = -100, -100
    return {"input_ids": ids, "labels": labels}


def exact(counted: list[tuple[int, int]]) -> Tensor:
    """The Gauss-Newton matrix' diagonal of the mean loss over positions (row, time) of the logits: the mean of Jᵀ(diag p − ppᵀ)J."""
    model, ids = llama(), batch()["input_ids"]
    weights = {name: p.detach() for name, p in model.named_parameters()}
    rows, times = (torch.tensor(part) for part in zip(*counted, strict=True))

    def logits(weights: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(model, weights, (), {"input_ids": ids}).logits[rows, times]
        return found

    p = logits(weights).softmax(-1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    jacobians = [j.flatten(2) for j in jacrev(logits)(weights).values()]
    return torch.cat([torch.einsum("nci,ncd,ndi->i", j, middle, j) for j in jacobians]) / len(counted)


def estimates(**options: Any) -> Tensor:
    """The component's estimates of many draws in the first step of a run, [draws, parameters]."""
    optimizer = SophiaGComponent(decay="all", **options)  # one group, in the model's order
    seeds = iter(range(10_000))
    optimizer.generator = lambda ctx, rank: torch.Generator().manual_seed(next(seeds))  # type: ignore[method-assign]
    found: list[Tensor] = []

    class Probe(Callback):
        def on_step_start(self, ctx: CallbackContext) -> None:
            draws = [optimizer.estimate(ctx) for _ in range(DRAWS)]
            found.append(torch.stack([torch.cat([e.flatten() for e in draw if e is not None]) for draw in draws]))

    rows = [{key: value[row] for key, value in batch().items()} for row in range(2)]
    # two microbatches with unequal numbers of tokens: 5 and 2
    config = TrainingConfig(
        max_duration="1st", per_device_batch_size=1, gradient_accumulation_steps=2, standard_callbacks=False
    )
    config.dataloader.shuffle = False
    given: dict[str, Any] = {"precision": Precision(), "scheduler": lambda position: 1.0, "loss": token_loss}
    Trainer(llama(), config, rows, optimizer=optimizer, callbacks=[Probe()], **given).train()
    return found[0]


def error(draws: Tensor, expected: Tensor) -> Tensor:
    """How far the mean over the draws is from `expected`, in standard errors, for each parameter."""
    return (draws.mean(0) - expected).abs() / (draws.std(0) / DRAWS**0.5 + 1e-12)


# labels[row, t] counts, hence logits[row, t − 1]
COUNTED = [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 2), (1, 3)]
UNSHIFTED = [(row, time + 1) for row, time in COUNTED]


def test_the_estimate_has_the_mean_of_the_exact_diagonal_over_the_positions_that_count() -> None:
    draws = estimates()
    assert error(draws, exact(COUNTED)).max() < 5
    assert error(draws, exact(UNSHIFTED)).max() > 15, "control: the positions of unshifted labels would be seen"


def test_control_without_the_shift_it_is_another_matrix() -> None:
    draws = estimates(shift=False)
    assert error(draws, exact(UNSHIFTED)).max() < 5
    assert error(draws, exact(COUNTED)).max() > 15


def test_which_models_shift() -> None:
    small = {"num_hidden_layers": 1, "num_attention_heads": 1}
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=5, n_positions=8))
    tagger = BertForTokenClassification(BertConfig(**small, hidden_size=4, intermediate_size=4, vocab_size=5))
    assert shifts_labels(llama())
    assert shifts_labels(gpt2)
    assert not shifts_labels(tagger)
    assert not shifts_labels(nn.Linear(2, 2))
    wrapped = nn.Module()
    wrapped.module = llama()  # as DDP has it
    assert shifts_labels(wrapped)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_shift_is_that_of_the_models_own_loss(family: str) -> None:
    """Moving labels by one must give transformers' own loss: this is what `shift` claims."""
    torch.manual_seed(0)
    make = partial(GPT2LMHeadModel, GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=5, n_positions=8))
    model: Any = llama() if family == "llama" else make().eval()
    given = batch()
    outputs = model(**given)
    ours = nn.functional.cross_entropy(outputs.logits.flatten(0, 1), next_labels(given["labels"]).flatten())
    torch.testing.assert_close(ours, outputs.loss, rtol=1e-5, atol=1e-6, check_dtype=False)


def numpy_steps(
    start: np.ndarray, grads: list[np.ndarray], estimates: list[np.ndarray | None], clips: bool = True
) -> np.ndarray:
    """Algorithm 3 of arXiv:2305.14342 in NumPy, with the settings of the test below."""
    theta, m, h = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for g, estimate in zip(grads, estimates, strict=True):
        m = 0.96 * m + 0.04 * g
        if estimate is not None:
            h = 0.99 * h + 0.01 * estimate
        theta = theta - 1e-2 * 0.1 * theta
        step = m / np.maximum(0.05 * h, 1e-12)
        theta = theta - 1e-2 * (np.clip(step, -1, 1) if clips else np.clip(step, -2, 2))
    return theta


def test_sophias_step_is_that_of_the_papers_equations_in_numpy() -> None:
    random = np.random.default_rng(0)
    start = random.standard_normal((6, 7))
    grads = [random.standard_normal((6, 7)) for _ in range(40)]
    estimates = [random.standard_normal((6, 7)) ** 2 * 60 if step % 10 == 0 else None for step in range(40)]
    parameter = nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = Sophia([parameter], lr=1e-2, betas=(0.96, 0.99), gamma=0.05, eps=1e-12, weight_decay=0.1)
    for g, estimate in zip(grads, estimates, strict=True):
        if estimate is not None:
            optimizer.update_hessian([torch.from_numpy(estimate)])
        parameter.grad = torch.from_numpy(g.copy())
        optimizer.step()
    found = parameter.detach().numpy()
    np.testing.assert_allclose(found, numpy_steps(start, grads, estimates), rtol=1e-12, atol=1e-12)
    assert np.abs(found - numpy_steps(start, grads, estimates, clips=False)).max() > 1e-2, "control: another limit is seen"
    assert 0.1 < float(optimizer.win_rate()) < 0.9, "some weights are clipped and some are not"
