"""The small GPT: what it computes, its loss, its metric and how it continues a text."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from drivetrain import (
    CallbackContext,
    ConfigError,
    Loss,
    ModelError,
    OptimizerComponent,
    Precision,
    Trainer,
    TrainingConfig,
    component,
)
from drivetrain_lm import GPT, GPTComponent
from drivetrain_lm.model import rotary_table, rotate

SMALL: dict[str, Any] = {"layers": 2, "heads": 2, "width": 16, "context": 12}


@component
class Sgd(OptimizerComponent):
    """So that these tests need no optimizer plugin."""

    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameter_groups(ctx.model), lr=self.lr)


def model(**options: Any) -> GPT:
    """A model whose weights are all random: a new one begins as the identity, and no test could tell its parts."""
    torch.manual_seed(0)
    made = GPT(**SMALL | options)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def tokens(*shape: int, vocabulary: int = 256) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(1))


def by_hand(gpt: GPT, ids: Tensor) -> Tensor:
    """The logits of one sequence [time], one head and position at a time: an oracle that shares no code with the model."""
    width = gpt.head.in_features

    def rms(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    def turned(vector: Tensor, position: int) -> Tensor:
        half = len(vector) // 2
        turned = vector.clone()
        for i in range(half):
            angle = position * 10_000 ** (-i / half)
            pair = torch.complex(vector[i], vector[i + half]) * complex(math.cos(angle), math.sin(angle))
            turned[i], turned[i + half] = pair.real, pair.imag
        return turned

    x = gpt.embedding.weight[ids]
    for block in gpt.blocks:
        q, k, v = (rms(x, block.attention_norm.weight) @ block.qkv.weight.T).split(width, -1)
        mixed, size = torch.zeros_like(x), width // block.heads
        for start in range(0, width, size):
            part = slice(start, start + size)
            queries = [turned(vector, t) for t, vector in enumerate(q[:, part])]
            keys = [turned(vector, t) for t, vector in enumerate(k[:, part])]
            for t in range(len(ids)):
                scores = torch.stack([queries[t] @ keys[s] / math.sqrt(size) for s in range(t + 1)])
                mixed[t, part] = scores.softmax(0) @ v[: t + 1, part]
        x = x + mixed @ block.attention_out.weight.T
        gate, up = (rms(x, block.mlp_norm.weight) @ block.gate_up.weight.T).chunk(2, -1)
        x = x + (gate * gate.sigmoid() * up) @ block.down.weight.T
    return rms(x, gpt.norm.weight) @ gpt.head.weight.T


class TestForward:
    @pytest.mark.parametrize("options", [{}, {"heads": 4}, {"tied": True}, {"layers": 1, "vocab_size": 7}])
    def test_logits_are_those_worked_out_by_hand(self, options: dict[str, Any]) -> None:
        gpt = model(**options).double()
        ids = tokens(2, 9, vocabulary=gpt.vocab_size)
        torch.testing.assert_close(gpt(ids), torch.stack([by_hand(gpt, row) for row in ids]), atol=1e-6, rtol=1e-6)

    def test_a_later_token_changes_no_earlier_logits(self) -> None:
        gpt, ids = model(), tokens(1, 12)
        changed = ids.clone()
        changed[0, 7] = (ids[0, 7] + 1) % 256
        before, after = gpt(ids), gpt(changed)
        torch.testing.assert_close(before[:, :7], after[:, :7], atol=1e-6, rtol=0)
        assert ((before - after).abs().amax(-1)[0, 7:] > 1e-3).all()  # negative control: all later ones see it

    def test_rotary_scores_depend_on_distance_alone(self) -> None:
        cos, sin = rotary_table(64, 8)
        q, k = torch.randn(8, generator=torch.Generator().manual_seed(0)), torch.arange(8.0)
        turned_q, turned_k = (rotate(x.expand(64, 8), cos, sin) for x in (q, k))
        scores = turned_q @ turned_k.T
        for distance in (0, 3, 40):
            diagonal = scores.diagonal(-distance)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
        assert (scores.diagonal(-3)[0] - scores.diagonal(-40)[0]).abs() > 0.1

    def test_a_new_model_knows_nothing(self) -> None:
        torch.manual_seed(0)
        loss = GPT()(tokens(4, 128), tokens(4, 128))
        assert loss.mean().item() / math.log(2) == pytest.approx(8.0, abs=0.2)

    def test_tied_means_one_matrix(self) -> None:
        tied, untied = GPT(**SMALL, tied=True), GPT(**SMALL)
        assert tied.head.weight is tied.embedding.weight
        count = [sum(p.numel() for p in gpt.parameters()) for gpt in (tied, untied)]
        assert count[1] - count[0] == 256 * 16

    def test_dropout_acts_in_training_only(self) -> None:
        gpt, ids = model(dropout=0.5), tokens(1, 12)
        assert torch.equal(gpt(ids), gpt(ids))
        gpt.train()
        assert not torch.equal(gpt(ids), gpt(ids))

    def test_too_long_an_input(self) -> None:
        with pytest.raises(ModelError, match=r"13 tokens, the model takes 12.*model\.context"):
            model()(tokens(1, 13))

    def test_its_blocks_can_be_found(self) -> None:
        gpt = model()
        assert isinstance(gpt.blocks, torch.nn.ModuleList)
        assert len({type(block) for block in gpt.blocks}) == 1


class TestLoss:
    def test_is_the_summed_cross_entropy_with_its_weight(self) -> None:
        gpt, ids, labels = model(), tokens(3, 12), tokens(3, 12).roll(1)
        labels[0, 5:] = -100
        labels[2, 0] = -100
        loss = gpt(ids, labels)
        logits, flat = gpt(ids).flatten(0, 1), labels.flatten()
        kept = flat != -100
        expected = -logits.double().log_softmax(-1)[kept, flat[kept]].sum()
        assert loss.weight == kept.sum() == 3 * 12 - 8
        assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6)
        assert loss.mean().item() == pytest.approx(F.cross_entropy(logits, flat).item(), rel=1e-6)

    def test_is_summed_in_full_precision_under_autocast(self) -> None:
        gpt, ids = model(context=128), tokens(16, 128)
        exact = gpt(ids, ids)
        with torch.autocast("cpu", torch.bfloat16):
            assert gpt(ids).dtype == torch.bfloat16
            loss = gpt(ids, ids)
        assert loss.total.dtype == torch.float32
        assert loss.total.item() == pytest.approx(exact.total.item(), rel=0.01)
        assert loss.total.item() != loss.total.bfloat16().item()

    def test_every_parameter_gets_a_gradient(self) -> None:
        gpt = model().train()
        gpt(tokens(2, 12), tokens(2, 12)).mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gpt.parameters())


class TestGenerate:
    def test_temperature_zero_is_the_likeliest_token_each_time(self) -> None:
        gpt, ids = model(), tokens(2, 3)
        expected = ids
        for _ in range(20):  # beyond the context of 12: the last 12 tokens count
            expected = torch.cat((expected, gpt(expected[:, -12:])[:, -1].argmax(-1, keepdim=True)), 1)
        assert torch.equal(gpt.generate(ids, 20, temperature=0), expected)

    @pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-29])
    def test_so_is_one_close_to_zero(self, temperature: float) -> None:
        gpt, ids = model(), tokens(2, 3)
        assert torch.equal(gpt.generate(ids, 8, temperature=temperature), gpt.generate(ids, 8, temperature=0))

    def test_top_one_is_the_same(self) -> None:
        gpt, ids = model(), tokens(1, 3)
        assert torch.equal(gpt.generate(ids, 8, top_k=1), gpt.generate(ids, 8, temperature=0))

    def test_a_seed_fixes_it_and_the_global_generator_is_left_alone(self) -> None:
        gpt, ids = model(), tokens(1, 3)
        state = torch.get_rng_state()
        a, b, c = (gpt.generate(ids, 10, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert torch.equal(torch.get_rng_state(), state)

    def test_samples_follow_the_models_distribution(self) -> None:
        gpt = model(vocab_size=4)
        wanted = (gpt(torch.zeros(1, 1, dtype=torch.int64))[0, -1] / 2).softmax(-1)
        drawn = gpt.generate(torch.zeros(20_000, 1, dtype=torch.int64), 1, 2.0, generator=torch.Generator().manual_seed(0))[
            :, 1
        ]
        assert (drawn.bincount(minlength=4) / 20_000 - wanted).abs().max() < 0.015  # four standard deviations

    def test_top_k_leaves_the_rest_out(self) -> None:
        gpt = model(vocab_size=10)
        start = torch.zeros(2000, 1, dtype=torch.int64)
        best = set(gpt(start[:1])[0, -1].topk(3).indices.tolist())
        drawn = gpt.generate(start, 1, 5.0, top_k=3, generator=torch.Generator().manual_seed(0))[:, 1]
        assert set(drawn.tolist()) == best

    def test_what_it_cannot_do(self) -> None:
        with pytest.raises(ModelError, match="token to begin with"):
            model().generate(torch.empty(1, 0, dtype=torch.int64), 1)
        with pytest.raises(ModelError, match=r"temperature of at least 0 .* got -1"):
            model().generate(tokens(1, 1), 1, temperature=-1)


class TestComponent:
    def test_builds_what_it_says(self) -> None:
        gpt = GPTComponent(**SMALL, tied=True, dropout=0.25, vocab_size=99).make_model(None)  # type: ignore[arg-type]
        assert (len(gpt.blocks), gpt.blocks[0].heads, gpt.context, gpt.dropout.p) == (2, 2, 12, 0.25)
        assert gpt.head.weight.shape == (99, 16)
        assert gpt.head.weight is gpt.embedding.weight

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (
                {"heads": 3},
                "model.gpt.heads: 3 heads do not fit a width of 128: the width must be an even multiple of the heads",
            ),
            ({"heads": 128}, "model.gpt.heads: 128 heads do not fit"),
            ({"layers": 0}, "model.gpt.layers: must be at least 1, got 0"),
            ({"dropout": 1.0}, "model.gpt.dropout: must be at least 0 and below 1, got 1.0"),
        ],
    )
    def test_wrong_options(self, options: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigError) as caught:
            TrainingConfig(model={"use": "gpt", **options}).components()
        assert said in str(caught.value)

    @pytest.mark.parametrize(("vocabulary", "name"), [(256, "eval/bits_per_byte"), (50, "eval/bits_per_token")])
    def test_evaluation_reports_bits(self, vocabulary: int, name: str) -> None:
        """Weighted by the labels that count: the batches of this data have different numbers of them."""
        ids = tokens(5, 12, vocabulary=vocabulary)
        labels = ids.roll(-1, 1)
        labels[0, 3:] = -100
        labels[4, 1:] = -100
        data = [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]
        config = TrainingConfig(
            model={"use": "gpt", **SMALL, "vocab_size": vocabulary},
            optimizer=Sgd(lr=0.1),
            max_duration="3st",
            per_device_batch_size=2,
            standard_callbacks=False,
        )
        trainer = Trainer(args=config, train_dataset=data, eval_dataset=data, precision=Precision())
        trainer.train()
        metrics = trainer.evaluate()
        loss = trainer.model.eval()(ids, labels)
        assert set(metrics) == {"eval/loss", name}
        assert metrics["eval/loss"] == pytest.approx(loss.mean().item(), rel=1e-5)
        assert metrics[name] == pytest.approx(loss.mean().item() / math.log(2), rel=1e-5)

    def test_of_logits_there_are_no_bits(self) -> None:
        metrics = GPTComponent().make_metrics(None)  # type: ignore[arg-type]
        assert metrics(torch.zeros(1, 2, 256), {}) == {}
        assert metrics(Loss(torch.tensor(math.log(2) * 6), 2), {})["bits_per_byte"].mean().item() == pytest.approx(3.0)
