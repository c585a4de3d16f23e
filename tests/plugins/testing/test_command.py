"""`drivetrain check`: what it says of sound and broken distributions, and the exit code, which is what a CI looks at."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from drivetrain import PluginError
from drivetrain_testing import Check, conformance
from drivetrain_testing.command import CheckCommand

CALLBACK = '''
from drivetrain import Callback, component, option
@component
class Thing(Callback):
    """Stops at a floor."""
    floor: float = option(help="stop below this loss")
    def on_log(self, ctx):
        if ctx.metrics["train/loss"] < self.floor:
            ctx.stop("low")
'''
CLUSTER = '''
from drivetrain.cluster import Cluster
def Thing(environment):
    """The place among the toy launcher's ranks."""
    if "TOY_RANK" in environment:
        return Cluster("toy", int(environment["TOY_RANK"]), 2, evidence=("TOY_RANK",))
'''
FAILS = CALLBACK.replace("(help=", "(default=0.0, help=").replace('if ctx.metrics["train/loss"]', "if ctx.nothing")


@conformance(CheckCommand())
def test_conformance(check: Check) -> None:
    check()


def check(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command = CheckCommand()
    command.add_arguments(parser)
    return command.run(parser.parse_args(words))


def test_a_plugin_that_cannot_be_imported_has_not_passed(publish: Any, capsys: pytest.CaptureFixture[str]) -> None:
    publish("cannot_import", code="import not_there\n")
    assert check("cannot_import") == 1
    said = capsys.readouterr().out
    assert "FAILED   callback:thing: it cannot be checked: " in said and "No module named 'not_there'" in said
    assert said.endswith("cannot_import: 1 failed\n")


def test_options_that_must_be_given_are_asked_for(publish: Any, capsys: pytest.CaptureFixture[str]) -> None:
    publish("needs_option", code=CALLBACK)
    assert check("needs_option", "--only", "trains") == 1
    said = capsys.readouterr().out
    assert "--option.floor: is missing" in said and "give --option NAME=VALUE" in said
    assert check("needs_option", "--only", "trains", "--option", "floor=-1.0") == 0
    assert "passed   callback:thing: trains\nneeds_option: all checks passed (1)\n" in capsys.readouterr().out
    assert check("needs_option", "--only", "trains", "--option", "floor=low") == 1
    assert "expected a number, got the text 'low'" in capsys.readouterr().out


def test_a_check_that_no_plugin_has_is_refused(publish: Any) -> None:
    publish("misspelt_check")
    with pytest.raises(PluginError, match=r"no check: train\. Did you mean 'trains'"):
        check("misspelt_check", "--only", "train")
    with pytest.raises(PluginError, match="no check: train"):
        check("misspelt_check", "--unsupported", "train=it never does")
    with pytest.raises(PluginError, match=r"has no plugin callback:others\. It has: callback:thing"):
        check("misspelt_check", "--plugin", "callback:others")
    with pytest.raises(PluginError, match="is no installed distribution"):
        check("not_there")
    assert check("misspelt_check", "--option", "floor") == 1


def test_what_is_unsupported_must_fail_by_its_own_verdict(publish: Any, capsys: pytest.CaptureFixture[str]) -> None:
    publish("limited", code=CALLBACK, more="Requires-Dist: drivetrain-core>=0.1,<1\n")
    given = ["--option", "floor=-1.0", "--only", "has_a_licence", "--only", "is_typed"]
    assert check("limited", *given) == 1
    assert "FAILED   callback:thing: has_a_licence" in capsys.readouterr().out
    assert check("limited", *given, "--unsupported", "has_a_licence=a secret") == 0
    assert "not so   callback:thing: has_a_licence (a secret)\n" in capsys.readouterr().out
    assert check("limited", *given, "--unsupported", "has_a_licence=a secret", "--unsupported", "is_typed=no") == 1
    assert "is_typed\n           it passes: take it from --unsupported" in capsys.readouterr().out


def test_a_check_that_comes_to_no_verdict_has_not_passed(publish: Any, capsys: pytest.CaptureFixture[str]) -> None:
    publish("fails_in_runs", code=FAILS)
    assert check("fails_in_runs", "--only", "steps_write_no_file", "--unsupported", "steps_write_no_file=it writes") == 1
    assert "came to no verdict: AttributeError" in capsys.readouterr().out


def test_launchers_are_shown_their_environment(publish: Any, capsys: pytest.CaptureFixture[str]) -> None:
    publish("launcher", code=CLUSTER, kind="cluster")
    assert check("launcher", "--only", "launchers_are_read") == 1
    assert check("launcher", "--only", "launchers_are_read", "--environment", "TOY_RANK=1") == 0


def test_plugins_get_a_model_and_data_that_suit_them(
    publish: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wide.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def model(): return nn.Linear(9, 1)\n"
        "def data(): return torch.utils.data.TensorDataset(torch.randn(96, 9), torch.randn(96, 1))\n"
    )
    publish("wide_data", code=CALLBACK)
    given = ["--option", "floor=-1.0", "--only", "trains", "--model", "wide:model", "--data", "wide:data"]
    assert check("wide_data", *given, "--loss", "torch.nn.functional:mse_loss") == 0
    assert check("wide_data", *given, "--loss", "torch.nn.functional:no_loss") == 1
    assert "no_loss" in capsys.readouterr().out
