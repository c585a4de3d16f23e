"""What the doctor finds on a sound machine, and in environments that are broken on purpose."""

from __future__ import annotations

import argparse
import json
import os
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from drivetrain import DrivetrainError
from drivetrain_doctor import Doctor, Finding, checks, examine
from drivetrain_testing import Check, conformance

CLOCK = count(10**18, 10**9)
TWO_PROCESSES = checks._two_processes  # which takes seconds


@conformance(Doctor())
def test_conformance(check: Check) -> None:
    check()


def publish(folder: Path, name: str, entry_points: str, requires: str = "drivetrain-core>=0.1,<1") -> None:
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"  # a name ends at the first dash
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: {requires}\n")
    (info / "entry_points.txt").write_text(entry_points)
    os.utime(folder, ns=(0, next(CLOCK)))  # discovery looks at when a folder changed, and the file system's clock is coarse


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed distributions; of others none is looked at."""
    (tmp_path / "toy_doctor_checks.py").write_text(
        "def fine():\n    return True, 'plenty left', ''\n"
        "def empty():\n    return False, 'nothing left', 'buy more'\n"
        "def broken():\n    raise OSError('no answer')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DRIVETRAIN_PLUGINS", "one,two")
    monkeypatch.setattr(checks, "_two_processes", lambda: Finding("two processes", True, "left out"))
    return tmp_path


def found(folder: Path) -> dict[str, Any]:
    return {finding.check: finding for finding in examine(folder)}


def test_a_sound_machine(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_two_processes", TWO_PROCESSES)
    findings = list(examine(site / "runs"))
    assert all(finding.ok for finding in findings), [str(finding) for finding in findings if not finding.ok]
    names = [finding.check for finding in findings]
    assert names[:2] == ["python", "torch"]
    assert {"devices", "launch environment", "plugins", "two processes", "output directory"} <= set(names)
    assert not (site / "runs").exists(), "looking leaves nothing behind"


def test_plugins_that_cannot_be_used_are_named_with_a_remedy(site: Path) -> None:
    publish(site, "one", "[drivetrain.model]\nlost = not_there:Model\n[drivetrain.dataset]\nboth = toy_doctor_checks:fine\n")
    publish(site, "two", "[drivetrain.dataset]\nboth = toy_doctor_checks:fine\n")
    publish(site, "two-old", "")
    findings = found(site)
    assert "failed to import not_there:Model" in findings["plugin model:lost"].text
    assert "2 installed distributions provide the dataset 'both'" in findings["plugin dataset:both"].text
    assert all(findings[name].remedy for name in ("plugin model:lost", "plugin dataset:both"))
    assert findings["plugins"].text.startswith("0 of 3")
    assert findings["versions"].text.endswith("one 1.0, two 1.0")


def test_plugins_are_imported_where_they_do_no_harm(site: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each by itself: one that prints, one that ends the process in two ways, one whose error says nothing, and a sound one after them."""
    (site / "doctor_prints.py").write_text("import os\nprint('hello')\nos.write(1, b'from C')\nThing = 1\n")
    (site / "doctor_exits.py").write_text("raise SystemExit('enough')\n")
    (site / "doctor_dies.py").write_text("import os\nos._exit(3)\n")
    (site / "doctor_fails.py").write_text("raise ValueError\n")
    lines = [f"{name} = doctor_{name}:Thing\n" for name in ("prints", "exits", "dies", "fails")]
    publish(site, "one", "[drivetrain.model]\n" + "".join(lines) + "[drivetrain.preset]\nsound = toy_doctor_checks:fine\n")
    findings = found(site)
    assert capfd.readouterr() == ("", "")
    assert "importing it ends the process with SystemExit" in findings["plugin model:exits"].text
    assert findings["plugin model:dies"].text == "importing it ends the process (exit code 3)"
    assert "ValueError" in findings["plugin model:fails"].text
    assert all(finding.remedy for finding in findings.values() if not finding.ok)
    assert findings["plugins"].text.startswith("2 of 5"), "what prints and what is sound can be used"


