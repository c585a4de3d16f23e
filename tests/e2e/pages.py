"""Reading the blocks of README files and of the site, for the tests that run them; test_pages.py has the rules of a page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+) -->\n+)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
FILE = re.compile(r"(?:#|//) ([\w./-]+\.(?:py|toml|yaml|json|sh))\n")


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str
    reason: str | None  # why it is not run

    @property
    def file(self) -> str | None:
        opening = FILE.match(self.text)
        return opening[1] if opening else None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        line = text[: match.start("language")].count("\n") + 1
        yield Block(page, line, match["language"], match["text"], match["reason"])


def commands_of(block: Block) -> list[str]:
    marked = [line.removeprefix("$ ") for line in block.text.splitlines() if line.startswith("$ ")]
    return marked or block.text.splitlines()


def find_what_is_shown(block: Block, said: str) -> None:
    shown = [line for line in block.text.splitlines() if line.strip() and not line.startswith("$ ") and "$ " in block.text]
    position = 0
    for line in shown:
        pattern = ".*".join(re.escape(part) for part in line.strip().split("…"))
        found = re.compile(pattern).search(said, position)
        assert found, f"{block}: {line!r} is not printed, or not here:\n{said}"
        position = found.end()
