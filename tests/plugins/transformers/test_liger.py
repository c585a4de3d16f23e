"""Liger's kernels: the wiring with a stand-in for the package, and the real ones where there is a GPU for them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama import modeling_llama

from drivetrain import ConfigError, Loss, Precision, Trainer, TrainingConfig
from drivetrain_transformers import TransformersModel
from drivetrain_transformers.loss import summed_cross_entropy

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ROWS = torch.randint(300, (4, 12), generator=torch.Generator().manual_seed(1))


def samples() -> list[dict[str, torch.Tensor]]:
    """Rows of which 11, 2, 5 and 1 tokens count."""
    rows = []
    for ids, count in zip(ROWS, (11, 2, 5, 1), strict=True):
        labels = ids.clone()
        labels[: 12 - count] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def made(device: torch.device, **options: Any) -> Any:
    """The model that the component makes in a run on `device`, of the same weights each time."""
    torch.manual_seed(0)
    component = TransformersModel(liger=True, **options)
    ctx: Any = SimpleNamespace(device=device, config=SimpleNamespace(model_name=None), mode=None)
    return component.make_model(ctx)


def trained(model: Any, size: int, **changes: Any) -> Any:
    """The model after one step of SGD over all samples, in microbatches of `size`."""
    keys: dict[str, Any] = {"max_duration": "1st", "standard_callbacks": False, "max_grad_norm": False, **changes}
    keys |= {"per_device_batch_size": size, "gradient_accumulation_steps": 4 // size, "dataloader": {"shuffle": False}}
    table = TrainingConfig(**keys)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = Trainer(model, table, samples(), optimizer=optimizer, precision=Precision())
    trainer.train()
    return trainer.model


def summed(model: Any) -> Any:
    """An unpatched model with the loss that the component's models have."""
    model.loss_function = summed_cross_entropy
    return model


class _Norm(nn.Module):
    """A stand-in for LigerRMSNorm."""

    calls = 0

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        _Norm.calls += 1
        return F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)


