"""The model component, and the weight of its loss."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from drivetrain import (
    CallbackContext,
    Component,
    ConfigError,
    DataError,
    Loss,
    ModelError,
    OptimizerComponent,
    Precision,
    Trainer,
    TrainingConfig,
    component,
    make_component,
)
from drivetrain_transformers import TransformersModel, locate, token_loss
from drivetrain_transformers.loss import summed_cross_entropy


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"max_duration": "1st", "standard_callbacks": False, **changes})


def batches(counts: list[int], width: int = 12) -> list[dict[str, torch.Tensor]]:
    """One sample for each count; that many of its labels count."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for count in counts:
        ids = torch.randint(300, (width,), generator=generator)
        labels = ids.clone()
        labels[: width - count] = -100
        samples.append({"input_ids": ids, "labels": labels})
    return samples


def trained(model: Any, samples: list[Any], size: int, accumulation: int, **given: Any) -> Trainer:
    """One SGD step over all samples in their order; the optimizer is a ready one so that no other plugin is needed."""
    table = config(
        per_device_batch_size=size, gradient_accumulation_steps=accumulation, dataloader={"shuffle": False}, max_grad_norm=False
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = Trainer(model, table, samples, optimizer=optimizer, precision=Precision(), **given)
    trainer.train()
    return trainer


def made(table: TrainingConfig | None = None, **options: Any) -> tuple[TransformersModel, Any]:
    """The component, and the model it makes in a run of `table`."""
    component = TransformersModel(**options)
    linear = torch.nn.Linear(1, 1)
    trainer = Trainer(linear, table or config(), [0], optimizer=torch.optim.SGD(linear.parameters(), lr=1.0))
    return component, component.make_model(trainer.ctx)


class TestLoss:
    def test_is_the_models_own_mean_times_its_tokens(self, make_llama: Callable[..., Any]) -> None:
        model = make_llama()
        batch = torch.utils.data.default_collate(batches([12, 5, 3]))
        outputs = model(**batch)
        loss = summed_cross_entropy(outputs.logits, batch["labels"])
        assert loss.weight == 11 + 5 + 3  # the first token of the first sample is predicted by nothing
        torch.testing.assert_close(loss.mean(), outputs.loss)

    def test_bf16_logits_are_summed_in_fp32(self) -> None:
        logits = torch.randn(1, 40, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
        labels = torch.arange(40)[None]
        expected = F.cross_entropy(logits[0, :-1].double(), labels[0, 1:], reduction="sum")
        torch.testing.assert_close(summed_cross_entropy(logits, labels).total.double(), expected, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("given", ["loss=token_loss", "loss_function"])
    def test_accumulation_over_unequal_tokens_is_one_big_batch(self, make_llama: Callable[..., Any], given: str) -> None:
        samples = batches([11, 2, 5, 1])

        def run(size: int, accumulation: int) -> Any:
            model = make_llama()
            if given == "loss_function":
                model.loss_function = summed_cross_entropy
                return trained(model, samples, size, accumulation).model
            return trained(model, samples, size, accumulation, loss=token_loss).model

        whole, parts = run(4, 1), run(1, 4)
        for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7, msg=name)

    def test_the_models_own_mean_does_not(self, make_llama: Callable[..., Any]) -> None:
        """Negative control: what transformers returns by itself is weighted by samples."""
        samples = batches([11, 2, 5, 1])
        whole = trained(make_llama(), samples, 4, 1).model
        parts = trained(make_llama(), samples, 1, 4).model
        assert (whole.lm_head.weight - parts.lm_head.weight).abs().max() > 1e-4

    def test_a_batch_without_labels_is_refused(self, make_llama: Callable[..., Any]) -> None:
        with pytest.raises(ModelError, match="the batch has no 'labels'"):
            token_loss(make_llama()(input_ids=torch.tensor([[1, 2]])), {"input_ids": None})


class TestModel:
    def test_from_a_configuration_alone(self, llama: dict[str, Any]) -> None:
        _, model = made(config=llama)
        assert (type(model).__name__, model.config.hidden_size, model.dtype) == ("LlamaForCausalLM", 32, torch.float32)
        outputs = model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]]))
        assert isinstance(outputs.loss, Loss)
        assert outputs.loss.weight == 2

    def test_also_of_a_model_that_gives_the_loss_its_vocabulary_by_position(self, llama: dict[str, Any]) -> None:
        _, model = made(config={**llama, "model_type": "gemma2", "head_dim": 8})
        outputs = model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]]))
        assert isinstance(outputs.loss, Loss)

    def test_from_a_directory_with_its_weights(self, model_dir: Path) -> None:
        _, model = made(path=str(model_dir), config={"attention_dropout": 0.25})
        saved = AutoModelForCausalLM.from_pretrained(model_dir)
        assert all(map(torch.equal, model.state_dict().values(), saved.state_dict().values()))
        assert model.config.attention_dropout == 0.25

    def test_from_scratch_takes_the_configuration_only(self, model_dir: Path) -> None:
        _, model = made(path=str(model_dir), from_scratch=True, dtype="bf16")
        saved = AutoModelForCausalLM.from_pretrained(model_dir)
        assert model.config.hidden_size == 32
        assert model.dtype == torch.bfloat16
        assert not torch.allclose(model.lm_head.weight.float(), saved.lm_head.weight, atol=1e-2)

    @pytest.mark.parametrize("scratch", [True, False])
    def test_a_mode_may_ask_for_new_weights(self, model_dir: Path, scratch: bool) -> None:
        class Mode(Component):
            kind: ClassVar[str] = "mode"
            from_scratch: ClassVar[bool] = scratch

        _, model = made(config(training_mode=component(Mode)()), path=str(model_dir))
        saved = AutoModelForCausalLM.from_pretrained(model_dir)
        assert torch.allclose(model.lm_head.weight, saved.lm_head.weight, atol=1e-2) is not scratch

    def test_model_name_stands_in_for_the_path(self, model_dir: Path) -> None:
        assert made(config(model_name=str(model_dir)))[1].name_or_path == str(model_dir)

    def test_what_it_saves_loads_in_transformers(self, model_dir: Path, tmp_path: Path) -> None:
        component, model = made(path=str(model_dir))
        component.save(model, tmp_path / "out")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert again.config.use_cache
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)
        assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|end|>"

    def test_it_saves_a_model_without_a_tokenizer_and_says_so(self, model_dir: Path, tmp_path: Path) -> None:
        for file in model_dir.glob("token*"):
            file.unlink()
        component, model = made(path=str(model_dir))
        with pytest.warns(UserWarning, match="without a tokenizer"):
            component.save(model, tmp_path / "out")
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({}, "path: is missing"),
            ({"config": {"hidden_size": 3}}, "config.model_type: must name an architecture"),
            ({"config": {"model_type": "lama"}}, "config.model_type: must name an architecture"),
            ({"config": {"model_type": "llama", "hidden_size": "wide"}}, "config: transformers does not take it"),
            (
                {"config": {"model_type": "llama", "hiden_size": 3}},
                "hiden_size: is no key of a llama model. Did you mean 'hidden_size'?",
            ),
        ],
    )
    def test_a_wrong_configuration(self, options: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigError, match=said.replace("(", r"\(").replace("?", r"\?")):
            made(**options)

    @pytest.mark.parametrize("path", ["./nowhere", "package:tokenizers/nothing.gguf", "models/x.gguf", "bad name"])
    def test_a_path_that_leads_nowhere(self, path: str) -> None:
        with pytest.raises(ModelError, match="nothing is at"):
            made(path=path)

    def test_a_hub_name_without_a_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ModelError, match="names on the hub need a network"):
            made(path="nobody/there-is-no-such-model")

    def test_pickled_weights_are_not_read(self, model_dir: Path) -> None:
        (model_dir / "model.safetensors").unlink()
        with open(model_dir / "pytorch_model.bin", "wb") as file:
            pickle.dump({"lm_head.weight": print}, file)
        with pytest.raises(ModelError, match="cannot be loaded"):
            made(path=str(model_dir))

    def test_a_file_cannot_switch_foreign_code_on(self) -> None:
        with pytest.raises(ConfigError, match="trust_remote_code"):
            make_component("model", {"use": "transformers", "path": "x", "trust_remote_code": True})

    def test_code_beside_a_model_is_not_run(self, model_dir: Path) -> None:
        text = (model_dir / "config.json").read_text()
        mapped = '"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"'
        (model_dir / "config.json").write_text(text.replace('"model_type": "llama"', mapped))
        (model_dir / "evil.py").write_text(f"open({str(model_dir / 'ran')!r}, 'w')")
        with pytest.raises(ModelError):
            made(path=str(model_dir))
        assert not (model_dir / "ran").exists()