def test_dependencies_that_do_not_suit_are_named(site: Path) -> None:
    publish(site, "one", "[drivetrain.preset]\na = toy_doctor_checks:fine\n", "not-there>=1\nRequires-Dist: torch<1")
    publish(site, "two", "[drivetrain.preset]\nb = toy_doctor_checks:fine\n", "torch>=2; extra == 'x'")
    rows = [finding for finding in examine(site) if finding.check.startswith("dependencies")]
    assert [row.check for row in rows] == ["dependencies of one"] * 2
    assert rows[0].text == "it requires not-there>=1, which is not installed"
    assert rows[1].text.startswith("it requires torch<1, but torch 2")


def test_json_is_json_whatever_plugins_print(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site / "doctor_loud.py").write_text("print('loading')\ndef check():\n    print('checking')\n    return False, 'bad', ''\n")
    publish(site, "one", "[drivetrain.check]\nloud = doctor_loud:check\n")
    parser, command = argparse.ArgumentParser(), Doctor()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(["--json", "--output-dir", str(site)])) == 1
    said = capsys.readouterr()
    (bad,) = [row for row in json.loads(said.out) if not row["ok"]]
    assert bad["remedy"] and "checking" in said.err


def test_a_plugin_for_another_core(site: Path) -> None:
    publish(site, "one", "[drivetrain.dataset]\nnew = toy_doctor_checks:fine\n", "drivetrain-core>=9,<10")
    finding = found(site)["plugin dataset:new"]
    assert not finding.ok
    assert "needs drivetrain-core>=9,<10" in finding.text
    assert "pip install -U one" in finding.remedy


def test_checks_that_plugins_bring(site: Path) -> None:
    names = ("fine", "empty", "broken")
    publish(site, "one", "[drivetrain.check]\n" + "".join(f"{name} = toy_doctor_checks:{name}\n" for name in names))
    findings = found(site)
    assert (findings["fine (one)"].ok, findings["fine (one)"].text) == (True, "plenty left")
    assert (findings["empty (one)"].ok, findings["empty (one)"].remedy) == (False, "buy more")
    assert (findings["broken (one)"].ok, findings["broken (one)"].text) == (False, "OSError: no answer")


def test_the_launch_environment_is_shown_with_its_evidence(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    finding = found(site)["launch environment"]
    assert finding.text == "mpi: rank 1 of 2, 1 on this machine (from OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE)"
    monkeypatch.setenv("SLURM_PROCID", "0")
    order = found(site)["launchers in order"].text
    assert order.startswith(
        "torchrun: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set; mpi: this one; slurm: SLURM_NTASKS"
    )
    for name, value in {"SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}.items():
        monkeypatch.setenv(name, value)
    order = found(site)["launchers in order"].text
    assert order.endswith("slurm: slurm: rank 0 of 2, 0 on this machine, but an earlier one counts")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "7")
    finding = found(site)["launch environment"]
    assert not finding.ok and "contradicts itself" in finding.text and "unset" in finding.remedy


def test_a_directory_that_cannot_be_written(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    finding = found(site)["output directory"]
    assert not finding.ok and "Permission denied" in finding.text and "output_dir" in finding.remedy


@pytest.mark.parametrize("broken", [False, True])
def test_the_command(site: Path, capsys: pytest.CaptureFixture[str], broken: bool) -> None:
    if broken:
        publish(site, "one", "[drivetrain.check]\nempty = toy_doctor_checks:empty\n")
    parser, command = argparse.ArgumentParser(), Doctor()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(["--json", "--output-dir", str(site)])) == int(broken)
    rows = json.loads(capsys.readouterr().out)
    assert [row["check"] for row in rows if not row["ok"]] == (["empty (one)"] if broken else [])
    assert command.run(parser.parse_args(["--output-dir", str(site)])) == int(broken)
    assert capsys.readouterr().out.endswith("1 of 11 failed\n" if broken else "all is well\n")


def test_hang_is_read_by_the_watchdogs_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = argparse.Namespace(hang=tmp_path, json=False, output_dir=tmp_path)
    monkeypatch.setattr("drivetrain_doctor.is_installed", lambda kind, name: False)
    with pytest.raises(DrivetrainError, match="pip install drivetrain-watchdog"):
        Doctor().run(arguments)

    class Hang:
        def run(self, given: argparse.Namespace) -> int:
            return 1 if given.run_dir == tmp_path else 0

    monkeypatch.setattr("drivetrain_doctor.is_installed", lambda kind, name: True)
    monkeypatch.setattr("drivetrain_doctor.find", lambda kind, name: argparse.Namespace(load=lambda: Hang))
    assert Doctor().run(arguments) == 1
