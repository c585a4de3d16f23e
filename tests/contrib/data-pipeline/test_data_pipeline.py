"""The documented interface of `data_pipeline.trainer`, word for word."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from torch import Tensor, nn

import data_pipeline.trainer
import drivetrain

HERE = Path(__file__).parent
DISTRIBUTION = HERE.parents[2] / "contrib" / "data-pipeline"

TRAINING = """\
from data_pipeline.trainer import Trainer, load_training_config

args = load_training_config("train_config.yaml")
trainer = Trainer(model=my_model, args=args, train_dataset=train_ds, eval_dataset=eval_ds)
output = trainer.train()
"""

CALLBACK = """\
class MyCallback(Callback):
    def on_step_end(self, ctx: CallbackContext):
        if ctx.loss < 0.1:
            print("Loss is low!")
"""

# The same call as the older documentation has it, one argument a line.
MODULE_DOCUMENTATION = """\
from data_pipeline.trainer import Trainer, load_training_config

args = load_training_config("train_config.yaml")

trainer = Trainer(
    model=my_model,
    args=args,
    train_dataset=train_ds,
    eval_dataset=eval_ds
)

# Start training
output = trainer.train()
"""

CONFIG = """\
training_mode: FULL_FINETUNE
run_name: documented
output_dir: out
max_duration: 4ep
per_device_batch_size: 8
precision: bf16
optimizer: {use: adamw, lr: 1e-2}
scheduler: cosine_with_restarts
callbacks:
  - {use: checkpoint, every: 10st, keep_last: 2}
  - {use: early_stopping, monitor: eval/loss, patience: 2}
"""

NAMES = {
    "base": {"Trainer"},
    "training_config": {"TrainingConfig", "TrainingMode", "load_training_config", "get_qlora_config", "get_pretraining_config"},
    "callbacks": {
        *("Callback", "CallbackContext", "ProgressCallback", "LoggingCallback", "CheckpointCallback", "EarlyStoppingCallback")
    },
    "distributed": {"DeviceManager", "GradientSynchronizer"},
}


class Line(nn.Module):
    """A model that returns its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.line(x), y)}


def line(count: int) -> list[dict[str, Tensor]]:
    return [{"x": torch.tensor([i / count]), "y": torch.tensor([3 * i / count + 1])} for i in range(count)]


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the documented code takes as given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train_config.yaml").write_text(CONFIG)
    torch.manual_seed(0)
    return {"my_model": Line(), "train_ds": line(64), "eval_ds": line(16)}


class TestDocumentedCode:
    @pytest.mark.parametrize("code", [TRAINING, MODULE_DOCUMENTATION])
    def test_training(self, names: dict[str, Any], tmp_path: Path, code: str) -> None:
        exec(code, names)
        output = names["output"]
        assert output.steps == 4 * 8
        assert output.completed
        assert output.losses[-1][1] < output.losses[0][1]
        assert output.metrics["eval/loss"] > 0
        assert output.run_dir.resolve() == tmp_path / "out" / "documented"
        assert output.checkpoint is not None

    def test_callback(self, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        exec("from data_pipeline.trainer import Callback, CallbackContext\n\n" + CALLBACK, names)
        config = drivetrain.TrainingConfig(max_duration="2st", standard_callbacks=False, optimizer={"use": "adamw", "lr": 0.0})
        trainer = drivetrain.Trainer(
            names["my_model"],
            config,
            names["train_ds"],
            callbacks=[names["MyCallback"]()],
            loss=lambda outputs, batch: outputs["loss"] * 0.0,
        )
        trainer.train()
        assert capsys.readouterr().out == "Loss is low!\n" * 2

    def test_the_readme_shows_the_same(self) -> None:
        readme = (DISTRIBUTION / "README.md").read_text(encoding="utf-8")
        for code in (TRAINING, CALLBACK):
            assert f"```python\n{code}```" in readme


class TestNames:
    @pytest.mark.parametrize("module", NAMES)
    def test_of_each_module_are_those_of_drivetrain(self, module: str) -> None:
        loaded = importlib.import_module(f"data_pipeline.trainer.{module}")
        assert set(loaded.__all__) == NAMES[module]
        for name in NAMES[module]:
            assert getattr(loaded, name) is getattr(drivetrain, name)
            assert getattr(data_pipeline.trainer, name) is getattr(drivetrain, name)

    def test_the_package_has_all_of_them(self) -> None:
        assert set(data_pipeline.trainer.__all__) == set().union(*NAMES.values())

    def test_other_names_do_not_exist(self) -> None:
        with pytest.raises(AttributeError, match=r"module 'data_pipeline\.trainer\.base' has no attribute 'Trainr'"):
            importlib.import_module("data_pipeline.trainer.base").Trainr  # noqa: B018
        with pytest.raises(ImportError):
            exec("from data_pipeline.trainer import load")

    def test_presets(self) -> None:
        from data_pipeline.trainer import TrainingConfig, TrainingMode, get_pretraining_config

        config = get_pretraining_config("my-model", compile=False)
        assert isinstance(config, TrainingConfig)
        assert config.training_mode is TrainingMode.PRETRAINING
        made = config.components().single  # each component it names exists and takes its options
        assert {"optimizer", "scheduler", "precision"} <= set(made)

    def test_importing_the_module_imports_no_torch(self) -> None:
        code = "import sys, data_pipeline.trainer, data_pipeline.trainer.callbacks; print('torch' in sys.modules)"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (result.stdout.strip(), result.stderr) == ("False", "")


class TestNamespace:
    def test_other_distributions_live_beside_it(self, tmp_path: Path) -> None:
        other = tmp_path / "data_pipeline" / "other"
        other.mkdir(parents=True)
        (other / "__init__.py").write_text("here = 'beside'\n")
        code = "from data_pipeline.other import here; from data_pipeline.trainer import TrainingMode as M; print(here, M.QLORA)"
        for path in (f"sys.path.insert(0, {str(tmp_path)!r})", f"sys.path.append({str(tmp_path)!r})"):
            result = subprocess.run([sys.executable, "-c", f"import sys; {path}; {code}"], capture_output=True, text=True)
            assert (result.stdout.strip(), result.stderr) == ("beside TrainingMode.QLORA", "")

    def test_the_wheel_leaves_the_namespace_open(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        flit = pytest.importorskip("flit_core.buildapi", reason="needs the build backend")
        monkeypatch.chdir(DISTRIBUTION)
        wheel = tmp_path / flit.build_wheel(str(tmp_path))
        with ZipFile(wheel) as archive:
            files = {name for name in archive.namelist() if ".dist-info/" not in name}
        own = ("__init__.py", "py.typed", "lazy.py", *(f"{module}.py" for module in NAMES))
        assert files == {f"data_pipeline/trainer/{name}" for name in own}
