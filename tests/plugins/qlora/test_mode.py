"""Runs in the mode: what is trained, what is saved, and what becomes of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drivetrain import (
    ConfigError,
    DrivetrainError,
    ModelError,
    OptimizerComponent,
    PluginError,
    Precision,
    Trainer,
    TrainingConfig,
)
from drivetrain import component as drivetrain_component
from drivetrain_qlora import QLoRA, merge
from drivetrain_qlora.export import Export, restored, write


@drivetrain_component
class Adam(OptimizerComponent):
    """torch's Adam: tests need no other plugin."""

    lr: float = 1e-2

    def make_optimizer(self, ctx: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameter_groups(ctx.model), lr=self.lr)


class Bf16(Precision):
    """Autocast, as the precision plugin does it."""

    name, dtype = "bf16", torch.bfloat16

    def forward(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16)


def trainer_of(model: nn.Module, samples: Any, steps: int = 6, precision: Precision | None = None, **options: Any) -> Trainer:
    config = TrainingConfig(
        training_mode=QLoRA(**options),
        max_duration=f"{steps}st",
        per_device_batch_size=4,
        standard_callbacks=False,
        log_interval="1st",
    )
    return Trainer(model, config, samples, optimizer=Adam(), precision=precision or Precision())


def logits(model: Any, samples: list[Any], autocast: bool = False) -> Tensor:
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found: Tensor = model(input_ids=torch.stack([s["input_ids"] for s in samples])).logits.float()
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


VARIANTS = [{}, {"quantize": False}, {"dora": True}, {"dora": True, "quantize": False}]


