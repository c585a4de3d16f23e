"""Whatever a configuration file holds, it is read or refused with a message: no traceback, no hang, no flood of memory."""

from __future__ import annotations

import copy
import json
import random
import resource
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tomli

from drivetrain import ConfigError, TrainingConfig, load_training_config, registry
from drivetrain.formats import to_toml
from drivetrain_yaml import Yaml

VALID: dict[str, Any] = {
    "run_name": "fuzzed",
    "seed": 3,
    "max_duration": "100st",
    "per_device_batch_size": 8,
    "max_grad_norm": 1.0,
    "model": {"use": "gpt", "layers": 2, "heads": 2, "width": 32, "context": 16},
    "data": {"use": "text", "path": "stdlib", "context": 16, "held_out": 0.05},
    "optimizer": {"use": "adamw", "lr": 4e-3, "betas": [0.9, 0.95], "weight_decay": 0.1},
    "scheduler": {"use": "cosine", "warmup": "5%"},
    "dataloader": {"num_workers": 0, "shuffle": True},
    "callbacks": [{"use": "checkpoint", "every": "50st", "keep_last": 2}, "early_stopping"],
    "eval_interval": "1ep",
}
DEEPEST, HUGE = 60, 1 << 13
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    10**400,
    1e308,
    float("inf"),
    float("nan"),
    "",
    " ",
    "\x00",
    "a\x00b",
    "\x1b[2J",
    "‮",
    "é" * 50,
    "🚂",
    "x" * HUGE,
    "../../etc",
    "con",
    "os.system",
    "drivetrain_lm:GPTComponent",
    "__class__",
    [],
    [[]],
    {},
    {"use": "adamw"},
    {"use": None},
    {"use": ["adamw"]},
    {"": 1},
    {"use": "adamw", "use ": 1},
    ["early_stopping"] * 200,
]


# -- of the table ----------------------------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a table."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, item in items for inner in places(item, (*path, key)))]


