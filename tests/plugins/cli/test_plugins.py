"""`drivetrain plugins list`, `show` and `check`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from drivetrain import Duration, hook
from drivetrain_cli.plugins import _hooks, _type


class TestList:
    def test_columns(self, drivetrain: Any) -> None:
        head, *lines = drivetrain("plugins", "list").out.splitlines()
        assert head.split() == ["NAME", "KIND", "DISTRIBUTION", "VERSION", "STATUS", "ORIGIN"]
        assert ["boom", "callback", "toy", "1.0", "ok", "toy_plugin:Boom"] in [line.split() for line in lines]
        assert {line.index(line.split()[1]) for line in lines} == {head.index("KIND")}

    def test_imports_no_plugin(self, drivetrain: Any) -> None:
        sys.modules.pop("toy_plugin", None)
        drivetrain("plugins", "list")
        assert "toy_plugin" not in sys.modules

    def test_is_what_plugins_alone_does(self, drivetrain: Any) -> None:
        assert drivetrain("plugins").out == drivetrain("plugins", "list").out

    def test_of_one_kind(self, drivetrain: Any) -> None:
        lines = drivetrain("plugins", "list", "--kind", "callback").out.splitlines()
        assert [line.split()[0] for line in lines[1:]] == ["boom", "keep", "signal", "slow", "warns"]
        said = drivetrain("plugins", "list", "--kind", "tracker")
        assert (said.code, said.out, said.err) == (0, "", "no plugin of the kind tracker is installed\n")
        assert "invalid choice: 'trackers'" in drivetrain("plugins", "list", "--kind", "trackers").err

    def test_json(self, drivetrain: Any) -> None:
        found = json.loads(drivetrain("plugins", "list", "--kind", "model", "--json").out)
        expected = {"name": "line", "kind": "model", "distribution": "toy", "version": "1.0", "origin": "toy_plugin:Line"}
        assert found == [expected | {"status": "ok", "remark": ""}]
        assert json.loads(drivetrain("plugins", "list", "--kind", "tracker", "--json").out) == []

    def test_conflict_and_incompatible_core(self, drivetrain: Any, install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DRIVETRAIN_PLUGINS", "toy,rival,future")
        install("rival", "[drivetrain.model]\nline = other:Line\n")
        install("future", "[drivetrain.model]\ncurve = future:Curve\n", requires="drivetrain-core>=99")
        said = drivetrain("plugins", "list", "--kind", "model").out
        assert [line.split(maxsplit=4) for line in said.splitlines()[1:4]] == [
            ["curve", "model", "future", "1.0", "incompatible core  future:Curve"],
            ["line", "model", "rival", "1.0", "conflict           other:Line"],
            ["line", "model", "toy", "1.0", "conflict           toy_plugin:Line"],
        ]
        incompatible, conflict = said.splitlines()[5:]  # each said once
        assert incompatible.startswith("plugin model:curve (future 1.0) needs drivetrain-core>=99, but")
        assert conflict.startswith("2 installed distributions provide the model 'line': rival 1.0")
        assert conflict.endswith("or choose with 'rival:line'.")


class TestShow:
    def test_everything_about_a_callback(self, drivetrain: Any) -> None:
        assert drivetrain("plugins", "show", "callback:boom").out.splitlines() == [
            "callback:boom",
            "Fails.",
            "",
            "from        toy 1.0 (toy_plugin:Boom)",
            "listens to  on_step_end",
            "",
            "OPTION   TYPE  DEFAULT               WHAT IT IS",
            "step     int   3                     when",
            'says     str   "the data went away"  what',
            "mistake  bool  false                 whether it calls that the user's mistake",
            "fails    bool  false                 whether it calls that a failure of the run",
        ]

    def test_only_the_first_paragraph(self, drivetrain: Any) -> None:
        out = drivetrain("plugins", "show", "line").out
        assert "A straight line through four inputs." in out
        assert "second paragraph" not in out

    def test_defaults_that_are_not_there(self, drivetrain: Any) -> None:
        assert "lr      float  (required)  learning rate" in drivetrain("plugins", "show", "plain_sgd").out
        assert "file    str | None  none     a file" in drivetrain("plugins", "show", "points").out

    @pytest.mark.parametrize(
        ("annotation", "said"),
        [
            (int, "int"),
            ("str | None", "str | None"),
            (list[dict[str, Any]], "list[dict[str, Any]]"),
            (Literal["min", "max"], "'min' | 'max'"),
            ("Literal['a', 'b'] | None", "'a' | 'b' | None"),
            (Duration | None, "Duration | None"),
        ],
    )
    def test_types(self, annotation: object, said: str) -> None:
        assert _type(annotation) == said

    def test_a_plugin_without_options(self, drivetrain: Any) -> None:
        out = drivetrain("plugins", "show", "command:greet").out
        assert "Say hello." in out
        assert "OPTION" not in out

    def test_a_name_of_several_kinds(self, drivetrain: Any, install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DRIVETRAIN_PLUGINS", "toy,more")
        install("more", "[drivetrain.preset]\nline = toy_plugin:Line\n")
        said = drivetrain("plugins", "show", "line")
        assert said.code == 2
        assert said.err == "error: 'line' is the name of several plugins; write one of: preset:line, model:line\n"
        assert drivetrain("plugins", "show", "preset:line").out.startswith("preset:line\n")

    def test_a_name_of_several_distributions(self, drivetrain: Any, install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DRIVETRAIN_PLUGINS", "toy,rival")
        install("rival", "[drivetrain.model]\nline = toy_plugin:Line\n")
        assert "choose with 'rival:line'" in drivetrain("plugins", "show", "line").err
        assert "from   rival 1.0" in drivetrain("plugins", "show", "rival:line").out
        assert "from   toy 1.0" in drivetrain("plugins", "show", "model:toy:line").out

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("booom", "error: no plugin named 'booom' is installed. Did you mean 'boom'?\n"),
            (
                "lion",
                "error: no plugin named 'lion' is installed. It comes with drivetrain-lion: pip install drivetrain-lion\n",
            ),
            ("zzzz", "error: no plugin named 'zzzz' is installed. See drivetrain plugins list.\n"),
        ],
    )
    def test_unknown_names(self, drivetrain: Any, name: str, hint: str) -> None:
        said = drivetrain("plugins", "show", name)
        assert (said.code, said.err) == (2, hint)

    def test_one_that_cannot_be_imported(self, drivetrain: Any) -> None:
        said = drivetrain("plugins", "show", "command:broken")
        assert said.code == 2
        assert "failed to import a_module_that_is_not_there:Thing" in said.err


class TestCheck:
    def test_without_the_kit_it_says_how_to_get_it(self, drivetrain: Any) -> None:
        said = drivetrain("plugins", "check", "toy")
        assert said.code == 2
        assert "pip install drivetrain-testing" in said.err

    def test_the_kits_command_is_what_runs(self, drivetrain: Any, install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DRIVETRAIN_PLUGINS", "toy,kit")
        install("kit", "[drivetrain.command]\ncheck = toy_plugin:Greet\n")
        said = drivetrain("plugins", "check", "toy", "--loud")
        assert (said.code, said.out) == (3, "hello toy !\n")
        assert drivetrain("plugins", "check", "--help").code == 0
        assert "error: unrecognized arguments: --only" in drivetrain("plugins", "check", "toy", "--only=x").err

    def test_the_real_program_runs_the_real_kit(self, site: Path) -> None:
        """In a process of its own; the exit code is what a CI looks at."""
        command = [sys.executable, "-m", "drivetrain_cli", "plugins", "check"]
        environment = os.environ | {"DRIVETRAIN_PLUGINS": "toy,drivetrain-cli,drivetrain-testing"}
        environment["PYTHONWARNINGS"] = "ignore:Failed to initialize NumPy"  # torch's own words where it is missing

        def run(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([*command, *words], capture_output=True, text=True, env=environment, cwd=site)

        said = run("toy", "--plugin", "callback:boom", "--only", "options_survive", "--only", "has_a_licence")
        assert (said.returncode, said.stderr) == (1, "")
        assert "  passed   callback:boom: options_survive\n" in said.stdout
        assert "  FAILED   callback:boom: has_a_licence\n" in said.stdout
        assert said.stdout.endswith("toy: 1 failed\n")
        said = run("drivetrain-testing", "--only", "commands_can_run")
        assert (said.returncode, said.stdout.splitlines()[-1]) == (0, "drivetrain-testing: all checks passed (1)")


class TestShowOrder:
    def test_the_place_among_listeners_is_said(self) -> None:
        class Listener:
            @hook(tryfirst=True)
            def on_step_end(self, ctx: Any) -> None: ...

            @hook(trylast=True)
            def on_run_start(self, ctx: Any) -> None: ...

            def make_model(self, ctx: Any) -> None: ...

        assert _hooks(Listener) == {
            "makes": ["make_model"],
            "listens to": ["on_run_start (last)", "on_step_end (first)"],
        }
