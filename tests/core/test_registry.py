"""Discovery from metadata alone, on distributions made for the test."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from drivetrain import PluginError, registry
from drivetrain.catalogue import FIRST_PARTY
from drivetrain.errors import suggest

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a distribution on the path: its metadata, and a module that notes its own import."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("DRIVETRAIN_PLUGINS", raising=False)

    def make(
        dist: str, module: str, entries: str, requires: str = "drivetrain-core>=0.1,<1", code: str = "class Thing: pass\n"
    ) -> None:
        info = tmp_path / f"{dist.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.2\nRequires-Dist: {requires}\n")
        (info / "entry_points.txt").write_text(entries)
        (tmp_path / f"{module}.py").write_text(code)

    return make


def test_listing_imports_nothing(install: Install) -> None:
    install("one-dist", "mod_one_a", "[drivetrain.optimizer]\nzeta = mod_one_a:Thing\n")
    (found,) = registry.candidates("optimizer")["zeta"]
    assert (found.distribution, found.version, found.target) == ("one-dist", "1.2", "mod_one_a:Thing")
    assert "mod_one_a" not in sys.modules
    assert registry.load("optimizer", "zeta").__name__ == "Thing"  # type: ignore[attr-defined]
    assert "mod_one_a" in sys.modules


def test_two_claims_are_an_error_naming_both_until_one_is_chosen(install: Install) -> None:
    install("one-dist", "mod_one_b", "[drivetrain.optimizer]\nzeta = mod_one_b:Thing\n")
    install("two-dist", "mod_two_b", "[drivetrain.optimizer]\nzeta = mod_two_b:Thing\n")
    with pytest.raises(PluginError, match=r"2 installed distributions.*one-dist 1\.2.*two-dist 1\.2.*'one-dist:zeta'"):
        registry.load("optimizer", "zeta")
    assert registry.find("optimizer", "two-dist:zeta").target == "mod_two_b:Thing"
    assert "mod_one_b" not in sys.modules


def test_a_plugin_for_another_core_is_refused_before_import(install: Install) -> None:
    install("old-dist", "mod_old", "[drivetrain.optimizer]\nzeta = mod_old:Thing\n", requires="drivetrain-core (<0.1,>=0.0.5)")
    with pytest.raises(PluginError, match=r"old-dist 1\.2\) needs drivetrain-core<0\.1,>=0\.0\.5"):
        registry.load("optimizer", "zeta")
    assert "mod_old" not in sys.modules


def test_a_failing_import_says_who_and_why(install: Install) -> None:
    install("bad-dist", "mod_bad", "[drivetrain.optimizer]\nzeta = mod_bad:Thing\n", code="import absent_module_xyz\n")
    with pytest.raises(
        PluginError, match=r"optimizer:zeta \(bad-dist 1\.2\) failed to import mod_bad:Thing: ModuleNotFoundError"
    ):
        registry.load("optimizer", "zeta")


def test_unknown_names(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("one-dist", "mod_one_c", "[drivetrain.optimizer]\nzeta = mod_one_c:Thing\n")
    with pytest.raises(PluginError, match="Did you mean 'zeta'"):
        registry.find("optimizer", "zetta")
    monkeypatch.setenv("DRIVETRAIN_PLUGINS", "off")
    with pytest.raises(PluginError, match=r"pip install drivetrain-lion or look at DRIVETRAIN_PLUGINS='off'"):
        registry.find("optimizer", "lion")
    monkeypatch.delenv("DRIVETRAIN_PLUGINS")
    monkeypatch.setitem(FIRST_PARTY["optimizer"], "drivetrain-absent", ("absent",))
    with pytest.raises(PluginError, match=r"pip install drivetrain-absent$"):
        registry.find("optimizer", "absent")
    with pytest.raises(PluginError, match=r"Did you mean 'absent'\? \(pip install drivetrain-absent\)$"):
        registry.find("optimizer", "abssent")


@pytest.mark.parametrize("name", ["Adamw", "AdamW", "ADAMW", "adamW", "AdanW"])
def test_the_nearest_name_is_found_in_capitals_too(name: str) -> None:
    assert suggest(name, ["adam", "adamw", "sgd"]) == " Did you mean 'adamw'?"
    assert suggest("run", ["RUN"]) == " Did you mean 'RUN'?"


def test_a_distribution_that_does_not_have_the_name(install: Install) -> None:
    install("one-dist", "mod_one_f", "[drivetrain.optimizer]\nzeta = mod_one_f:Thing\n")
    with pytest.raises(
        PluginError, match=r"named 'foo:zeta' of the kind optimizer\. 'zeta' comes from one-dist: write 'zeta'\.$"
    ):
        registry.find("optimizer", "foo:zeta")
    install("two-dist", "mod_two_f", "[drivetrain.optimizer]\nzeta = mod_two_f:Thing\n")
    with pytest.raises(PluginError, match="comes from one-dist, two-dist: write 'one-dist:zeta' or 'two-dist:zeta'"):
        registry.find("optimizer", "foo:zeta")


@pytest.mark.parametrize(
    ("switch", "seen"),
    [("off", False), ("zeta", True), ("optimizer:zeta", True), ("one-dist, x", True), ("eta", False), ("", True)],
)
def test_the_switch_restricts_what_may_load(install: Install, monkeypatch: pytest.MonkeyPatch, switch: str, seen: bool) -> None:
    install("one-dist", "mod_one_d", "[drivetrain.optimizer]\nzeta = mod_one_d:Thing\n")
    monkeypatch.setenv("DRIVETRAIN_PLUGINS", switch)
    assert registry.is_installed("optimizer", "zeta") is seen


@pytest.mark.parametrize(
    ("version", "wanted", "holds"),
    [
        ("0.1.0", ">=0.1,<1", True),
        ("1.0", "<1", False),
        ("0.1", "==0.1.0", True),
        ("0.1.3", "==0.1.*", True),
        ("0.2", "!=0.1.*", True),
        ("0.1.5", "~=0.1.2", True),
        ("0.2.0", "~=0.1.2", False),
        ("0.10", ">0.9", True),
        ("0.9.9", "<=0.9.9", True),
        ("0.2.0rc1", ">=0.2", True),
        ("0.1", "", True),
    ],
)
def test_version_ranges(version: str, wanted: str, holds: bool) -> None:
    assert registry._satisfies(version, wanted) is holds


@pytest.mark.parametrize(
    ("requirement", "wanted"),
    [
        ("drivetrain-core>=0.1,<1", ">=0.1,<1"),
        ("drivetrain-core (>=0.1, <1)", ">=0.1,<1"),
        ("Drivetrain_Core>=99", ">=99"),
        ("drivetrain.core[all] >= 99", ">=99"),
        ("drivetrain-core", ""),
        ("drivetrain-core>=99; python_version >= '3'", ">=99"),
        ("drivetrain-core>=99; python_version < '3'", None),
        ("drivetrain-core>=99; extra == 'next'", None),
        ("drivetrain-core-extras>=99", None),
        ("drivetrain>=99", None),
    ],
)
def test_the_core_is_found_in_any_spelling(requirement: str, wanted: str | None) -> None:
    assert registry._core_range(requirement) == wanted


def test_markers_without_packaging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.markers", None)
    assert registry._core_range("drivetrain-core>=99; extra == 'next'") is None
    assert registry._core_range("drivetrain-core>=99; python_version < '3'") == ">=99"


def test_the_catalogue_is_unambiguous() -> None:
    assert set(FIRST_PARTY) <= set(registry.KINDS)
    for dists in FIRST_PARTY.values():
        names = [name for group in dists.values() for name in group]
        assert len(names) == len(set(names))
