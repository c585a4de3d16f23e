"""Composing with the real Hydra: compose, groups, the README's program as a person would start it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf

from drivetrain import ConfigError, DrivetrainError, TrainingConfig, TrainingMode
from drivetrain_hydra import register, training_config

README = Path(__file__).parents[3] / "contrib" / "hydra" / "README.md"


@pytest.fixture(autouse=True)
def empty_store() -> Iterator[None]:
    """The store is one for the process: leave it as it was."""
    store = ConfigStore.instance()
    before, store.repo = store.repo, dict(store.repo)
    yield
    store.repo = before


def composed(folder: Path, text: str, *overrides: str) -> DictConfig:
    (folder / "train.yaml").write_text(text, encoding="utf-8")
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose("train", list(overrides))


class TestCompose:
    def test_values_types_and_origins(self, tmp_path: Path) -> None:
        (tmp_path / "size").mkdir()
        (tmp_path / "size" / "small.yaml").write_text("# @package _global_\nper_device_batch_size: 4\nseed: 7\n")
        text = """
            defaults: [{size: small}, _self_]
            name: digits
            training:
              run_name: ${name}-${seed}
              seed: ${seed}
              per_device_batch_size: ${per_device_batch_size}
              training_mode: pretraining
              max_duration: 10st
              eval_interval: false
              optimizer: {use: sgd, lr: 1e-3}
              callbacks: [early_stopping]
            """
        config = training_config(composed(tmp_path, text, "seed=9").training)
        assert (config.run_name, config.seed, config.per_device_batch_size) == ("digits-9", 9, 4)
        assert config.training_mode is TrainingMode.PRETRAINING and str(config.max_duration) == "10st"
        assert config.eval_interval is None and config.optimizer == {"use": "sgd", "lr": 0.001}
        assert config.callbacks == ["early_stopping"]
        assert config.origin("optimizer.lr") == config.origin("seed") == "hydra"
        assert config.origin("output_dir") == "default"

    def test_equals_the_same_keys_in_python(self, tmp_path: Path) -> None:
        keys = "max_duration: 5st\noutput_dir: there\ndataloader: {num_workers: 2}\n"
        there = TrainingConfig(max_duration="5st", output_dir="there", dataloader={"num_workers": 2})
        assert training_config(composed(tmp_path, keys)).to_dict() == there.to_dict()

    def test_callbacks_as_a_table(self, tmp_path: Path) -> None:
        text = "callbacks: {early_stopping: null, checkpoint: {every: 5st}}"
        config = training_config(composed(tmp_path, text, "callbacks.checkpoint.every=9st", "+callbacks.ema.decay=0.9"))
        assert config.callbacks == ["early_stopping", {"use": "checkpoint", "every": "9st"}, {"use": "ema", "decay": 0.9}]

    @pytest.mark.parametrize(
        ("text", "problems"),
        [
            (
                "sed: 1\nper_device_batch_size: '4'",
                {"sed": "Did you mean 'seed'", "per_device_batch_size": "expected a whole number"},
            ),
            ("seed: ???\noptimizer: {use: sgd, lr: '???'}", {"optimizer.lr": "must be given", "seed": "must be given"}),
            ("seed: ${nowhere}", {"seed": "nowhere"}),
            ("optimizer: {use: sgd, lr: '${oc.env:NO_SUCH_VARIABLE}'}", {"optimizer.lr": "NO_SUCH_VARIABLE"}),
            ("callbacks: {ema: 3}", {"callbacks.ema": "expected a table of its options"}),
            ("optimizer: 3", {"optimizer": "expected a name or a table"}),
        ],
    )
    def test_mistakes_name_the_key(self, tmp_path: Path, text: str, problems: dict[str, str]) -> None:
        with pytest.raises(ConfigError) as caught:
            training_config(composed(tmp_path, text))
        assert caught.value.source == "hydra"
        assert [problem.path for problem in caught.value.problems] == list(problems)
        for problem, said in zip(caught.value.problems, problems.values(), strict=True):
            assert said in problem.message

    def test_only_what_hydra_composed_is_taken(self) -> None:
        with pytest.raises(DrivetrainError, match="not a dict"):
            training_config({"seed": 1})  # type: ignore[arg-type]
        with pytest.raises(DrivetrainError, match="not a ListConfig"):
            training_config(OmegaConf.create([1]))  # type: ignore[arg-type]


class TestStore:
    def test_every_key_is_there_and_others_are_refused(self, tmp_path: Path) -> None:
        register()
        text = "defaults: [drivetrain, _self_]"
        assert training_config(composed(tmp_path, text)).to_dict() == TrainingConfig().to_dict()
        assert training_config(composed(tmp_path, text, "seed=3", "dataloader.num_workers=1")).dataloader.num_workers == 1
        with pytest.raises(ConfigCompositionException, match="sed"):
            composed(tmp_path, text, "sed=3")

    def test_a_group_has_a_choice_for_each_plugin(self, tmp_path: Path) -> None:
        register()
        text = "defaults: [drivetrain, {optimizer: adamw}, {distributed: ddp}, _self_]"
        config = training_config(composed(tmp_path, text, "optimizer=sgd", "optimizer.momentum=0.5", "+precision=bf16"))
        assert config.optimizer == {"use": "sgd", "momentum": 0.5}
        assert (config.distributed, config.precision) == ({"use": "ddp"}, {"use": "bf16"})
        wrong = training_config(composed(tmp_path, text, "optimizer=sgd", "optimizer.momentm=0.5"))
        with pytest.raises(ConfigError, match=r"optimizer\.sgd\.momentm: .*Did you mean 'momentum'"):
            wrong.components()
        with pytest.raises(MissingConfigException, match=r"optimizer/adamww"):
            composed(tmp_path, text, "optimizer=adamww")

    def test_several_callbacks(self, tmp_path: Path) -> None:
        register()
        text = "defaults: [drivetrain, {callbacks: [checkpoint]}, _self_]"
        config = training_config(
            composed(tmp_path, text, "callbacks=[checkpoint,early_stopping]", "callbacks.checkpoint.every=5st")
        )
        assert config.callbacks == [{"use": "checkpoint", "every": "5st"}, {"use": "early_stopping"}]

    def test_nothing_is_imported(self) -> None:
        modules = "[name for name in sys.modules if name == 'torch' or name.startswith('drivetrain_')]"
        code = f"import drivetrain_hydra, sys; drivetrain_hydra.register(); print({modules})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("['drivetrain_hydra']\n", "")


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The README's program and its configuration, in a folder of their own."""
    text = README.read_text(encoding="utf-8")
    for name, body in re.findall(r"^```(?:python|yaml)\n# (train\.\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(body, encoding="utf-8")
    return tmp_path


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "train.py", *arguments, "standard_callbacks=false"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "0"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=110)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*/checkpoints/step-*"))


class TestProgram:
    def test_the_readmes_program(self, program: Path) -> None:
        done = start(program, "optimizer=sgd", "optimizer.lr=0.1", "callbacks.checkpoint.every=60st", "hydra.run.dir=out")
        assert done.returncode == 0, done.stderr
        assert checkpoints(program / "out") == ["step-00000060", "step-00000064"]
        assert "use: sgd" in (program / "out" / ".hydra" / "config.yaml").read_text()

    @pytest.mark.slow
    def test_multirun_is_several_runs_of_one_process(self, program: Path) -> None:
        done = start(program, "--multirun", "seed=0,1", "max_duration=2st", "hydra.sweep.dir=out")
        assert done.returncode == 0, done.stderr
        assert [checkpoints(program / "out" / job) for job in "01"] == [["step-00000002"]] * 2

    def test_a_mistake_is_said_in_our_words(self, program: Path) -> None:
        done = start(program, "max_duration=5stp", "hydra.run.dir=out")
        assert done.returncode == 1
        assert "hydra: 1 problem\n  max_duration: " in done.stderr, done.stderr


def test_the_readme_has_the_program(program: Any) -> None:
    assert sorted(path.name for path in program.iterdir()) == ["train.py", "train.yaml"]