@component
class Plain(OptimizerComponent):
    def make_optimizer(self, ctx: CallbackContext) -> torch.optim.Optimizer:
        return torch.optim.SGD(ctx.model.parameters(), lr=self.lr)


class TestEvaluation:
    def test_reports_bits_and_perplexity(self, llama: dict[str, Any]) -> None:
        component = TransformersModel(config=llama)
        samples = batches([11, 2, 5, 1])
        table = config(per_device_batch_size=1, model=component)
        trainer = Trainer(None, table, samples, samples, optimizer=Plain(), precision=Precision())
        values = trainer.evaluate()
        batch = torch.utils.data.default_collate(samples)
        expected = summed_cross_entropy(trainer.model(input_ids=batch["input_ids"]).logits, batch["labels"]).mean().item()
        assert values["eval/loss"] == pytest.approx(expected, rel=1e-5)
        assert values["eval/bits_per_token"] == pytest.approx(expected / math.log(2), rel=1e-5)
        assert values["eval/perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


class TestLocate:
    def test_finds_a_file_in_a_package_without_importing_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "carrier").mkdir()
        (tmp_path / "carrier" / "__init__.py").write_text("raise RuntimeError('imported')")
        (tmp_path / "lone.py").write_text("raise RuntimeError('imported')")
        monkeypatch.syspath_prepend(tmp_path)
        assert locate("package:carrier/weights.gguf") == tmp_path / "carrier" / "weights.gguf"
        assert locate("package:carrier") == tmp_path / "carrier"
        assert locate("package:lone") == tmp_path / "lone.py"

    @pytest.mark.parametrize(
        "path", ["package:not_there_at_all/x", "package:os.path", "package:", "package:sys", "package:ast/x"]
    )
    def test_says_what_is_wrong(self, path: str) -> None:
        with pytest.raises(DataError, match="package:"):
            locate(path)
