"""The program as a whole: help without torch, finding commands, errors in a line, exit codes."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import pytest

import drivetrain as core
from drivetrain import ConfigError, DrivetrainError, Problem

COUNT = """
import contextlib, io, shlex, sys
from drivetrain_cli import main
for line in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(shlex.split(line))
    print(line, len(sys.modules), "torch" in sys.modules, "toy_plugin" in sys.modules, sep="|")
"""


class TestHelp:
    def test_light_commands_import_neither_torch_nor_a_plugin(self, project: Path) -> None:
        lines = ["--help", "--version", "", "train --help", "plugins list", "plugins list --json", "config -h", "trian"]
        result = subprocess.run([sys.executable, "-c", COUNT, *lines], capture_output=True, text=True, check=True)
        counts = [row.split("|") for row in result.stdout.splitlines()]
        assert [(line, torch, plugin) for line, _, torch, plugin in counts] == [(line, "False", "False") for line in lines]
        assert int(counts[0][1]) < 260  # about 200 with Python 3.11; `import torch` brings more than 1000

    def test_names_every_command_and_whose_it_is(self, drivetrain: Any) -> None:
        said = drivetrain("--help")
        assert said.code == 0
        for line in ("train       train from a configuration file", "broken      from toy 1.0", "incomplete  from toy 1.0"):
            assert line in said.out

    def test_is_what_a_call_without_words_shows(self, drivetrain: Any) -> None:
        assert drivetrain().out == drivetrain("--help").out

    def test_version(self, drivetrain: Any) -> None:
        assert drivetrain("--version").out == f"drivetrain {core.__version__}\n"

    def test_the_console_script_is_this_program(self, project: Path) -> None:
        script = Path(sysconfig.get_path("scripts")) / "drivetrain"
        result = subprocess.run([script, "--version"], capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (0, f"drivetrain {core.__version__}\n")


class TestFindingCommands:
    def test_one_of_another_distribution_gets_its_arguments_and_gives_the_exit_code(self, drivetrain: Any) -> None:
        said = drivetrain("greet", "you", "--loud", "there")  # an option between the words
        assert (said.code, said.out) == (3, "hello you there !\n")
        assert "Say hello." in drivetrain("greet", "--help").out

    def test_a_broken_one_is_named_with_its_distribution_when_it_is_asked_for(self, drivetrain: Any) -> None:
        said = drivetrain("broken")
        assert said.code == 2
        assert said.err.startswith("error: plugin command:broken (toy 1.0) failed to import a_module_that_is_not_there:Thing")

    def test_an_object_that_is_no_command(self, drivetrain: Any) -> None:
        said = drivetrain("incomplete")
        assert said.code == 2
        assert "plugin command:incomplete (toy 1.0) is no command: it has no add_arguments and no run" in said.err

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("trian", "error: no command named 'trian'. Did you mean 'train'? See drivetrain --help.\n"),
            ("zzz", "error: no command named 'zzz'. See drivetrain --help.\n"),
            ("run.toml", "error: no command named 'run.toml'. To train from that file: drivetrain train run.toml\n"),
        ],
    )
    def test_an_unknown_one(self, drivetrain: Any, word: str, message: str) -> None:
        said = drivetrain(word)
        assert (said.code, said.err) == (2, message)

    def test_two_distributions_with_one_name_are_a_conflict_that_a_prefix_solves(
        self, drivetrain: Any, install: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DRIVETRAIN_PLUGINS", "")
        install("rival", "[drivetrain.command]\ntrain = toy_plugin:Greet\n")
        said = drivetrain("train", "run.toml")
        assert said.code == 2
        assert "2 installed distributions provide the command 'train': drivetrain-cli" in said.err
        assert "rival 1.0 (toy_plugin:Greet)" in said.err
        assert drivetrain("rival:train", "you").out == "hello you \n"
        assert "FILE" in drivetrain("drivetrain-cli:train", "--help").out

    def test_our_own_work_with_plugins_switched_off(self, drivetrain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DRIVETRAIN_PLUGINS", "off")
        assert "no plugin is installed" in drivetrain("plugins", "list").err


class TestErrors:
    def test_the_error_of_the_design(self, drivetrain: Any, project: Path) -> None:
        """All problems in one pass, the file first, each with its key and the remedy; exactly these lines."""
        text = (project / "run.toml").read_text()
        (project / "run.toml").write_text(text.replace("0.1", '"3e-4 "').replace('["keep"]', '["keep", "early_stoping"]'))
        said = drivetrain("train", "run.toml")
        first, *problems = said.err.splitlines()
        assert (said.code, first, len(problems)) == (2, "run.toml: 2 problems", 2)
        assert problems[0].startswith("  optimizer.plain_sgd.lr: expected a number, got the text '3e-4 '")
        assert problems[1].startswith("  callbacks[1]: no plugin named 'early_stoping'")
        assert problems[1].endswith("Did you mean 'early_stopping'? (pip install drivetrain-early-stopping)")

    def test_a_missing_file(self, drivetrain: Any) -> None:
        said = drivetrain("train", "nowhere.toml")
        assert said.code == 2
        assert said.err.startswith("nowhere.toml: 1 problem\n")

    def test_a_missing_file_of_the_users_data(self, drivetrain: Any) -> None:
        said = drivetrain("train", "run.toml", "data.file=nowhere.txt")
        assert said.code == 2
        assert said.err.splitlines()[0] == "error: nowhere.txt: No such file or directory"

    def test_what_the_trainer_misses_is_said_of_the_file(self, drivetrain: Any, project: Path) -> None:
        (project / "run.toml").write_text('model = "line"\noptimizer = {use = "plain_sgd", lr = 0.1}\n')
        said = drivetrain("train", "run.toml")
        assert (said.code, said.err.splitlines()[0]) == (2, "run.toml: 1 problem")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["train"], "error: the following arguments are required: FILE\n"),
            (["config", "show"], "error: the following arguments are required: FILE\n"),
            (["train", "run.toml", "--fast"], "error: unrecognized arguments: --fast\n"),
            (["config"], "error: the following arguments are required: ACTION\n"),
            (["--fast"], "error: unrecognized arguments: --fast\n"),
        ],
    )
    def test_usage(self, drivetrain: Any, words: list[str], message: str) -> None:
        said = drivetrain(*words)
        assert said.code == 2
        assert said.err.startswith("usage: drivetrain")
        assert said.err.endswith(message)

    def test_values_written_with_dashes_get_the_remedy(self, drivetrain: Any) -> None:
        assert "written without dashes: optimizer.lr=1e-3" in drivetrain("train", "run.toml", "--optimizer.lr=3").err

    def test_an_error_of_a_plugin_names_it_and_is_one_of_the_run(self, drivetrain: Any) -> None:
        said = drivetrain("train", "run.toml", 'callbacks=["boom"]')
        assert said.code == 1
        assert said.err.splitlines()[1:] == [
            "error: RuntimeError: the data went away",
            "  raised in on_step_end of callback:boom (toy 1.0)",
            "  run again with --debug for the traceback",
        ]

    def test_an_error_that_a_plugin_calls_a_mistake_is_one(self, drivetrain: Any) -> None:
        said = drivetrain("train", "run.toml", "callbacks=[{use='boom', mistake=true}]")
        assert said.code == 2
        assert said.err.splitlines()[1:] == [
            "error: the data went away",
            "  raised in on_step_end of callback:boom (toy 1.0)",
        ]

    @pytest.mark.parametrize("place", [0, 1, 3])
    def test_debug_anywhere_shows_the_traceback(self, drivetrain: Any, place: int) -> None:
        words = ["train", "run.toml", 'callbacks=["boom"]']
        said = drivetrain(*words[:place], "--debug", *words[place:])
        assert said.code == 1
        assert "Traceback" in said.err
        assert "toy_plugin.py" in said.err

    def test_debug_behind_two_dashes_is_an_ordinary_word(self, drivetrain: Any) -> None:
        assert drivetrain("greet", "--", "--debug").out == "hello --debug \n"

    def test_a_command_of_another_distribution_that_fails(self, drivetrain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        import toy_plugin

        def fail(*_: object) -> int:
            raise ZeroDivisionError("division by zero")

        monkeypatch.setattr(toy_plugin.Greet, "run", fail)
        said = drivetrain("greet")
        assert (said.code, said.err.splitlines()[0]) == (1, "error: ZeroDivisionError: division by zero")

    def test_ctrl_c_outside_a_training(self, drivetrain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        import toy_plugin

        def interrupted(*_: object) -> int:
            raise KeyboardInterrupt

        monkeypatch.setattr(toy_plugin.Greet, "run", interrupted)
        said = drivetrain("greet")
        assert (said.code, said.err) == (130, "interrupted\n")

    def test_ctrl_c_while_the_words_are_taken_apart(self, drivetrain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Argparse of Python 3.11 fails in its own clean-up then, with an AttributeError."""

        def interrupted(*_: object) -> str:
            raise KeyboardInterrupt

        monkeypatch.setattr(argparse.ArgumentParser, "format_usage", interrupted)
        said = drivetrain("train", "run.toml")
        assert (said.code, said.err) == (130, "interrupted\n")

    def test_nothing_printed_can_steer_the_terminal(self, drivetrain: Any) -> None:
        evil = "callbacks=[{use='boom', says=\"a\\n\\u001b[2J\\u001b]0;title\\u0007\\u202eerror: b\"}]"
        said = drivetrain("train", "run.toml", evil)
        assert "error: RuntimeError: a\n  error: b\n" in said.err
        assert "\x1b" not in said.err
        assert "\x1b" not in drivetrain("--debug", "train", "run.toml", evil).err

    def test_a_problem_stays_on_its_line(self, capsys: Any) -> None:
        from drivetrain_cli.errors import explain

        explain(ConfigError([Problem("a", "got 'x\nerror: b\x1b[2J'")], "run.toml"), debug=False)
        assert capsys.readouterr().err == "run.toml: 1 problem\n  a: got 'x error: b'\n"

    def test_several_errors_at_once_and_long_ones(self, capsys: Any) -> None:
        from drivetrain_cli.errors import exit_code, explain

        first, second = ValueError("\n".join(map(str, range(30)))), DrivetrainError("second")
        second.add_note("raised in on_run_end of callback:x (y 1)")
        group = ExceptionGroup("2 plugins failed in on_run_end", [first, second])
        explain(group, debug=False)
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "error: 2 plugins failed in on_run_end (2 sub-exceptions)"
        assert lines[1] == "  error: ValueError: 0"
        assert "    … and 21 more lines" in lines
        assert lines[-3:-1] == ["  error: second", "    raised in on_run_end of callback:x (y 1)"]
        assert exit_code(group) == 1


