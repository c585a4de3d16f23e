"""`drivetrain train FILE` with odd files: it trains or ends with 2 and a message; no traceback, no hang, no flood of memory."""

from __future__ import annotations

import copy
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.faults.served import Ended, Served
from tests.faults.test_config_fuzz import FORMATS, VALID, mutate, scramble

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
SHORT = {"data": {**VALID["data"], "max_bytes": 4000}, "eval_interval": "50st"}
BOUNDS = (
    "max_duration=1st",
    "log_interval=1st",
    "device=cpu",
    "standard_callbacks=false",
)  # a file that is good trains one step
IMPORTS = "lm,lm.model,lm.text,optimizers,schedulers,early_stopping,yaml,progress,logging,throughput,checkpoint.callback"
WARM = {"SERVED_IMPORTS": ",".join(f"drivetrain_{name}" for name in IMPORTS.split(",")) + ",tqdm,yaml,psutil"}
SECONDS, MEMORY = 10.0, 200 << 20


def valid() -> dict[str, Any]:
    return copy.deepcopy(VALID | SHORT)


def texts(suffix: str, number: int, seed: int) -> list[str]:
    """So many files that are not the valid one, half of them changed as a table and half as a text."""
    chance, write, found = random.Random(f"cli {suffix} {seed}"), FORMATS[suffix], list[str]()
    good = write(valid())
    while len(found) < number:
        try:
            text = write(mutate(valid(), chance)) if len(found) % 2 else scramble(good, chance)
        except (ValueError, RecursionError):  # a writer may refuse what no file can hold
            continue
        if text != good:
            found.append(text)
    return found


def judge(ended: Ended, text: str, least: int) -> str:
    """What came of a file. `least` is the memory of the program itself."""
    told = f"{ended}\n{text[:3000]!r}"
    assert ended.code in (0, 2), told
    assert "Traceback" not in ended.err + ended.out, told
    assert ended.seconds < SECONDS and ended.memory - least < MEMORY, told
    if ended.code == 2:
        assert ended.err.strip() and "\x1b" not in ended.err and "\x07" not in ended.err, told
        return "refused"
    assert "1 step" in ended.out, told
    return "trained"


def fuzz(folder: Path, suffix: str, number: int, seed: int) -> Counter[str]:
    count = Counter[str]()
    with Served(folder, WARM) as server:
        path = folder / f"run.{suffix}"
        path.write_text(FORMATS[suffix](valid()))
        first = server.call("train", path.name, *BOUNDS)
        assert first.code == 0, first.err
        for index, text in enumerate(texts(suffix, number, seed)):
            path.write_bytes(text.encode(errors="surrogatepass"))
            ended = server.call("train", path.name, *BOUNDS, "output_dir=runs", f"run_name=run{index}", memory=2 * MEMORY)
            count[judge(ended, text, first.memory)] += 1
    assert not (folder.parent / "etc").exists()
    return count


@pytest.mark.timeout(900)
@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_a_few_hundred(tmp_path: Path, suffix: str) -> None:
    count = fuzz(tmp_path / "here", suffix, 100, 1)
    assert count.total() == 100 and count["trained"] > 3 and count["refused"] > 30, count


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_two_thousand(tmp_path: Path, suffix: str) -> None:
    count = fuzz(tmp_path / "here", suffix, 1000, 2)
    assert count.total() == 1000 and count["trained"] > 30 and count["refused"] > 300, count
