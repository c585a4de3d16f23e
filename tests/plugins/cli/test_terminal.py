"""Cleaning and aligning text."""

from __future__ import annotations

import io

import pytest

from drivetrain_cli.terminal import bold, clean, clean_lines, columns, wrapped


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n[ERROR] fake\x1b[2J", "a [ERROR] fake"),
        ("\x1b]0;title\x07a\x1b]8;;http://x\x1b\\b", "ab"),
        ("\x9b31mred", "red"),
        ("\x1b(Bx\x1bcy", "xy"),
        ("a\rb\x08\x7f\x85\u2028\u2029c", "abc"),
        ("admin\u202e\u2066 nimda", "admin nimda"),
        ("\x1b", ""),
        ("\x1b[", ""),
        ("ü · 学 v̂", "ü · 学 v̂"),
        (3, "3"),
    ],
)
def test_clean(text: object, expected: str) -> None:
    assert clean(text) == expected


def test_every_character_a_terminal_obeys_goes() -> None:
    controls = [*range(32), 0x7F, *range(0x80, 0xA0)]
    assert clean_lines("".join(map(chr, controls))).strip() == ""


def test_columns_are_aligned_and_the_last_one_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    rows = [("a", "bb", "one two three four five six seven"), ("long", "b", "")]
    lines = columns(rows, wrap_last=True)
    assert lines == ["a     bb  one two three four five six", "          seven", "long  b"]
    assert columns(rows)[0] == "a     bb  one two three four five six seven"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "variables", "styled"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"NO_COLOR": ""}, True),  # no-color.org: an empty value is as good as none
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
    ],
)
def test_bold_only_where_it_is_wanted(
    stream: io.StringIO, variables: dict[str, str], styled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in ({"TERM": "xterm"} | variables).items():
        monkeypatch.setenv(name, value)
    assert bold("x", stream) == ("\x1b[1mx\x1b[0m" if styled else "x")


def test_a_long_line_breaks_between_words_in_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    line = "run quiet-fox · plugins: one, two, three"
    monkeypatch.setenv("NO_COLOR", "1")
    assert wrapped(line, Terminal()) == "run quiet-fox\n  plugins: one, two,\n  three"
    assert wrapped(f"\x1b[1m{'x' * 23}\x1b[0m", Terminal()) == f"\x1b[1m{'x' * 23}\x1b[0m", "sequences take no room"
    assert wrapped(line, io.StringIO()) == line