class TestPipesAndTerminals:
    def test_a_closed_pipe_is_no_traceback(self, command: list[str]) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        result = subprocess.run([*command, "plugins", "list"], stdout=writing, stderr=subprocess.PIPE, text=True)
        os.close(writing)
        assert (result.returncode, result.stderr) == (141, "")

    def test_a_terminal_that_cannot_show_a_character(self, shell: Any) -> None:
        result = shell("--help", PYTHONIOENCODING="ascii")
        assert (result.returncode, result.stderr) == (0, "")
        assert "drivetrain COMMAND ?" in result.stdout

    def test_bold_on_a_terminal(self, command: list[str]) -> None:
        pty = pytest.importorskip("pty")
        parent, child = pty.openpty()
        environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"}
        subprocess.run([*command, "plugins", "list"], stdout=child, env=environment, check=True)
        assert b"\x1b[1mNAME" in os.read(parent, 4096)
        os.close(parent)
        os.close(child)

    def test_no_escape_codes_in_a_pipe(self, drivetrain: Any) -> None:
        assert "\x1b" not in drivetrain("plugins", "list").out


class TestWarnings:
    def test_each_is_said_once_without_a_place_in_the_sources(self, drivetrain: Any) -> None:
        before = warnings.showwarning, list(warnings.filters)
        said = drivetrain("train", "run.toml", "callbacks=['warns']", "max_duration='4st'")
        assert said.code == 0
        lines = said.err.splitlines()[1:]  # after the banner
        assert lines == ["warning: the same", "  thing", "warning: another thing False", "warning: another thing True"]
        assert (warnings.showwarning, list(warnings.filters)) == before

    def test_with_debug_its_place_is_added(self, drivetrain: Any) -> None:
        said = drivetrain("train", "run.toml", "callbacks=['warns']", "max_duration='4st'", "--debug")
        assert re.search(r"^warning: another thing True\n  \S+/toy_plugin\.py:\d+: FutureWarning$", said.err, re.MULTILINE)

    @pytest.mark.parametrize(("action", "code", "said_of_it"), [("ignore", 0, 0), ("error", 1, 1)])
    def test_filters_count(self, drivetrain: Any, action: Any, code: int, said_of_it: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter(action, FutureWarning)
            said = drivetrain("train", "run.toml", "callbacks=['warns']", "max_duration='4st'")
        assert (said.code, said.err.count("another thing")) == (code, said_of_it)
        assert code == 0 or "error: FutureWarning: another thing False" in said.err

    def test_the_library_leaves_them_alone(self, project: Path) -> None:
        from drivetrain import Trainer, load_training_config

        config = load_training_config("run.toml", overrides=["callbacks=['warns']", "max_duration='4st'"])
        with pytest.warns((UserWarning, FutureWarning)) as caught:
            Trainer(None, config).train()
        assert len(caught) == 12 and "another thing True" in str(caught[-1].message)
