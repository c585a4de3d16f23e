"""Which layers are meant, and what four bits hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from drivetrain_qlora.layers import linear_layers, norms_as_they_were, norms_to_fp32, weight_bytes
from drivetrain_qlora.quantize import dequantize, dequantized, quantize, quantized

CPU = torch.device("cpu")


class TestLinearLayers:
    @pytest.mark.parametrize("kind", ["llama", "tied"])
    def test_of_a_transformer_are_all_but_the_head(self, make_model: Callable[..., Any], kind: str) -> None:
        attention = [f"self_attn.{part}_proj" for part in "qkvo"]
        inside = [*attention, *(f"mlp.{part}_proj" for part in ("gate", "up", "down"))]
        assert list(linear_layers(make_model(kind))) == [f"model.layers.{n}.{part}" for n in (0, 1) for part in inside]

    def test_of_gpt2_are_its_conv1ds(self, make_model: Callable[..., Any]) -> None:
        inside = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
        assert list(linear_layers(make_model("gpt2"))) == [f"transformer.h.{n}.{part}" for n in (0, 1) for part in inside]

    def test_of_any_module_are_all_but_the_last(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1)), nn.Linear(4, 2))
        assert list(linear_layers(model)) == ["0", "2.0"]

    def test_leaves_out_what_is_shared_or_fused(self) -> None:
        model = nn.ModuleDict({"table": nn.Embedding(4, 4), "tied": nn.Linear(4, 4), "free": nn.Linear(4, 4)})
        model["tied"].weight = model["table"].weight
        model["block"] = nn.TransformerEncoderLayer(8, 2)
        model["head"] = nn.Linear(4, 4)
        assert list(linear_layers(model)) == ["free"]


# Dettmers et al. 2023 (arXiv:2305.14314), appendix E
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip


class TestQuantizing:
    def test_a_weight_is_the_nearest_code_times_its_blocks_largest(self) -> None:
        torch.manual_seed(0)
        layer = nn.Linear(128, 96)
        blocks = layer.weight.detach().view(-1, 64)
        largest = blocks.abs().amax(1, keepdim=True)
        codes = torch.tensor(NF4)
        nearest = codes[(blocks / largest).unsqueeze(-1).sub(codes).abs().argmin(-1)]
        held = dequantized(quantized(layer, torch.float32, CPU), torch.float32)
        found = held.weight.view(-1, 64)
        torch.testing.assert_close(found / found.abs().amax(1, keepdim=True), nearest, rtol=0, atol=1e-6)
        error = (found.abs().amax(1, keepdim=True) / largest - 1).abs()
        assert 0 < error.max() < 0.02, "the scales are stored in 8 bits"
        assert torch.equal(held.bias, layer.bias)

    def test_takes_about_four_bits(self) -> None:
        layer = nn.Linear(1024, 1024, bias=False)
        bits = 8 * weight_bytes(quantized(layer, torch.bfloat16, CPU)) / layer.weight.numel()
        assert bits < 4.15  # 4.127, and the tables of codes

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_and_back_is_the_same_function(self, make_model: Callable[..., Any], kind: str) -> None:
        model, ids = make_model(kind).eval(), torch.arange(12)[None]
        before = {name: (type(module), module.weight.shape) for name, module in linear_layers(model).items()}
        exact = model(input_ids=ids).logits
        quantize(model, torch.float32, CPU)
        coarse = model(input_ids=ids).logits
        dequantize(model, torch.float32)
        assert {name: (type(module), module.weight.shape) for name, module in linear_layers(model).items()} == before
        torch.testing.assert_close(model(input_ids=ids).logits, coarse, rtol=1e-4, atol=1e-5)
        assert 1e-3 < (coarse - exact).std() / exact.std() < 0.3

    def test_evaluation_changes_nothing(self) -> None:
        """On CPUs with AVX512-BF16 bitsandbytes repacks the weights in eval mode, which has no backward and is rounder."""
        torch.manual_seed(0)
        layer = quantized(nn.Linear(64, 64), torch.float32, CPU)
        x = torch.randn(3, 64, requires_grad=True)
        weight = layer.weight.data.clone()

        def gradient() -> torch.Tensor:
            (found,) = torch.autograd.grad(layer.train()(x).sum(), x)
            return found

        before = gradient()
        with torch.no_grad():
            layer.eval()(x.detach())
        assert torch.equal(gradient(), before)
        assert torch.equal(layer.weight.data, weight)


class TestNorms:
    def test_compute_in_fp32_and_give_back_16_bits(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)).bfloat16()
        x = 100 + torch.randn(5, 64).bfloat16()
        with torch.no_grad():
            model[1].weight += torch.randn(64)
        plain, exact = model[1](x), torch.nn.functional.layer_norm(x.double(), (64,), model[1].weight.double())
        norms_to_fp32(model)
        found = model[1](x)
        assert (model[0].weight.dtype, model[1].weight.dtype, found.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
        assert (found - exact).abs().mean() <= (plain - exact).abs().mean()
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)
        norms_as_they_were(model)
        assert model[1](x.float()).dtype == torch.float32

    def test_fp32_models_are_left_alone(self, make_model: Callable[..., Any]) -> None:
        model = make_model()
        norms_to_fp32(model)
        assert not any(module._forward_hooks for module in model.modules())
