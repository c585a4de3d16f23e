"""`drivetrain config show` and `explain`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tomli

from drivetrain import load_training_config


class TestShow:
    def test_has_what_was_written_what_was_overridden_and_the_defaults(self, drivetrain: Any) -> None:
        table = tomli.loads(drivetrain("config", "show", "run.toml", "optimizer.lr=0.5").out)
        assert table["max_duration"] == "2ep"
        assert table["optimizer"] == {"use": "plain_sgd", "lr": 0.5}
        assert table["model"] == {"use": "line", "inputs": 4}
        assert table["dataloader"]["num_workers"] == 0
        assert table["callbacks"] == [{"use": "keep"}]

    @pytest.mark.parametrize(
        "override", ["seed=1", "eval_interval=false", "max_grad_norm=false", "model_name='a\\u001b[2J\"b'"]
    )
    def test_is_a_configuration_that_gives_the_same_run(self, drivetrain: Any, project: Path, override: str) -> None:
        text = drivetrain("config", "show", "run.toml", override).out
        (project / "again.toml").write_text(text)
        assert drivetrain("config", "show", "again.toml").out == text
        original = load_training_config("run.toml", overrides=[override])
        assert load_training_config("again.toml").to_dict(full=True) == original.to_dict(full=True)

    def test_names_what_is_not_set(self, drivetrain: Any) -> None:
        out = drivetrain("config", "show", "run.toml").out
        assert "# global_batch_size is not set\n" in out
        assert "None" not in out

    def test_mistakes_are_those_of_train(self, drivetrain: Any) -> None:
        said = drivetrain("config", "show", "run.toml", "sedd=1", "optimizer.lr='x'")
        assert (said.code, said.out, said.err) == (2, "", drivetrain("train", "run.toml", "sedd=1", "optimizer.lr='x'").err)
        assert said.err.startswith("run.toml: 2 problems\n")


class TestExplain:
    def test_every_value_with_its_origin(self, drivetrain: Any) -> None:
        lines = drivetrain("config", "explain", "run.toml", "optimizer.lr=0.5").out.splitlines()
        rows = {line.split()[0]: line.split()[1:] for line in lines}
        assert rows["optimizer.lr"] == ["0.5", "override"]
        assert rows["max_duration"] == ['"2ep"', "run.toml"]
        assert rows["model.inputs"] == ["4", "default"]
        assert rows["data.file"] == ["none", "default"]
        assert set(rows) == {key for key, _, _ in load_training_config("run.toml").explain()}

    def test_what_is_left_open_is_explained_for_this_machine(self, drivetrain: Any) -> None:
        """As a run finds it; the words may come before and after the option."""
        said = drivetrain(
            "config", "explain", "run.toml", "global_batch_size=32", "--here", "per_device_batch_size=8", "device=cpu"
        )
        values, _, here = said.out.partition("\nhere:\n")
        words = ("global_batch_size=32", "per_device_batch_size=8", "device=cpu")
        assert values == drivetrain("config", "explain", "run.toml", *words).out
        rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in here.splitlines()}
        assert rows["device"] == ['"cpu"', "as configured"]
        assert rows["distributed"] == ['"single"', "one process"]
        assert rows["precision"] == ['"fp32"', "full precision"]
        assert rows["gradient_accumulation_steps"][0] == "4"
        assert not Path("runs").exists()

    def test_what_is_wrong_here_is_said_of_the_file(self, drivetrain: Any) -> None:
        said = drivetrain("config", "explain", "run.toml", "device=foo", "--here")
        assert (said.code, said.err.splitlines()[0]) == (2, "run.toml: 1 problem")

    def test_a_long_reason_does_not_repeat_the_value_and_breaks_between_words(
        self, drivetrain: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        words = ("config", "explain", "run.toml", "precision=exact", "--here")
        line = next(line for line in reversed(drivetrain(*words).out.splitlines()) if line.startswith("precision"))
        assert line.split() == ["precision", '"fp32"', *("one word after another " * 9).split()]
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        here = drivetrain(*words).out.partition("\nhere:\n")[2]
        assert max(map(len, here.splitlines())) < 80
        assert " ".join(here.split()).count("one word after another") == 9

    def test_an_unknown_option_after_the_file_is_named(self, drivetrain: Any) -> None:
        said = drivetrain("config", "explain", "run.toml", "--there", "seed=1")
        assert said.code == 2 and "unrecognized arguments: --there" in said.err

    def test_columns_are_aligned_and_a_long_value_moves_only_its_own_line(self, drivetrain: Any) -> None:
        lines = drivetrain("config", "explain", "run.toml", f"model_name='{'x' * 60}'").out.splitlines()
        origins = {line.rindex(line.split()[-1]) for line in lines}
        assert len(origins) == 2
