"""A plugin beside the configuration: named in code or on the command line, under the rules of installed ones, never by a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from drivetrain import ConfigError, PluginError, TrainingConfig, load_training_config, make_component, registry

PLUGIN = '''
from pathlib import Path
from drivetrain import Callback, OptimizerComponent, component, option
Path("loaded").touch()

@component
class LossFloor(Callback):
    """Stops at a floor."""
    floor: float = option(default=0.0, help="stop below this loss")

@component
class _Hidden(Callback):
    """Not offered."""

@component
class Descent(OptimizerComponent):
    """An optimizer."""
    def make_optimizer(self, ctx): ...
'''


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    yield tmp_path


def test_in_code_its_components_have_names() -> None:
    config = TrainingConfig(plugins=["./my_plugin.py"], optimizer="descent", callbacks=[{"use": "loss_floor", "floor": 0.5}])
    made = config.components()
    assert type(made.single["optimizer"]).__name__ == "Descent"
    (callback,) = made.callbacks
    assert callback.options() == {"floor": 0.5}
    assert callback.plugin_name == "callback:loss_floor"
    assert callback.origin.startswith("my_plugin.py ")


def test_on_the_command_line(project: Path) -> None:
    (project / "run.toml").write_text('callbacks = ["loss_floor"]\n')
    config = load_training_config("run.toml", overrides=['plugins=["./my_plugin.py"]', "callbacks.loss_floor.floor=2.0"])
    (callback,) = config.components().callbacks
    assert callback.options() == {"floor": 2.0}


def test_a_configuration_file_cannot_load_code(project: Path) -> None:
    (project / "run.toml").write_text('plugins = ["./my_plugin.py"]\nseed = "x"\n')
    with pytest.raises(ConfigError) as raised:
        load_training_config("run.toml")
    problems = {problem.path: problem.message for problem in raised.value.problems}
    assert set(problems) == {"plugins", "seed"}, "reported with the others"
    assert "which a file may not do" in problems["plugins"]
    assert not (project / "loaded").exists()


def test_the_command_line_replaces_what_a_file_says(project: Path) -> None:
    (project / "run.toml").write_text('plugins = ["./evil.py"]\n')
    (project / "evil.py").write_text("raise SystemExit('ran')")
    assert load_training_config("run.toml", overrides=['plugins=["./my_plugin.py"]']).plugins == ["./my_plugin.py"]


def test_a_saved_configuration_says_what_is_missing(project: Path) -> None:
    TrainingConfig(plugins=["./my_plugin.py"], callbacks=["loss_floor"]).save(project / "config.json")
    assert json.loads((project / "config.json").read_text())["plugins"] == ["./my_plugin.py"]
    with pytest.raises(ConfigError, match="say it where you start the run"):
        load_training_config("config.json")
    assert load_training_config("config.json", overrides=['plugins=["./my_plugin.py"]']).components().callbacks


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("missing.py", None, "is no Python file"),
        ("data.txt", "", "is no Python file"),
        ("empty.py", "x = 1\n", "defines no component"),
        ("broken.py", "import not_there\n", "failed to load: ModuleNotFoundError"),
    ],
)
def test_files_that_are_no_plugins_are_problems_with_a_path(project: Path, name: str, code: str | None, said: str) -> None:
    if code is not None:
        (project / name).write_text(code)
    with pytest.raises(ConfigError) as raised:
        TrainingConfig(plugins=["./my_plugin.py", f"./{name}"])
    (problem,) = raised.value.problems
    assert problem.path == "plugins[1]"
    assert said in problem.message


def test_two_files_with_one_name_are_a_conflict_that_a_prefix_solves(project: Path) -> None:
    (project / "other.py").write_text(PLUGIN)
    with registry.naming(["my_plugin.py", "other.py"]):
        with pytest.raises(PluginError, match="2 installed distributions provide the callback 'loss_floor'"):
            registry.find("callback", "loss_floor")
        chosen = make_component("callback", "other.py:loss_floor")
    assert chosen.origin.startswith("other.py ")


def test_any_name_of_a_file_will_do_and_its_content_is_its_version(project: Path) -> None:
    for folder in ("one", "two"):
        (project / folder).mkdir()
        (project / folder / "my-own plugin.v2.py").write_text(PLUGIN)
    with registry.naming([f"{folder}/my-own plugin.v2.py" for folder in ("one", "two")]):
        first, second = registry.candidates("callback")["loss_floor"]
    assert first.version == second.version, "moving a file is no change of it"
    assert first.load() is not second.load()


def test_the_switch_for_plugins_holds_for_files_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with registry.naming(["my_plugin.py"]):
        assert registry.is_installed("callback", "loss_floor")
        monkeypatch.setenv("DRIVETRAIN_PLUGINS", "off")
        assert not registry.is_installed("callback", "loss_floor")


def test_a_private_class_is_not_offered() -> None:
    with registry.naming(["my_plugin.py"]):
        assert registry.is_installed("callback", "loss_floor")
        assert not registry.is_installed("callback", "_hidden")
        assert not registry.is_installed("callback", "hidden")


def test_an_edited_file_is_read_again_and_what_was_made_before_stays(project: Path) -> None:
    before = TrainingConfig(plugins=["./my_plugin.py"], callbacks=["loss_floor"])
    (old,) = before.components().callbacks
    (project / "my_plugin.py").write_text(PLUGIN.replace("default=0.0", "default=7.0"))
    (new,) = TrainingConfig(plugins=["./my_plugin.py"], callbacks=["loss_floor"]).components().callbacks
    assert (old.options(), new.options()) == ({"floor": 0.0}, {"floor": 7.0})
    assert old.origin != new.origin, "a run that goes on notices the change"


def test_a_file_has_names_for_the_configuration_that_names_it_and_for_no_other(project: Path) -> None:
    (project / "other.py").write_text(PLUGIN)
    configs = [TrainingConfig(plugins=[f"./{file}"], callbacks=["loss_floor"]) for file in ("my_plugin.py", "other.py")]

    def origin(config: TrainingConfig) -> str:
        (callback,) = config.components().callbacks
        return callback.origin.partition(" ")[0]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(origin, configs * 20)) == ["my_plugin.py", "other.py"] * 20
    assert not registry.is_installed("callback", "loss_floor")
    with pytest.raises(ConfigError, match="no plugin named 'loss_floor'"):
        TrainingConfig(callbacks=["loss_floor"]).components()


def test_a_mode_of_a_file_is_one_of_its_configuration(project: Path) -> None:
    (project / "modes.py").write_text(
        "from typing import ClassVar\nfrom drivetrain import Component, component\n"
        "@component\nclass Frozen(Component):\n    kind: ClassVar[str] = 'mode'\n"
    )
    assert TrainingConfig(plugins=["./modes.py"], training_mode="frozen").components().single["training_mode"].kind == "mode"
    config = TrainingConfig(plugins=["./modes.py"])
    config.training_mode = "frozen"
    assert config.mode_name == "frozen"
    with pytest.raises(ConfigError):
        TrainingConfig(training_mode="frozen")
