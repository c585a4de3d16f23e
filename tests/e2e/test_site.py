"""What the site is made of, without building it: `nox -s docs` does that, a warning being an error."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import attrs
import pytest
from tests.e2e.pages import ROOT

import drivetrain
from drivetrain import TrainingConfig
from drivetrain.catalogue import FIRST_PARTY, names_of


@pytest.fixture(scope="module")
def references() -> ModuleType:
    spec = importlib.util.spec_from_file_location("references", ROOT / "docs" / "references.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_has_every_key_with_its_meaning(references: ModuleType) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.+) \|$", "\n".join(references.configuration()), re.MULTILINE)
    keys = [f.name for f in attrs.fields(TrainingConfig) if f.init]
    assert [row[0] for row in rows][: len(keys)] == keys
    assert "| `seed` | `int` | `0` | fixes initial weights" in "\n".join(references.configuration())
    assert all(meaning.strip() for *_, meaning in rows)


def test_the_catalogue_has_every_name_of_ours(references: ModuleType) -> None:
    listed = set(re.findall(r"^\| \[`([\w-]+)`\]\(generated/(\w+)\.md#", "\n".join(references.plugins()), re.MULTILINE))
    assert listed == {(name, kind) for kind in FIRST_PARTY for name in names_of(kind)}


def test_the_api_has_every_public_name_once(references: ModuleType) -> None:
    names = [name for group in references.GROUPS.values() for name in group]
    assert sorted(names) == sorted(drivetrain.__all__)


def test_links_are_seen_from_the_page_that_a_text_becomes(references: ModuleType) -> None:
    readme = ROOT / "plugins" / "checkpoint" / "README.md"
    text = "[a](../../README.md) [b](../logging/README.md#trackers) [c](../../docs/reliability.md) [d](../../SECURITY.md) [e](https://x.y)"
    assert references.relinked(text, readme, "generated/distributions/checkpoint.md") == (
        "[a](../readme.md) [b](logging.md#trackers) [c](../../reliability.md) [d](../security.md) [e](https://x.y)"
    )


PAGES = [
    path for pattern in ("*.md", "*/*/README.md", "docs/*.md", "docs/tutorials/*.md") for path in sorted(ROOT.glob(pattern))
]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path, references: ModuleType) -> None:
    links = [match[2] for match in references.LINK.finditer(page.read_text(encoding="utf-8"))]
    assert [link for link in links if not (page.parent / link).exists()] == []