def _fused(self: Any, input_ids: torch.Tensor, labels: Any = None, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
    """A stand-in for Liger's forward: as its, in training without logits, and a mean unless it is told what to divide by."""
    assert self.training
    hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
    wanted = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    logits = hidden.flatten(0, 1) @ self.lm_head.weight.T
    loss = F.cross_entropy(logits, wanted, reduction="mean" if num_items_in_batch is None else "sum")
    return CausalLMOutputWithPast(loss=loss / (num_items_in_batch or 1))


def _apply(model: Any, rope: bool = True) -> None:
    """A stand-in for `_apply_liger_kernel_to_instance`: as that does, it changes more than the instance."""
    modeling_llama.LlamaRMSNorm = _Norm  # type: ignore[misc, assignment]
    nn.functional.cross_entropy = nn.LayerNorm = None  # type: ignore[assignment, misc]  # as for granite and mllama
    if rope:
        modeling_llama.apply_rotary_pos_emb = None
    model.forward = MethodType(_fused, model)
    for norm in (model.model.norm, *(layer.input_layernorm for layer in model.model.layers)):
        norm.forward = MethodType(_Norm.forward, norm)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `liger_kernel` that knows Llama, and computes on any device."""
    package, public, table = (ModuleType(f"liger_kernel{name}") for name in ("", ".transformers", ".transformers.monkey_patch"))
    public._apply_liger_kernel_to_instance = _apply  # type: ignore[attr-defined]
    table.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": _apply, "mixtral": _apply}  # type: ignore[attr-defined]
    for module in (package, public, table):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    _Norm.calls = 0


class TestErrors:
    def test_a_device_without_kernels(self, llama: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=r"transformers.liger: has no kernels for the device cpu, .*Leave it out here"):
            made(CPU, config=llama)

    def test_not_installed(self, llama: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "liger_kernel", None)
        with pytest.raises(ConfigError, match=r"liger: needs liger-kernel, .*pip install 'drivetrain-transformers\[liger\]'"):
            made(GPU, config=llama)

    @pytest.mark.usefixtures("stand_in")
    def test_a_version_that_transformers_does_not_take(self, llama: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: False)
        with pytest.raises(ConfigError, match=r"liger: needs liger-kernel, .*pip install 'drivetrain-transformers\[liger\]'"):
            made(GPU, config=llama)

    @pytest.mark.usefixtures("stand_in")
    def test_a_model_that_it_does_not_know(self) -> None:
        with pytest.raises(ConfigError, match=r"of the type 'gpt2'. It has them for llama, mixtral and others"):
            made(GPU, config={"model_type": "gpt2", "n_layer": 1})

    @pytest.mark.usefixtures("stand_in")
    def test_a_loss_of_routers(self) -> None:
        with pytest.raises(ConfigError, match=r"Set config.output_router_logits = false"):
            made(GPU, config={"model_type": "mixtral", "output_router_logits": True})


@pytest.mark.usefixtures("stand_in")
class TestWiring:
    def test_the_loss_in_training_is_a_sum_without_logits(self, llama: dict[str, Any], make_llama: Callable[..., Any]) -> None:
        batch = torch.utils.data.default_collate(samples())
        model = made(GPU, config=llama).train()
        outputs = model(**batch)
        assert _Norm.calls == 3
        assert isinstance(outputs.loss, Loss)
        assert outputs.logits is None
        assert outputs.loss.weight == 11 + 2 + 5 + 1
        torch.testing.assert_close(outputs.loss.mean(), make_llama()(**batch).loss)

    def test_evaluation_has_logits_and_the_same_loss(self, llama: dict[str, Any]) -> None:
        batch = torch.utils.data.default_collate(samples())
        model = made(GPU, config=llama)
        trained_on, evaluated = model.train()(**batch), model.eval()(**batch)
        assert evaluated.logits.shape == (4, 12, 300)
        assert evaluated.loss.weight == trained_on.loss.weight
        torch.testing.assert_close(evaluated.loss.total, trained_on.loss.total)

    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize("size", [1, 4])
    def test_training_ends_with_the_same_weights(
        self, llama: dict[str, Any], make_llama: Callable[..., Any], size: int, checkpointing: bool
    ) -> None:
        model = trained(made(GPU, config=llama), size, device="cpu", activation_checkpointing=checkpointing)
        expected = trained(summed(make_llama()), 4, device="cpu")
        for (name, one), other in zip(expected.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6, msg=name)

    def test_nothing_else_of_the_process_changes(self, llama: dict[str, Any], make_llama: Callable[..., Any]) -> None:
        before = [dict(vars(module)) for module in (modeling_llama, nn, nn.functional)]
        made(GPU, config=llama)
        assert before == [dict(vars(module)) for module in (modeling_llama, nn, nn.functional)]
        assert "forward" not in vars(modeling_llama.LlamaForCausalLM(make_llama().config))
        make_llama()(input_ids=ROWS)
        assert _Norm.calls == 0

    def test_also_when_patching_fails(self, llama: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(model: Any, **_: Any) -> None:
            _apply(model)
            raise RuntimeError("no driver")

        monkeypatch.setattr(sys.modules["liger_kernel.transformers"], "_apply_liger_kernel_to_instance", fails)
        before = modeling_llama.LlamaRMSNorm
        with pytest.raises(RuntimeError, match="no driver"):
            made(GPU, config=llama)
        assert modeling_llama.LlamaRMSNorm is before

    def test_weights_keep_their_names_and_are_saved_as_ever(self, model_dir: Path, tmp_path: Path) -> None:
        model = made(GPU, path=str(model_dir))
        plain = AutoModelForCausalLM.from_pretrained(model_dir)
        assert list(model.state_dict()) == list(plain.state_dict())
        TransformersModel(path=str(model_dir)).save(model, tmp_path / "out")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert type(again) is type(plain)
        assert all(map(torch.equal, again.state_dict().values(), plain.state_dict().values()))
        again(input_ids=ROWS)
        assert _Norm.calls == 0

    def test_it_generates(self, llama: dict[str, Any], make_llama: Callable[..., Any]) -> None:
        model = made(GPU, config=llama).eval()
        given = {"attention_mask": torch.ones_like(ROWS), "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ROWS, **given), make_llama().eval().generate(ROWS, **given))
        assert _Norm.calls > 0

    def test_a_copy_computes_with_its_own_weights(self, llama: dict[str, Any]) -> None:
        batch = torch.utils.data.default_collate(samples())
        model = made(GPU, config=llama).train()
        other = copy.deepcopy(model)
        with torch.no_grad():
            model.lm_head.weight.zero_()
        assert other(**batch).loss.total != model(**batch).loss.total

    @pytest.mark.parametrize("odd", ["adapted", "with bias"])
    def test_a_head_that_is_more_than_its_weight_is_called(self, llama: dict[str, Any], odd: str) -> None:
        class Adapted(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x) + 1.0

        batch = torch.utils.data.default_collate(samples())
        model = made(GPU, config=llama).train()
        head = Adapted(32, 300, bias=False) if odd == "adapted" else nn.Linear(32, 300)
        model.set_output_embeddings(head)
        outputs = model(**batch)
        assert isinstance(outputs.loss, Loss)
        assert outputs.logits is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_the_real_kernels_give_the_same_loss_and_gradients(llama: dict[str, Any], model_type: str) -> None:
    pytest.importorskip("liger_kernel")
    table = {**llama, "model_type": model_type, "head_dim": 16}
    batch = {name: value.to(GPU) for name, value in torch.utils.data.default_collate(samples()).items()}
    model = made(GPU, config=table).to(GPU).train()
    torch.manual_seed(0)
    plain = summed(AutoModelForCausalLM.from_config(model.config)).to(GPU).train()
    plain.load_state_dict(model.state_dict())
    one, other = plain(**batch).loss, model(**batch).loss
    assert other.weight == one.weight
    torch.testing.assert_close(other.total, one.total, rtol=1e-5, atol=1e-5)
    one.total.backward()
    other.total.backward()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=name)
