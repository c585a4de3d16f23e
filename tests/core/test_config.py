"""Strict configuration: every mistake at once, each at its place; every value knows where it came from."""

from __future__ import annotations

import json
import math
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import pytest

from drivetrain import (
    Callback,
    ConfigError,
    Duration,
    TrainingConfig,
    TrainingMode,
    component,
    load_training_config,
    option,
    registry,
)
from drivetrain.components import make_component
from drivetrain.formats import read_table, to_toml


def write(tmp_path: Path, text: str, name: str = "run.toml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def problems(error: pytest.ExceptionInfo[ConfigError]) -> dict[str, str]:
    return {p.path: p.message for p in error.value.problems}


@pytest.fixture(autouse=True)
def core_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVETRAIN_PLUGINS", "off")


def test_all_problems_come_at_once_with_their_places(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        sede = 3
        max_duration = "3"
        per_device_batch_size = "8"
        gradient_accumulation_steps = 0
        compile = 1
        callbacks = ["early_stoping", 3]
        [optimizer]
        use = "adamv"
        [dataloader]
        num_workers = -1
        shufle = true
        """,
    )
    with pytest.raises(ConfigError) as caught:
        load_training_config(path)
    found = problems(caught)
    assert found["sede"] == "unknown key. Did you mean 'seed'?"
    assert found["max_duration"].startswith("expected a duration, got '3'")
    assert found["per_device_batch_size"] == "expected a whole number, got the text '8' (remove the quotes)"
    assert found["gradient_accumulation_steps"] == "must be at least 1, got 0"
    assert found["compile"] == "expected true or false, got 1"
    assert "callbacks[1]" in found
    assert found["dataloader.shufle"] == "unknown key. Did you mean 'shuffle'?"
    assert "pip install drivetrain-optimizers" in found["optimizer"]
    assert str(caught.value).startswith(f"{path}: ")


def test_standard_callbacks_are_there_once() -> None:
    """Two would write each value twice, or contend for the run's directory."""
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(callbacks=["progress", {"use": "checkpoint"}, "ema", "checkpoint", {"use": "ema", "decay": 0.9}])
    assert problems(caught) == {"callbacks[3]": "'checkpoint' cannot be there twice: leave one out"}


def test_a_text_is_never_a_number() -> None:
    for wrong in ("3e-4", True, [1.0], {}, float("nan"), -1):
        with pytest.raises(ConfigError):
            TrainingConfig(max_grad_norm=wrong)
    assert TrainingConfig(max_grad_norm=1).max_grad_norm == 1.0
    assert TrainingConfig(max_grad_norm=False).max_grad_norm is None


@pytest.mark.parametrize("key", ["max_grad_norm", "eval_interval", "global_batch_size"])
@pytest.mark.parametrize("word", ["null", "none", "None"])
def test_the_word_for_none_is_named(key: str, word: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: expected .*'{word}'.* \(none is written false\)$"):
        TrainingConfig(**{key: word})


@pytest.mark.parametrize("name", ["QLORA", "qlora", "QLoRA"])
def test_modes_in_any_case(name: str) -> None:
    assert TrainingConfig(training_mode=name).training_mode is TrainingMode.QLORA


def test_an_unknown_mode_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'pretraining'"):
        TrainingConfig(training_mode="pretrainin")


def test_origins(tmp_path: Path) -> None:
    path = write(tmp_path, 'seed = 4\noutput_dir = "elsewhere"\n[dataloader]\nnum_workers = 2\n')
    config = load_training_config(path, ["dataloader.shuffle=false", "seed=5"])
    assert (config.seed, config.dataloader.num_workers, config.dataloader.shuffle) == (5, 2, False)
    assert config.origin("seed") == "override"
    assert config.origin("output_dir") == "run.toml"
    assert config.origin("dataloader.num_workers") == "run.toml"
    assert config.origin("dataloader.shuffle") == "override"
    assert config.origin("max_duration") == "default"
    config.seed = 6
    assert config.origin("seed") == "python"
    rows = {key: (value, origin) for key, value, origin in config.explain()}
    assert rows["dataloader.num_workers"] == (2, "run.toml")
    assert rows["dataloader.shuffle"] == (False, "override")
    assert rows["dataloader.prefetch_factor"] == (2, "default")
    assert rows["compile"] == (False, "default")
    assert rows["seed"] == (6, "python")


def test_what_is_taken_away_and_what_is_not_set_are_explained_as_well(tmp_path: Path) -> None:
    path = write(tmp_path, "max_grad_norm = false\n")
    config = load_training_config(path, ["eval_interval=false", "run_name=false"])
    rows = {key: (value, origin) for key, value, origin in config.explain()}
    assert rows["max_grad_norm"] == (False, "run.toml")
    assert rows["eval_interval"] == (False, "override")
    assert rows["run_name"] == (None, "override")
    assert rows["global_batch_size"] == (None, "default")
    assert {key.split(".")[0] for key in rows} == set(config.to_dict())
    assert TrainingConfig.from_table(config.to_dict(full=True)).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected key=value"),
        ("=3", "expected key=value"),
        ("a..b=3", "expected key=value"),
        ("sede=3", "unknown key"),
        ("seed=x", "whole number"),
        ("seed.x=1", "seed is 1 in the file, which has nothing below it"),
        ("log_interval.x=1", "log_interval"),
        ("compile.x=1", "compile is True in the file"),
        ("dataloader.num_workers.x=1", "'num_workers' is not a table"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_training_config(
            write(tmp_path, 'seed = 1\nlog_interval = "5st"\ncompile = true\ndataloader = {num_workers = 2}'), [override]
        )


def test_overrides_reach_into_components(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, 'optimizer = "adamw"\ncallbacks = ["a", {use = "b", x = 1}]\n'))
    from drivetrain.config import _override

    for text in ("optimizer.lr=6e-4", "callbacks.b.x=2", "callbacks.c.every=100st", "scheduler.warmup=5%"):
        _override(table, text)
    assert table["optimizer"] == {"use": "adamw", "lr": 6e-4}
    assert table["callbacks"] == ["a", {"use": "b", "x": 2}, {"use": "c", "every": "100st"}]
    assert table["scheduler"] == {"warmup": "5%"}


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_round_trip_through_a_file(tmp_path: Path, suffix: str) -> None:
    config = TrainingConfig(
        training_mode="full_finetune",
        model_name='a "quoted" näme\twith a tab',
        max_duration="2h",
        output_dir="some/where",
        log_interval="7st",
        eval_interval=False,
        dataloader={"num_workers": 3},
        resume="never",
        max_grad_norm=float("inf"),
    )
    path = tmp_path / f"config.{suffix}"
    config.save(path)
    again = load_training_config(path)
    assert again.to_dict() == config.to_dict()
    assert again.model_name == 'a "quoted" näme\twith a tab'
    assert again.max_grad_norm == float("inf")
    assert again.eval_interval is None


def test_no_strategy_is_saved_by_its_word(tmp_path: Path) -> None:
    config = TrainingConfig(distributed=None)
    config.save(tmp_path / "config.toml")
    assert load_training_config(tmp_path / "config.toml").distributed == config.distributed == "none"
    assert config.optimizer is None
    assert config.strategy_spec() is None


def test_toml_writer_agrees_with_the_reader() -> None:
    import tomli

    table: dict[str, Any] = {
        "a": 1,
        "b": 1e-8,
        "c": [1.5, 2.0],
        "d": 'x\\y\n"z"\x7f\u2028',
        "e": [{"use": "f", "g h": True}],
        "t": {"i": {"j": 1}},
        "inf": float("inf"),
    }
    assert tomli.loads(to_toml(table)) == table


def test_json_is_strict(tmp_path: Path) -> None:
    for text, message in (
        ('{"seed": 1, "seed": 2}', "stands twice"),
        ('{"max_grad_norm": NaN}', "NaN"),
        ("[1]", "table"),
        ("{", "JSON"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_training_config(write(tmp_path, text, "run.json"))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml.*\n.*No such file"):
        load_training_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="'ini' cannot be read"):
        load_training_config(write(tmp_path, "", "run.ini"))
    with pytest.raises(ConfigError, match="pip install drivetrain-yaml"):
        load_training_config(write(tmp_path, "", "run.yaml"))
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_training_config(write(tmp_path, "a = = 3"))
    path = tmp_path / "big.toml"
    path.write_bytes(b"#" * (2 << 20))
    with pytest.raises(ConfigError, match="larger than"):
        load_training_config(path)
    path = tmp_path / "bytes.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_training_config(path)


def test_contradictions() -> None:
    with pytest.raises(ConfigError, match="gradient_accumulation_steps"):
        TrainingConfig(global_batch_size=8, gradient_accumulation_steps=2)
    with pytest.raises(ConfigError, match="percentage"):
        TrainingConfig(max_duration="10%")


@pytest.mark.parametrize(
    "name", ["../x", "/abs", "a/b", "a\0b", "", ".hidden", "x" * 101, "a\nb", "~", "CON", "nul", "com1.txt", "a."]
)
def test_run_names_that_are_no_directory_names(name: str) -> None:
    with pytest.raises(ConfigError, match="run_name"):
        TrainingConfig(run_name=name)


@pytest.mark.parametrize("path", ["x" * 256, "x/" * 2000, "a\0b", "\ud800"])
def test_output_dirs_that_are_no_paths(path: str) -> None:
    with pytest.raises(ConfigError, match="output_dir: cannot be a path"):
        TrainingConfig(output_dir=path)


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("3ep", 3, "ep"),
        ("1000st", 1000, "st"),
        ("1e9tok", 1e9, "tok"),
        ("2h", 7200, "s"),
        ("90min", 5400, "s"),
        ("5%", 5, "%"),
        ("1_000sp", 1000, "sp"),
        (".5ep", 0.5, "ep"),
    ],
)
def test_durations(text: str, value: float, unit: str) -> None:
    parsed = Duration.parse(text)
    assert (parsed.value, parsed.unit) == (value, unit)
    assert Duration.parse(str(parsed)) == parsed


@pytest.mark.parametrize("text", ["3", "ep", "-1ep", "0st", "1.5st", "1e999st", "3 epochs", "", "nanep", "1e-400ep", "3ep 4st"])
def test_wrong_durations(text: str) -> None:
    with pytest.raises(ValueError, match=r"duration|whole number"):
        Duration.parse(text)


@pytest.mark.parametrize(
    ("value", "unit"), [(0, "st"), (-1, "ep"), (2.5, "st"), (math.nan, "s"), (math.inf, "tok"), (1, "steps")]
)
def test_wrong_durations_from_code(value: float, unit: str) -> None:
    with pytest.raises(ValueError, match=r"duration|whole number|unit"):
        Duration(value, unit)


def test_large_durations_keep_every_digit() -> None:
    assert str(Duration.parse("1234567891st")) == "1234567891st"


@component
class Example(Callback):
    """An example."""

    ratio: float = option(default=0.5, help="a ratio")
    every: Duration = option(default=Duration(5, "st"))
    sizes: list[int] = option(factory=list)
    mode: str | None = option(default=None)


def test_python_and_file_hold_components_to_the_same_types() -> None:
    made = make_component("callback", Example(ratio=1, every="10st", sizes=[1, 2]))
    assert isinstance(made, Example)
    assert (made.ratio, made.every, made.sizes) == (1.0, Duration(10, "st"), [1, 2])
    assert made.options() == {"ratio": 1.0, "every": "10st", "sizes": [1, 2], "mode": None}
    with pytest.raises(ConfigError) as caught:
        make_component("callback", Example(ratio="1", sizes=[1, "2"], mode=3))
    assert set(problems(caught)) == {"Example.ratio", "Example.sizes[1]", "Example.mode"}


@component
class Named(Callback):
    """One that an entry point names."""

    ratio: float | None = option(default=0.5, help="none for none")


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_components_made_in_python_go_through_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """Under the names that their distributions give them, used before or not; a class without a name is refused at once."""
    pytest.importorskip("drivetrain_early_stopping")
    from drivetrain_early_stopping import EarlyStoppingCallback

    monkeypatch.setenv("DRIVETRAIN_PLUGINS", "early_stopping,named")
    entry = metadata.EntryPoint("named", f"{__name__}:Named", "drivetrain.callback")
    made = registry.Candidate("callback", "named", "x", "1", entry.value, (), entry)
    monkeypatch.setattr(registry, "_named", ContextVar("named", default=(made,)))

    config = TrainingConfig(callbacks=[EarlyStoppingCallback(patience=3), Named(ratio=None)])
    path = tmp_path / f"config.{suffix}"
    config.save(path)
    assert [spec["use"] for spec in read_table(path)["callbacks"]] == ["early_stopping", "named"]
    config.components()  # as a run does, which gives them names
    config.save(path)
    again = load_training_config(path)
    early, named = again.components().callbacks
    assert (early.options(), named.options()) == tuple(thing.options() for thing in config.callbacks)

    config.callbacks = [EarlyStoppingCallback(), Example()]
    with pytest.raises(ConfigError, match=r"callbacks\[1\]: Example has no name that a file could hold"):
        config.save(path)


def test_config_never_names_a_callable(tmp_path: Path) -> None:
    """Only registry names: a dotted path in a file is looked up as a name and refused, nothing is imported."""
    for name in ("os.system", "os:system", "builtins.eval", "torch.hub.load", "subprocess:run"):
        with pytest.raises(ConfigError, match="no plugin named"):
            load_training_config(write(tmp_path, json.dumps({"optimizer": {"use": name}}), "run.json"))


class TestLimits:
    @component
    class Limited(Callback):
        share: float = option(default=0.5, at_least=0, below=1)
        steps: int | None = option(default=None, above=0, at_most=10)
        least: float = option(default=1.0, at_least=0)
        free: float = option(default=math.inf)
        betas: tuple[float, float] = option(default=(0.0, 0.9), at_least=0, below=1)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("share", -0.1, "must be at least 0 and below 1, got -0.1"),
            ("share", 1.0, "must be at least 0 and below 1, got 1.0"),
            ("share", math.nan, "must be at least 0 and below 1, got nan"),
            ("least", math.inf, "must be finite, got inf"),
            ("steps", 0, "must be above 0 and at most 10, got 0"),
            ("steps", 11, "must be above 0 and at most 10, got 11"),
            ("betas", (0.5, 1.0), "must be at least 0 and below 1, got 1.0"),
        ],
    )
    def test_a_number_outside_is_named(self, name: str, value: Any, message: str) -> None:
        with pytest.raises(ConfigError) as at_making:
            self.Limited(**{name: value})
        made = self.Limited()
        with pytest.raises(ConfigError) as at_setting:
            setattr(made, name, value)
        for error in (at_making.value, at_setting.value):
            assert [(problem.path, problem.message) for problem in error.problems] == [(name, message)]

    @pytest.mark.parametrize("given", [{"share": 0}, {"share": 0.99}, {"steps": 10}, {"steps": None}, {"betas": (0.0, 0.0)}])
    def test_the_ends_and_none_are_within(self, given: dict[str, Any]) -> None:
        made = self.Limited(**given)
        assert {name: getattr(made, name) for name in given} == given

    @pytest.mark.parametrize(("name", "value"), [("num_workers", -5), ("num_workers", "two"), ("prefetch_factor", 0)])
    def test_a_table_of_the_configuration_checks_what_is_assigned(self, name: str, value: Any) -> None:
        config = TrainingConfig()
        with pytest.raises(ConfigError, match=rf"dataloader\.{name}: "):
            setattr(config.dataloader, name, value)
        config.dataloader.num_workers = 2
        assert config.dataloader.num_workers == 2

    def test_gradients_may_be_measured_without_being_clipped(self) -> None:
        assert TrainingConfig(max_grad_norm=math.inf).max_grad_norm == math.inf

    def test_a_table_names_every_key_outside(self) -> None:
        with pytest.raises(ConfigError) as caught:
            TrainingConfig(dataloader={"num_workers": -1, "prefetch_factor": 0})
        assert [problem.path for problem in caught.value.problems] == ["dataloader.num_workers", "dataloader.prefetch_factor"]


def test_an_option_may_have_several_validators_and_is_named_by_each() -> None:
    @component
    class Bounded(Callback):
        count: int = option(default=1, validator=[attrs.validators.ge(1), attrs.validators.le(3)])

    assert Bounded(count=3).count == 3
    for count in (0, 4):
        with pytest.raises(ConfigError, match="\n  count: "):
            Bounded(count=count)
