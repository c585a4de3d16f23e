"""YAML as a configuration format: YAML 1.2 values, plain data only, and every doubt an error with its line."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from drivetrain import ConfigError, load_training_config
from drivetrain_yaml import Yaml


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        Yaml.loads(text)
    [problem] = caught.value.problems
    return str(problem)


class TestValues:
    """The examples and the table of YAML 1.2.2, section 10.3, and the traps of YAML 1.1."""

    @pytest.mark.parametrize(
        ("written", "value"),
        [
            ("1e-3", 0.001),
            ("3e8", 3e8),
            ("1.", 1.0),
            (".5", 0.5),
            ("-2.5E+3", -2500.0),
            ("+12", 12),
            ("0755", 755),
            ("0o14", 12),
            ("0x1F", 31),
            ("-0", 0),
            ("true", True),
            ("FALSE", False),
            ("null", None),
            ("~", None),
            ("", None),
            ("-.INF", -math.inf),
            *((text, text) for text in ("no", "No", "yes", "on", "OFF", "y", "n")),
            *(
                (text, text)
                for text in ("12:30:00", "2024-01-01", "2001-12-14t21:59:43.10-05:00", "1_000", "0b11", "1e", ".", "=")
            ),
            *((text, text) for text in ("tRue", "nULL", "0o8", "-0x1F", "1.2.3", "3ep", "10%", ".Infx")),
            ("'1e-3'", "1e-3"),
            ('"true"', "true"),
            ("|-\n  12", "12"),
            ("[1, [a, 2.5], {b: off}]", [1, ["a", 2.5], {"b": "off"}]),
        ],
    )
    def test_core_schema(self, written: str, value: Any) -> None:
        read = Yaml.loads(f"key: {written}\n")["key"]
        assert (type(read), read) == (type(value), value)

    def test_not_a_number(self) -> None:
        assert math.isnan(Yaml.loads("key: .nan")["key"])

    def test_keys_follow_the_same_rules(self) -> None:
        assert Yaml.loads("on: 1\nno: 2\n'5': 3\n? long\n: 4") == {"on": 1, "no": 2, "5": 3, "long": 4}

    @pytest.mark.parametrize("text", ["", "# only a comment\n", "\n\n"])
    def test_an_empty_text_is_an_empty_table(self, text: str) -> None:
        assert Yaml.loads(text) == {}


class TestRefused:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("lr: 1\nseed: 2\nlr: 3", "line 3, column 1: the key 'lr' stands twice, first in line 1"),
            ("a:\n  b: 1\n  'b': 2", "line 3, column 3: the key 'b' stands twice, first in line 2"),
            ("a: {b: 1, b: 2}", "line 1, column 11: the key 'b' stands twice, first in line 1"),
            (
                "a: !!python/object/apply:os.system [ls]",
                "line 1, column 4: the tag 'tag:yaml.org,2002:python/object/apply:os.system'",
            ),
            ("a: 1\nb: !custom {c: 1}", "line 2, column 4: the tag '!custom'"),
            ("a: !!str 1", "line 1, column 4: the tag 'tag:yaml.org,2002:str'"),
            ("a: ! x", "line 1, column 4: the tag '!'"),
            ("base: &b {x: 1}\nrun:\n  <<: *b", "line 3, column 3: merge keys (<<)"),
            ("1: a", "line 1, column 1: the key 1 is no text"),
            ("~: a", "line 1, column 1: the key null is no text"),
            ("true: a", "line 1, column 1: the key true is no text"),
            ("? [a]\n: b", "line 1, column 3: the key that is a mapping or list is no text"),
            ("- a\n- b", "line 1, column 1: the top level must be a mapping"),
            ("just text", "line 1, column 1: the top level must be a mapping"),
            ("~", "line 1, column 1: the top level must be a mapping"),
            ("a: 1\n---\nb: 2", "line 2, column 1: a second document"),
            ("a: *nobody", "line 1, column 4: the alias *nobody stands for nothing"),
            ("a: &x [*x]", "line 1, column 8: the alias *x stands for nothing"),
            ("a: [1, 2", "line 1, column 9: "),
            ("a: b: c", "line 1, column 5: "),
            ("a:\n\t- b", "line 2, column 1: "),
            ('a: "\\UFFFFFFFF"', "line 1, column "),
            ('a: "\\ud800"', "line 1, column 4: "),
            ("a: 1\nb: \x07", "line 2, column 4: the character"),
            ("a: " + "9" * 5000, "line 1, column 4: the number has 5000 digits"),
            ("a: 0x" + "f" * 5000, "line 1, column 4: the number has 5002 digits"),
        ],
    )
    def test_with_line_and_column(self, text: str, said: str) -> None:
        assert refused(text).startswith(said)

    def test_nothing_is_executed(self, tmp_path: Path) -> None:
        target = tmp_path / "made"
        refused(f"a: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{target.as_posix()}']]")
        assert not target.exists()


class TestBounds:
    def test_size(self) -> None:
        assert len(Yaml.loads("a: " + "x" * ((1 << 20) - 3))["a"]) == (1 << 20) - 3
        assert "larger than 1048576 bytes" in refused("a: " + "x" * (1 << 20))
        assert "larger" in refused("a: " + "é" * (1 << 19))  # bytes, not characters

    def test_depth(self) -> None:
        assert Yaml.loads("a: " + "[" * 48 + "1" + "]" * 48)  # with the table and the value 50 levels
        assert refused("a: " + "[" * 49 + "1" + "]" * 49).endswith("is nested deeper than 50 levels")

    @pytest.mark.parametrize("text", ["a: " + "[" * 20_000, "a: " + "{b: " * 20_000, "- " * 20_000, "? " * 20_000])
    def test_endless_nesting_is_refused_at_once(self, text: str) -> None:
        start = time.process_time()
        assert "nested deeper than 50 levels" in refused(text)
        assert time.process_time() - start < 2

    def test_aliases(self) -> None:
        assert Yaml.loads("a: &x 1\nb: [" + "*x, " * 100 + "]")["b"] == [1] * 100
        assert "more than 100 aliases" in refused("a: &x 1\nb: [" + "*x, " * 101 + "]")

    def test_nested_aliases_do_not_multiply(self) -> None:
        """Nine levels of nine: 81 aliases, 9^10 values."""
        bomb = "a0: &a0 x\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))
        assert "more than 10000 values" in refused(bomb)

    def test_an_alias_is_a_copy(self) -> None:
        table = Yaml.loads("a: &x {lr: 1}\nb: *x")
        table["a"]["lr"] = 2
        assert table["b"] == {"lr": 1}

    def test_any_text_gives_a_table_or_a_config_error(self) -> None:
        rng = random.Random(0)
        pieces = [
            *"abc019.:-,[]{}&*!|>'\"%@`#?~= \n\t\\",
            "\n  ",
            ": ",
            "- ",
            "<<",
            "---",
            "...",
            "\\x",
            "!!",
            "\ufeff",
            "\x85",
            "é",
            "\x00",
        ]
        outcomes = set()
        for _ in range(3000):
            text = "".join(rng.choices(pieces, k=rng.randrange(1, 30)))
            try:
                outcomes.add(type(Yaml.loads(text)))
            except ConfigError:
                outcomes.add(ConfigError)
        assert outcomes == {dict, ConfigError}


AWKWARD = [
    *("1e-3", "0o14", "0755", "0x1F", "1.", ".5", "1_000", ".inf", ".nan", "12:30:00", "2024-01-01"),
    *("no", "on", "true", "null", "~", "", " x ", "=", "<<", "- a", "a: b", "#c", "*x", "&x", "!t", "%", "@", "`", "'", '"'),
    *("é", "多", "\x07", "a\nb\n", "\ttab", "x" * 300, "\ufeff"),
]


class TestWriting:
    def test_reads_back_equal_and_typed(self) -> None:
        table = {
            "texts": AWKWARD,
            **dict.fromkeys(AWKWARD, 1),
            "numbers": [0, -5, 10**30, 1e-3, 1e-5, 1e300, -0.5, 1.0, math.inf],
            "others": [True, False, None, [], {}, [[]], {"a": {"b": []}}],
        }
        read = Yaml.loads(Yaml.dumps(table))
        assert (read, list(read)) == (table, list(table))
        assert [type(v) for v in read["numbers"]] == [type(v) for v in table["numbers"]]

    def test_texts_are_texts_for_yaml_1_1_readers_too(self) -> None:
        assert yaml.safe_load(Yaml.dumps({"texts": AWKWARD}))["texts"] == AWKWARD

    def test_what_stands_twice_is_written_twice(self) -> None:
        shared = [1]
        assert Yaml.dumps({"a": shared, "b": shared}) == "a:\n- 1\nb:\n- 1\n"

    def test_only_plain_data(self) -> None:
        with pytest.raises(yaml.YAMLError):
            Yaml.dumps({"a": object()})


class TestInTheEngine:
    """Through the entry points, as a user meets it."""

    @pytest.mark.parametrize("suffix", ["yaml", "yml", "YAML"])
    def test_a_configuration_file(self, tmp_path: Path, suffix: str) -> None:
        file = tmp_path / f"run.{suffix}"
        file.write_text("max_duration: 5st\nseed: 0o14\nmax_grad_norm: 1e-1\nscheduler: null\ndataloader: {shuffle: false}\n")
        config = load_training_config(file)
        assert (str(config.max_duration), config.seed, config.max_grad_norm, config.dataloader.shuffle) == (
            "5st",
            12,
            0.1,
            False,
        )
        assert config.origin("seed") == file.name

    def test_saved_and_loaded(self, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_text("max_duration: 5st\nrun_name: 'no'\noutput_dir: '1e-3'\n")
        config = load_training_config(file)
        config.save(tmp_path / "again.yaml")
        again = load_training_config(tmp_path / "again.yaml")
        assert again.to_dict() == config.to_dict()
        assert (again.run_name, str(again.output_dir)) == ("no", "1e-3")

    def test_errors_name_the_file_and_the_line(self, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_text("seed: 1\nseed: 2\n")
        with pytest.raises(ConfigError) as caught:
            load_training_config(file)
        assert str(caught.value) == f"{file}: 1 problem\n  line 2, column 1: the key 'seed' stands twice, first in line 1"

    def test_no_torch(self) -> None:
        code = (
            "import sys; from drivetrain_yaml import Yaml; Yaml.dumps(Yaml.loads('a: 1'))\n"
            "try: Yaml.loads('a: [')\nexcept Exception as error: print(type(error).__name__, 'torch' in sys.modules)"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (result.stdout.strip(), result.stderr) == ("ConfigError False", "")