class TestTraining:
    @pytest.mark.parametrize("options", VARIANTS, ids=str)
    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_learns_with_adapters_alone(
        self, make_model: Callable[..., Any], samples: list[Any], kind: str, options: dict[str, Any]
    ) -> None:
        trainer = trainer_of(make_model(kind), samples, steps=12, precision=Bf16(), **options)
        before = weights(trainer.model)
        output = trainer.train()
        after = weights(trainer.model)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed and all("lora_" in name for name in changed)
        assert changed >= {name for name in before if "lora_B" in name}
        assert output.losses[-1][1] < output.losses[0][1] - 0.2

    @pytest.mark.parametrize("options", VARIANTS, ids=str)
    def test_begins_as_the_base_model(
        self, make_model: Callable[..., Any], samples: list[Any], options: dict[str, Any]
    ) -> None:
        trainer = trainer_of(make_model(), samples, **options)
        adapted = logits(trainer.model, samples)
        torch.testing.assert_close(adapted, logits(trainer.model.unload(), samples), rtol=1e-4, atol=1e-5)

    def test_the_formula(self, make_model: Callable[..., Any], samples: list[Any]) -> None:
        """W x + (alpha / r) B A x, with W as it is held in four bits."""
        model = trainer_of(make_model(), samples, r=3, alpha=6, target_modules=["q_proj"]).model
        layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").eval()
        a, b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
        assert (tuple(a.shape), tuple(b.shape)) == ((3, 64), (64, 3))
        nn.init.normal_(b)
        x = torch.randn(5, 64)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), layer.base_layer(x) + 2 * x @ a.T @ b.T, rtol=1e-4, atol=1e-5)

    def test_the_same_seed_gives_the_same_adapters_and_disturbs_nobody(
        self, make_model: Callable[..., Any], samples: list[Any]
    ) -> None:
        torch.manual_seed(1)
        first = trainer_of(make_model(), samples).model.state_dict()
        torch.manual_seed(2)
        state = torch.get_rng_state()
        model = make_model()
        torch.set_rng_state(state)
        second = trainer_of(model, samples).model.state_dict()
        assert torch.equal(torch.get_rng_state(), state)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_embeddings_and_head_are_halved_norms_are_not(self, make_model: Callable[..., Any], samples: list[Any]) -> None:
        model: Any = trainer_of(make_model(), samples, precision=Bf16()).model
        base = model.get_base_model()
        assert base.model.embed_tokens.weight.dtype == base.lm_head.weight.dtype == torch.bfloat16
        assert base.model.norm.weight.dtype == base.model.layers[0].input_layernorm.weight.dtype == torch.float32
        assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.dtype == torch.float32

    def test_activation_checkpointing_changes_no_gradient(self, make_model: Callable[..., Any], samples: list[Any]) -> None:
        results = []
        for wanted in (False, True):
            trainer_config = TrainingConfig(
                training_mode=QLoRA(dropout=0.0),
                max_duration="2st",
                standard_callbacks=False,
                activation_checkpointing=wanted,
            )
            trainer = Trainer(make_model(), trainer_config, samples, optimizer=Adam(), precision=Precision())
            trainer.train()
            results.append(trainer.model.state_dict())
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6)

    def test_any_module(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        x = torch.randn(64, 8)
        data = list(zip(x, x.sum(1, keepdim=True), strict=True))
        config = TrainingConfig(
            training_mode={"use": "qlora", "r": 4, "dropout": 0.0},
            max_duration="20ep",
            standard_callbacks=False,
            log_interval="1st",
        )
        trainer = Trainer(net, config, data, loss=nn.MSELoss(), optimizer=Adam(), precision=Precision())
        output = trainer.train()
        assert output.losses[-1][1] < 0.5 * output.losses[0][1]
        state = trainer.model.state_dict()
        assert {name.partition("model.")[2] for name in state if "running" in name} == {
            "model.1.running_mean",
            "model.1.running_var",
        }
        expected = trainer.model.eval()(x)
        torch.testing.assert_close(merge(trainer.model).eval()(x), expected, rtol=1e-4, atol=1e-5)


class TestState:
    def test_holds_the_adapters_alone(self, make_model: Callable[..., Any], samples: list[Any]) -> None:
        for kind in ("llama", "tied", "gpt2"):
            trainer = trainer_of(make_model(kind), samples)
            state = trainer.state_dict()["model"]
            assert state.keys() == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
            assert all("lora_" in name for name in state)

    def test_missing_adapters_and_strangers_are_still_refused(self, make_model: Callable[..., Any], samples: list[Any]) -> None:
        model = trainer_of(make_model(), samples).model
        state = dict(model.state_dict())
        model.load_state_dict(state)
        with pytest.raises(RuntimeError, match="Unexpected key"):
            model.load_state_dict({**state, "stranger": torch.zeros(1)})
        state.pop(next(iter(state)))
        with pytest.raises(RuntimeError, match=r"Missing key.*lora_A"):
            model.load_state_dict(state)

    @pytest.mark.parametrize("options", [{}, {"quantize": False, "dora": True}], ids=str)
    def test_a_resumed_run_ends_bit_equal(
        self, make_model: Callable[..., Any], samples: list[Any], options: dict[str, Any]
    ) -> None:
        def built() -> Trainer:
            return trainer_of(make_model(), samples, steps=6, precision=Bf16(), **options)

        whole = built()
        whole.train()
        first, saved = built(), {}
        for step in first.steps():
            if step.number == 3:
                saved = clone(first.state_dict())
                break
        second = built()
        second.load_state_dict(saved)
        second.train()
        torch.testing.assert_close(second.output.losses, whole.output.losses[3:], rtol=0, atol=0)
        torch.testing.assert_close(dict(second.model.state_dict()), dict(whole.model.state_dict()), rtol=0, atol=0)

    def test_another_base_model_is_refused(self, make_model: Callable[..., Any], samples: list[Any]) -> None:
        saved = trainer_of(make_model(), samples).state_dict()
        trainer_of(make_model(), samples).load_state_dict(saved)
        trainer_of(make_model(dtype=torch.bfloat16), samples).load_state_dict(saved)  # the same one, stored otherwise
        with pytest.raises(ModelError, match="the base model is another one"):
            trainer_of(make_model(seed=1), samples).load_state_dict(saved)


def clone(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.clone()
    if isinstance(tree, Mapping):
        return {key: clone(value) for key, value in tree.items()}
    return [clone(value) for value in tree] if isinstance(tree, list) else tree


class TestMerging:
    @pytest.mark.parametrize("options", VARIANTS, ids=str)
    @pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
    def test_is_the_trained_function(
        self, make_model: Callable[..., Any], samples: list[Any], kind: str, options: dict[str, Any]
    ) -> None:
        plain = make_model(kind)
        names = set(plain.state_dict())
        base = logits(plain, samples)
        trainer = trainer_of(plain, samples, **options)
        trainer.train()
        trained = logits(trainer.model, samples)
        merged: Any = merge(trainer.model)
        torch.testing.assert_close(logits(merged, samples), trained, rtol=1e-4, atol=1e-4)
        assert (trained - base).abs().max() > 0.1, "training did something"
        assert set(merged.state_dict()) == names
        assert type(merged) is type(make_model(kind))

    def test_of_a_16_bit_run(self, make_model: Callable[..., Any], samples: list[Any]) -> None:
        trainer = trainer_of(make_model(dtype=torch.bfloat16), samples, precision=Bf16())
        trainer.train()
        trained = logits(trainer.model, samples, autocast=True)
        merged = merge(trainer.model, torch.bfloat16)
        assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
        assert (logits(merged, samples) - trained).std() < 0.05 * trained.std()

    def test_needs_adapters(self) -> None:
        with pytest.raises(ModelError, match="Linear has no adapters to merge"):
            merge(nn.Linear(1, 1))


class TestMistakes:
    def test_targets_that_do_not_exist_name_the_nearest(self, make_model: Callable[..., Any], samples: list[Any]) -> None:
        with pytest.raises(ConfigError) as caught:
            trainer_of(make_model(), samples, target_modules=["q_proj", "v_prj", "layers"])
        assert [p.path for p in caught.value.problems] == [f"training_mode.qlora.target_modules[{n}]" for n in (1, 2)]
        assert "'v_prj' names no linear layer of the model; there are v_proj" in str(caught.value)

    def test_no_linear_layer(self) -> None:
        with pytest.raises(ModelError, match="Sequential has no linear layer"):
            trainer_of(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(1, 1)), [0])

    def test_bitsandbytes_that_does_not_work(
        self, make_model: Callable[..., Any], samples: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        monkeypatch.delitem(sys.modules, "drivetrain_qlora.quantize")
        with pytest.raises(PluginError, match=r"bitsandbytes, which quantizes, does not work here.*quantize = false"):
            trainer_of(make_model(), samples)

    @pytest.mark.parametrize("options", [{"r": 0}, {"dropout": 1.0}, {"alpha": -1}, {"r": "8"}])
    def test_options(self, options: dict[str, Any]) -> None:
        config = TrainingConfig(training_mode={"use": "qlora", **options})
        with pytest.raises(ConfigError, match=rf"training_mode.qlora.{next(iter(options))}"):
            config.components()


class TestExport:
    def test_a_directory_that_is_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(DrivetrainError, match=r"is no run of drivetrain train \(no config.json\)"):
            restored(tmp_path)

    def test_what_exists_is_not_written_over(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(DrivetrainError, match="is not an empty directory"):
            run_export(tmp_path, tmp_path)

    def test_a_type_goes_with_merging(self, tmp_path: Path) -> None:
        with pytest.raises(DrivetrainError, match="--dtype goes with --merge"):
            run_export(tmp_path, tmp_path / "out", "--dtype", "fp32")

    def test_a_plain_module_becomes_one_file(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        config = TrainingConfig(standard_callbacks=False)
        trainer = Trainer(model, config, [0], optimizer=torch.optim.SGD(model.parameters()), precision=Precision())
        write(trainer, model, tmp_path / "out")
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def run_export(*words: Any) -> int:
    import argparse

    command = Export()
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(list(map(str, words))))
