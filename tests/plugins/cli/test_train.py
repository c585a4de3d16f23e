"""`drivetrain train` and `resume`: names, what is printed, what is kept, and going on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import drivetrain as core
from drivetrain import load_training_config
from drivetrain_cli import names
from drivetrain_cli.summary import duration, parameters

NAME = re.compile(r"run ([a-z]+-[a-z]+) ·")


def name_in(said: Any) -> str:
    match = NAME.search(said.err)
    assert match, said.err
    return match[1]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "state.pt", weights_only=True)["model"]


class TestBanner:
    def test_is_the_line_of_the_design(self, drivetrain: Any) -> None:
        said = drivetrain("train", "run.toml")
        name = name_in(said)
        assert said.code == 0
        assert said.err == (
            f"drivetrain {core.__version__} · run {name} · cpu (fp32: full precision) · 5 parameters"
            " · plugins: line, points, plain_sgd, keep\n"
        )

    @pytest.mark.parametrize(
        ("sizes", "said"),
        [
            ([999], "999"),
            ([4321], "4.32 k"),
            ([870_000], "0.87 M"),
            ([1_500_000], "1.50 M"),
            ([1_000_000_000, 240_000_000], "1.24 B"),
        ],
    )
    def test_parameters(self, sizes: list[int], said: str) -> None:
        made = torch.nn.ParameterList(torch.nn.Parameter(torch.empty(size, device="meta")) for size in sizes)
        assert parameters(made) == f"{said} parameters"

    def test_parameters_of_which_a_part_is_trained(self) -> None:
        made = torch.nn.ParameterList(torch.nn.Parameter(torch.empty(size)) for size in (30, 970))
        made[1].requires_grad_(False)
        assert parameters(made) == "1.00 k parameters (3 % trained)"


class TestSummary:
    def test_says_why_how_long_what_came_out_and_where_it_is(self, drivetrain: Any) -> None:
        said = drivetrain("train", "run.toml", "--run-name", "mine")
        first, *rows = said.out.splitlines()
        assert re.fullmatch(r"done: max_duration 2ep reached \(16 steps, \d+\.\d s\)", first)
        table = dict(re.split(r"\s{2,}", row.strip()) for row in rows)
        assert float(table.pop("eval/loss")) < 1
        assert table == {"run directory": "runs/mine", "checkpoint": "runs/mine/state.pt"}

    def test_without_evaluation_the_training_loss(self, drivetrain: Any) -> None:
        assert "train/loss" in drivetrain("train", "run.toml", "eval_interval=false").out

    def test_what_trackers_wrote(self, drivetrain: Any, project: Path) -> None:
        kept = "output_dir='my runs'"
        drivetrain("train", "run.toml", "--run-name", "a", kept)
        run = project / "my runs" / "a"
        (run / "metrics.jsonl").touch()
        (run / "tensorboard").mkdir()
        (run / "tensorboard" / "events.out.tfevents.1").touch()
        said = drivetrain("train", "run.toml", "--run-name", "a", kept, "max_duration=3ep").out
        assert "  metrics        'my runs/a/metrics.jsonl'\n" in said  # quoted: it can be pasted into a shell
        assert "  curves         tensorboard --logdir 'my runs/a'\n" in said

    @pytest.mark.parametrize(("seconds", "said"), [(4.21, "4.2 s"), (98, "1:38"), (59.99, "60.0 s"), (7507.4, "2:05:07")])
    def test_durations(self, seconds: float, said: str) -> None:
        assert duration(seconds) == said


class TestNames:
    def test_the_same_command_goes_on_with_the_same_run(self, drivetrain: Any) -> None:
        first, again = drivetrain("train", "run.toml"), drivetrain("train", "run.toml", "--resume", "auto")
        assert name_in(first) == name_in(again)
        assert "going on after step 16" in again.err
        assert again.out == (f"the run was already complete: max_duration 2ep reached (16 steps); see runs/{name_in(first)}\n")

    def test_a_changed_configuration_starts_another(self, drivetrain: Any, project: Path) -> None:
        assert name_in(drivetrain("train", "run.toml")) != name_in(drivetrain("train", "run.toml", "seed=1"))
        assert len(list((project / "runs").iterdir())) == 2

    def test_do_not_depend_on_where_the_run_is_kept_or_how_it_is_written(self, project: Path) -> None:
        one = load_training_config("run.toml", ["output_dir='a'", "resume='never'"])
        (project / "other.json").write_text(json.dumps(load_training_config("run.toml").to_dict()))
        assert names.name_run(one) == names.name_run(load_training_config("other.json"))

    def test_are_the_same_in_every_process(self, project: Path) -> None:
        code = "import drivetrain as d, drivetrain_cli.names as n; print(n.name_run(d.load_training_config('run.toml')))"
        environment = os.environ | {"PYTHONHASHSEED": "1"}
        said = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment)
        assert said == names.name_run(load_training_config("run.toml")) + "\n"

    def test_one_that_another_configuration_has_taken_is_passed_over(self, project: Path) -> None:
        mine, other = load_training_config("run.toml"), load_training_config("run.toml", ["seed=1"])
        name = names.name_run(mine)
        taken = project / "runs" / name
        taken.mkdir(parents=True)
        assert names.name_run(mine) == name  # an empty directory is nobody's
        other.save(taken / names.SAVED_CONFIG)
        assert names.name_run(mine) not in (name, names.name_run(other))
        mine.save(taken / names.SAVED_CONFIG)
        assert names.name_run(mine) == name
        (taken / names.SAVED_CONFIG).write_text("{")
        assert names.name_run(mine) != name

    def test_words_are_sorted_plain_and_single(self) -> None:
        for words in (names.ADJECTIVES.split(), names.ANIMALS.split()):
            assert words == sorted(set(words))
            assert all(re.fullmatch("[a-z]{3,8}", word) for word in words)
            assert len(words) > 100

    def test_one_in_the_file_is_used(self, drivetrain: Any, project: Path) -> None:
        drivetrain("train", "run.toml", "run_name=2024")  # TOML reads a number there
        assert not (project / "runs").exists()
        drivetrain("train", "run.toml", "--run-name", "2024")
        assert (project / "runs" / "2024" / names.SAVED_CONFIG).is_file()


class TestResume:
    def test_goes_on_to_the_weights_of_an_uninterrupted_run(self, drivetrain: Any, project: Path) -> None:
        drivetrain("train", "run.toml", "--run-name", "whole", "max_duration=4ep")
        drivetrain("train", "run.toml", "--run-name", "parts")
        said = drivetrain("resume", "runs/parts", "max_duration=4ep")
        assert (said.code, "going on after step 16\n" in said.err, "(32 steps" in said.out) == (0, True, True)
        whole, parts = weights(project / "runs/whole"), weights(project / "runs/parts")
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
        half = weights_after_half(drivetrain, project)
        assert not torch.equal(half["weight"], whole["weight"])  # the comparison above can fail

    def test_keeps_the_configuration_the_run_began_with(self, drivetrain: Any, project: Path) -> None:
        drivetrain("train", "run.toml", "--run-name", "a", "seed=7")
        saved = (project / "runs/a/config.json").read_text()
        assert json.loads(saved)["seed"] == 7
        drivetrain("resume", "runs/a", "max_duration=3ep")
        assert (project / "runs/a/config.json").read_text() == saved

    def test_works_from_elsewhere_after_the_run_was_moved(self, drivetrain: Any, project: Path, monkeypatch: Any) -> None:
        drivetrain("train", "run.toml", "--run-name", "a")
        shutil.move(project / "runs", project / "kept")
        monkeypatch.chdir(project / "kept" / "a")
        said = drivetrain("resume", ".", "max_duration=3ep")
        assert "run a ·" in said.err
        assert "going on after step 16\n" in said.err
        assert "(24 steps" in said.out
        assert sorted(path.name for path in project.rglob("*") if path.is_dir()) == ["a", "kept"]
        monkeypatch.chdir(project)
        assert "run a ·" in drivetrain("resume", "kept/a/../a").err

    def test_a_run_that_began_anew_on_purpose_keeps_its_new_configuration(self, drivetrain: Any, project: Path) -> None:
        drivetrain("train", "run.toml", "--run-name", "a")
        said = drivetrain("train", "run.toml", "--run-name", "a", "--resume", "never", "seed=7")
        assert "going on" not in said.err
        assert json.loads((project / "runs/a/config.json").read_text())["seed"] == 7
        assert "going on after step 16" in drivetrain("resume", "runs/a", "max_duration=3ep").err  # although it said never

    def test_from_the_path_of_another_run(self, drivetrain: Any) -> None:
        drivetrain("train", "run.toml", "--run-name", "a")
        said = drivetrain("train", "run.toml", "--run-name", "b", "max_duration=3ep", "--resume", "runs/a")
        assert "going on after step 16" in said.err

    @pytest.mark.parametrize(
        ("word", "hint"),
        [
            ("runs", " Runs in runs: tidy-otter."),
            ("runs/other", " Runs in runs: tidy-otter."),
            ("runs/tidy-oter", " Did you mean 'tidy-otter'?"),
            ("nowhere/tidy-otter", ""),
        ],
    )
    def test_a_directory_that_is_no_run_names_those_near_it(self, drivetrain: Any, project: Path, word: str, hint: str) -> None:
        (project / "runs" / "tidy-otter").mkdir(parents=True)
        (project / "runs" / "tidy-otter" / "config.json").touch()
        said = drivetrain("resume", word)
        assert (said.code, said.err) == (2, f"error: {word} is no run of drivetrain train (no config.json).{hint}\n")

    def test_a_failed_run_says_how_to_go_on(self, drivetrain: Any) -> None:
        said = drivetrain("train", "run.toml", "--run-name", "a", 'callbacks=["keep", "boom"]')
        assert said.code == 1
        assert said.err.splitlines()[-2:] == [
            "  go on with: drivetrain resume runs/a",
            "  run again with --debug for the traceback",
        ]


def weights_after_half(drivetrain: Any, project: Path) -> dict[str, torch.Tensor]:
    drivetrain("train", "run.toml", "--run-name", "half")
    return weights(project / "runs/half")
