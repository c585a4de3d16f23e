"""(a) and (b): what an engine adds to a step of a tiny model, and how fast a small GPT trains. All take turns in one run.

    python tests/benchmarks/speed/engines.py [--toy] [--rounds 9] [--out FOLDER] [--engines NAME …]

Each engine lives in a process of its own, and they take turns in a rotating order, so that whatever else the machine does hits all
alike: the tiny MLP is trained anew in each turn, the GPT is trained on by a few steps. The ratio of an engine is the median, over turns,
of its time per step divided by the tuned loop's in the same turn. Four tables: the tiny MLP and the GPT, in fp32 and in bf16, with equal
settings, in which everybody but the textbook loop has fused AdamW, the same schedule, clipping and batches fetched whole; and the GPT
as each engine comes, where only the hyperparameters are given.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from environments import python
from report import environment, markdown, plot, save
from task import Task
from worker import ENGINES

HERE = Path(__file__).parent
BASE = "raw, tuned"
GPT_ENGINES = [name for name in ENGINES if not name.startswith("drivetrain, ")]
PARTS: dict[str, tuple[str, Task, Task, list[str]]] = {
    "mlp": (
        "a tiny MLP (32-32-1, batch 32), equal settings, one thread",
        Task(model="mlp", steps=2000),
        Task(model="mlp", steps=300),
        list(ENGINES),
    ),
    "gpt": (
        "a small GPT (4 layers, width 256, 128 tokens × 8), fp32, equal settings",
        Task(model="gpt", steps=47, warmup=6, turn=4, batch=8),
        Task(model="gpt", steps=9, warmup=2, turn=2, batch=2, width=32, context=32),
        GPT_ENGINES,
    ),
    "gpt-bf16": (
        "the same GPT in bf16, equal settings",
        Task(model="gpt", bf16=True, steps=47, warmup=6, turn=4, batch=8),
        Task(model="gpt", bf16=True, steps=9, warmup=2, turn=2, batch=2, width=32, context=32),
        GPT_ENGINES,
    ),
    "gpt-defaults": (
        "the same GPT, each engine as it comes",
        Task(model="gpt", best=False, steps=63, warmup=6, turn=4, batch=8),
        Task(model="gpt", best=False, steps=9, warmup=2, turn=2, batch=2, width=32, context=32),
        GPT_ENGINES,
    ),
}


class Engine:
    """The process of one engine."""

    def __init__(self, name: str, threads: int, *more: str) -> None:
        self.name = name
        distributions = ENGINES[name][2]
        command, variables = python((*distributions, *more) if distributions else ())
        command += [str(HERE / "worker.py"), name]
        given = variables | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(command, env=given, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self._read()["versions"]

    def begin(self, task: Task, **more: Any) -> dict[str, Any]:
        """Train: to the end, or to the end of the first turn."""
        self.steps = None if more else task.steps
        settings = {key: value for key, value in asdict(task).items() if key != "folder"}
        return self._ask(json.dumps(settings | more))

    def go_on(self) -> dict[str, Any]:
        """The next turn: {"turn": seconds a step}, or what came of the training when it has ended."""
        return self._ask("")

    def train(self, task: Task, **more: Any) -> dict[str, Any]:
        """Train once, to the end."""
        result = self.begin(task, **more)
        while "turn" in result:
            result = self.go_on()
        return result

    def _ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)
        result = self._read()
        if "error" in result:
            raise RuntimeError(f"{self.name}: {result['error']}")
        if self.steps is not None and result.get("passes", self.steps) != self.steps:
            raise RuntimeError(f"{self.name} trained {result['passes']} steps instead of {self.steps}")
        return result

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: its process has ended; is it installed (nox -s benchmarks)?")
        result: dict[str, Any] = json.loads(line)
        return result

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(part: str, names: list[str], rounds: int, toy: bool) -> dict[str, Any]:
    """All engines in turns; returns their rows."""
    title, full, small, possible = PARTS[part]
    task = small if toy else full
    names = [name for name in possible if name in names]
    threads = 1 if task.model == "mlp" else os.cpu_count() or 1
    engines = [Engine(name, threads) for name in names]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    try:
        for engine in engines:  # the first training imports, compiles and fills caches
            engine.train(task)
        for turn in range(rounds):
            for name, rows in one_round(engines, task, turn).items():
                found[name] += rows
            print(f"{part}: round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
        calls = {e.name: e.train(task, count=True)["calls_per_step"] for e in engines} if task.model == "mlp" else {}
    finally:
        for engine in engines:
            engine.close()
    rows = {name: summary(found[name], found[BASE], task) | {"calls_per_step": calls.get(name)} for name in names}
    versions = {key: value for engine in engines for key, value in engine.versions.items()}
    return {"part": part, "title": title, "rounds": rounds, "task": asdict(task), "versions": versions, "rows": rows}


def one_round(engines: list[Engine], task: Task, first: int) -> dict[str, list[dict[str, Any]]]:
    """One training of each engine; a row for each of its turns, with the loss where it ended."""
    order = engines[first % len(engines) :] + engines[: first % len(engines)]
    ended = {engine.name: engine.begin(task) for engine in order}
    if not task.turn:
        return {name: [row] for name, row in ended.items()}
    turns: dict[str, list[float]] = {engine.name: [] for engine in order}
    while any("turn" in result for result in ended.values()):
        order = [*order[1:], order[0]]
        for engine in order:
            result = ended[engine.name] = engine.go_on()
            if "turn" in result:
                turns[engine.name].append(result["turn"])
    return {name: [ended[name] | {"seconds_per_step": seconds} for seconds in taken] for name, taken in turns.items()}


def summary(mine: list[dict[str, Any]], base: list[dict[str, Any]], task: Task) -> dict[str, Any]:
    """Medians and quartiles over rounds."""
    seconds = [turn["seconds_per_step"] for turn in mine]
    ratios = sorted(m["seconds_per_step"] / b["seconds_per_step"] for m, b in zip(mine, base, strict=True))
    return {
        "us_per_step": 1e6 * statistics.median(seconds),
        "least_us": 1e6 * min(seconds),
        "ratio": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "per_second": task.per_step / statistics.median(seconds),
        "loss": statistics.mean(turn["loss"] for turn in mine),
    }


def main() -> None:
    """Run the parts that were asked for, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--toy", action="store_true", help="a minute's try whether everything runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder for JSON, Markdown and plots")
    given = parser.parse_args()
    names = list(dict.fromkeys([BASE, *given.engines]))
    for part in given.parts:
        result = measure(part, names, 1 if given.toy else given.rounds, given.toy) | {"environment": environment()}
        save(given.out, part, result)
        print(markdown(result), flush=True)
        plot(given.out / f"{part}.png", result)


if __name__ == "__main__":
    main()
