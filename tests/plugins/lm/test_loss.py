"""Cross entropy in parts: against torch's in float64, and how much memory it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from drivetrain import ModelError, Precision, Trainer, TrainingConfig
from drivetrain_lm import GPT, linear_cross_entropy
from drivetrain_lm import model as lm

TOKENS, VOCABULARY, WIDTH = 50, 40, 8


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(VOCABULARY, (TOKENS,))
    labels[::7] = -100
    return torch.randn(TOKENS, WIDTH, dtype=dtype), torch.randn(VOCABULARY, WIDTH, dtype=dtype), labels


def whole(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((x @ weight.t()), labels, ignore_index=-100, reduction="sum")


def gradients(total: Tensor, *of: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(total * 0.3, of))


class Largest(TorchDispatchMode):
    """The most numbers that a result has."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.found = max(self.found, *(x.numel() for x in tree_flatten(result)[0] if isinstance(x, Tensor)), 0)
        return result


class TestFormula:
    @pytest.mark.parametrize("rows", [1, 7, 10, TOKENS, 1000])
    def test_is_torchs_in_float64(self, rows: int) -> None:
        x, weight, labels = example()
        x.requires_grad_(), weight.requires_grad_()
        expected, found = whole(x, weight, labels), linear_cross_entropy(x, weight, labels, rows)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
        torch.testing.assert_close(gradients(found, x, weight), gradients(expected, x, weight), rtol=1e-12, atol=1e-14)
        with torch.no_grad():
            torch.testing.assert_close(linear_cross_entropy(x, weight, labels, rows), expected, rtol=1e-14, atol=0)

    def test_nothing_counts(self) -> None:
        x, weight, labels = example()
        x.requires_grad_()
        found = linear_cross_entropy(x, weight, torch.full_like(labels, -100), 7)
        assert found.item() == 0
        assert not gradients(found, x)[0].any()

    @pytest.mark.parametrize("frozen", ["x", "weight"])
    def test_one_of_the_two_alone(self, frozen: str) -> None:
        x, weight, labels = example()
        trained = weight if frozen == "x" else x
        trained.requires_grad_()
        expected, found = whole(x, weight, labels), linear_cross_entropy(x, weight, labels, 7)
        torch.testing.assert_close(gradients(found, trained), gradients(expected, trained), rtol=1e-12, atol=1e-14)

    def test_in_bf16_it_is_as_near_as_torchs(self) -> None:
        x, weight, labels = example(torch.float32)
        x, weight = x.repeat(20, 1).requires_grad_(), weight.requires_grad_()
        labels = labels.repeat(20)
        exact = gradients(whole(x.double(), weight.double(), labels), x, weight)
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(linear_cross_entropy(x, weight, labels, 64), x, weight)
            plain = gradients(F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum"), x, weight)
        for exactly, in_parts, in_one in zip(exact, found, plain, strict=True):
            assert in_parts.dtype == torch.float32
            assert (in_parts - exactly).norm() <= 1.1 * (in_one - exactly).norm() < 0.01 * exactly.norm()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kept", [None, torch.float32])
    def test_weights_in_16_bits_have_a_gradient_as_of_one_part(self, dtype: torch.dtype, kept: torch.dtype | None) -> None:
        torch.manual_seed(0)
        x, labels = torch.randn(2048, WIDTH).to(dtype), torch.randint(VOCABULARY, (2048,))
        weight = torch.randn(VOCABULARY, WIDTH).to(dtype).requires_grad_()
        if kept is not None and hasattr(weight, "grad_dtype"):
            weight.grad_dtype = kept
        exact = weight.detach().double().requires_grad_()
        whole(x.double(), exact, labels).backward()
        errors = []
        for rows in (2048, 16):
            weight.grad = None
            linear_cross_entropy(x, weight, labels, rows).backward()
            assert exact.grad is not None and weight.grad is not None
            assert weight.grad.dtype == getattr(weight, "grad_dtype", dtype)
            errors.append(float((weight.grad - exact.grad).norm() / exact.grad.norm()))
        assert errors[1] <= 1.5 * errors[0], errors

    def test_a_second_derivative_is_refused(self) -> None:
        x, weight, labels = example()
        x.requires_grad_()
        with pytest.raises(ModelError, match="no second derivative"):
            torch.autograd.grad(linear_cross_entropy(x, weight, labels, 7), x, create_graph=True)

    def test_a_label_outside_the_vocabulary_is_an_error_as_in_torch(self) -> None:
        x, weight, labels = example()
        labels[3] = VOCABULARY
        with pytest.raises(IndexError, match="out of bounds"):
            linear_cross_entropy(x.requires_grad_(), weight, labels, 7)


def test_no_more_logits_at_a_time_than_asked_for() -> None:
    x, weight, labels = example()
    x.requires_grad_(), weight.requires_grad_()
    largest = {}
    for name, loss in (
        ("parts", lambda: linear_cross_entropy(x, weight, labels, 8)),
        ("whole", lambda: whole(x, weight, labels)),
    ):
        with Largest() as seen:
            loss().backward()
        largest[name] = seen.found
    assert largest == {"parts": max(TOKENS * WIDTH, VOCABULARY * WIDTH, 8 * VOCABULARY), "whole": TOKENS * VOCABULARY}


class TestModel:
    def made(self, **options: Any) -> GPT:
        torch.manual_seed(0)
        made = GPT(layers=1, heads=2, width=16, context=12, vocab_size=40, **options)
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.2)
        return made

    @pytest.mark.parametrize("tied", [False, True])
    def test_trains_as_in_one_piece(self, tied: bool) -> None:
        rows = torch.randint(40, (24, 12), generator=torch.Generator().manual_seed(1))
        data = [{"input_ids": row, "labels": row.roll(-1).index_fill(0, torch.tensor([11]), -100)} for row in rows]
        ends = []
        for parts in (False, True):
            config = TrainingConfig(
                max_duration="6st",
                per_device_batch_size=4,
                gradient_accumulation_steps=2,
                standard_callbacks=False,
                device="cpu",
            )
            made = self.made(tied=tied, loss_in_parts=parts).double()
            optimizer = torch.optim.AdamW(made.parameters(), lr=0.01)
            output = Trainer(made, config, data, data, optimizer=optimizer, precision=Precision()).train()
            ends.append((dict(made.state_dict()), output.losses, output.metrics["eval/loss"]))
        torch.testing.assert_close(ends[1][0], ends[0][0], rtol=1e-6, atol=1e-8)  # the whole one rounds logits to fp32
        torch.testing.assert_close(ends[1][1:], ends[0][1:], rtol=1e-6, atol=0)

    def test_by_itself_for_many_logits_in_other_types_than_fp16(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        monkeypatch.setattr(lm, "linear_cross_entropy", lambda *given: calls.append(given[3]) or torch.zeros(()))
        ids = torch.zeros(3, 12, dtype=torch.int64)
        made = self.made()
        made(ids, ids)
        assert not calls
        monkeypatch.setattr(lm, "_MANY", 1000)
        made(ids, ids)
        with torch.autocast("cpu", torch.bfloat16):
            made(ids, ids)
        with torch.autocast("cpu", torch.float16):
            made(ids, ids)
        assert made(ids).shape == (3, 12, 40), "logits are whole"
        assert calls == [2**23 // 40] * 2
        self.made(loss_in_parts=False)(ids, ids)
        assert len(calls) == 2

    def test_an_adapter_on_the_head_is_not_passed_over(self) -> None:
        class Adapted(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * 0

        made = self.made(loss_in_parts=True)
        made.head.__class__ = Adapted
        ids = torch.zeros(3, 12, dtype=torch.int64)
        torch.testing.assert_close(made(ids, ids).total, 36 * torch.tensor(40.0).log())