def mutate(table: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A table with one to three mistakes: something dropped, renamed, doubled, of another type, huge, odd, or deeply nested."""
    table = copy.deepcopy(table)
    for _ in range(chance.randint(1, 3)):
        path = chance.choice(places(table)[1:] or [("seed",)])
        parent: Any = table
        for key in path[:-1]:
            parent = parent[key]
        key = path[-1]
        kind = chance.choice(("drop", "odd", "odd", "retype", "rename", "double", "nest"))
        if kind == "drop":
            del parent[key]
        elif kind == "odd":
            parent[key] = copy.deepcopy(chance.choice(ODD))
        elif kind == "retype":
            parent[key] = str(parent.get(key)) if isinstance(parent, dict) else [parent[key]]
        elif kind == "rename" and isinstance(parent, dict):
            parent[str(key) + chance.choice(("_", "s", "é", ".", " "))] = parent.pop(key)
        elif kind == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif kind == "nest":
            for _ in range(chance.choice((2, DEEPEST))):
                parent[key] = {"use": parent[key]} if chance.random() < 0.5 else [parent[key]]
    return table


# -- of the text -----------------------------------------------------------------------------------------------------------


BOMB = "".join(
    f"{name}: &{name} [{f'{item},' * 9}{item}]\n" for name, item in (("a", "x"), ("b", "*a"), ("c", "*b"), ("d", "*c"))
)
STRANGE = "\x00\x07\x85\u2028\ufeff\ud800{}[]:&*!|>'\"#%@`,=\t\\é🚂"
SNIPPETS = ("!!python/object/apply:os.system [ls]", "<<: *x", "---", "1e-3", "no", "0755", "9" * 5_000)


def scramble(text: str, chance: random.Random) -> str:
    """A text with one to three mistakes in its characters and lines."""
    for _ in range(chance.randint(1, 3)):
        lines, line = text.split("\n"), chance.randrange(text.count("\n") + 1)
        at = chance.randrange(len(text) + 1)
        before, after = text[:at], text[at:]
        text = chance.choice(
            (
                before + after[chance.randint(1, 5) :],
                before + chance.choice(STRANGE) + after,
                "\n".join([*lines[:line], lines[line], *lines[line:]]),
                "\n".join([*lines[:line], *lines[line + 1 :]]),
                before + chance.choice("[{(") * 20_000 + after,
                before + chance.choice(SNIPPETS) + after,
                BOMB + text,
                before,
            )
        )
    return text


FORMATS: dict[str, Callable[[dict[str, Any]], str]] = {
    "yaml": Yaml.dumps,
    "toml": to_toml,
    "json": lambda t: json.dumps(t, indent=1),
}


def attempt(path: Path, data: bytes) -> str:
    """Load one; what it came to. Any other exception than `ConfigError` fails the test."""
    path.write_bytes(data)
    began = time.process_time()
    try:
        config = load_training_config(path)
        assert isinstance(config, TrainingConfig)
        result = "read"
    except ConfigError as error:
        assert error.problems and str(error)
        str(error).encode()  # it can be printed
        result = "refused"
    assert time.process_time() - began < 5
    return result


@pytest.fixture(autouse=True)
def discovered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the metadata of what is installed once for all: it takes most of the time, and does not change."""
    monkeypatch.setattr(registry, "candidates", cache(registry.candidates))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("number", [50, pytest.param(700, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_mutations(tmp_path: Path, suffix: str, number: int) -> None:
    chance = random.Random(f"fuzz {suffix} {number}")
    count = {"read": 0, "refused": 0}
    valid = FORMATS[suffix](VALID)
    attempt(tmp_path / f"run.{suffix}", valid.encode())  # imports the plugins that are named
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(number):
        if index % 2:
            text = scramble(valid, chance)
        else:
            try:
                text = FORMATS[suffix](mutate(VALID, chance))
            except (ValueError, RecursionError):  # a writer may refuse what no file can hold
                continue
        count[attempt(tmp_path / f"run.{suffix}", text.encode(errors="surrogatepass"))] += 1
    assert count["read"] > number / 50 and count["refused"] > number / 4, count
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_valid_one_is_read(tmp_path: Path, suffix: str) -> None:
    assert attempt(tmp_path / f"run.{suffix}", FORMATS[suffix](VALID).encode()) == "read"


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"\x00" * 100, b"\x80", b"", b"\n" * 10_000, bytes(range(256))])
@pytest.mark.parametrize("suffix", FORMATS)
def test_bytes_that_are_no_text(tmp_path: Path, suffix: str, data: bytes) -> None:
    attempt(tmp_path / f"run.{suffix}", data)


@pytest.mark.parametrize("suffix", FORMATS)
def test_depth(tmp_path: Path, suffix: str) -> None:
    for depth in (100, 1000, 30_000):
        inner = "[" * depth + "]" * depth
        text = {"yaml": f"callbacks: {inner}", "toml": f"callbacks = {inner}", "json": f'{{"callbacks": {inner}}}'}[suffix]
        assert attempt(tmp_path / f"run.{suffix}", text.encode()) == "refused"


@pytest.mark.parametrize(
    "text",
    [
        *("optimizer.lr=", "=1", "a..b=1", "optimizer.lr=[[[[", "callbacks=1", "callbacks.x=1", "optimizer.lr=" + "9" * 5000),
        *(
            "seed.x=1",
            "max_duration.x=1",
            "max_grad_norm.x.y=1",
            "dataloader.shuffle.x=1",
            "optimizer.lr.x=1",
            "callbacks.x.y.z=1",
        ),
    ],
)
def test_overrides(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(to_toml(VALID))
    with pytest.raises(ConfigError):
        load_training_config(path, overrides=[text])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer: {use: adamw, lr: 1e-3}", None),  # YAML 1.1 would make it a text
        ("callbacks: [{use: early_stopping, monitor: no}]", None),  # … and this false
        ("seed: 0755", None),
        ("seed: 12:30:00", "expected a whole number, got the text '12:30:00'"),
        ("seed: 1\nseed: 2", "stands twice"),
        ("seed: !!python/object/apply:os.getpid []", "tag"),
        ("optimizer: &o {use: adamw}\nscheduler: {<<: *o}", "merge keys"),
        ("dataloader: {shuffle: yes}", "expected true or false, got the text 'yes'"),
    ],
)
def test_the_traps_of_yaml(tmp_path: Path, text: str, said: str | None) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    if said is None:
        load_training_config(path)
    else:
        with pytest.raises(ConfigError) as caught:
            load_training_config(path)
        assert said in str(caught.value)


def test_the_generator_makes_what_it_should() -> None:
    """Negative control: the mutations differ from each other and from the valid table, and TOML texts still parse now and then."""
    chance = random.Random(1)
    made = [mutate(VALID, chance) for _ in range(100)]
    assert sum(table == VALID for table in made) < 20
    texts = [scramble(to_toml(VALID), chance) for _ in range(100)]
    assert len(set(texts)) > 95
    parsed = 0
    for text in texts:
        try:
            tomli.loads(text)
            parsed += 1
        except (ValueError, RecursionError):
            pass
    assert 0 < parsed < 60
