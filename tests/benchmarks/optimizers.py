"""Steps to a target loss for each optimizer on a small GPT, and docs/optimizers.md, numbers and words.

    python tests/benchmarks/optimizers.py                       # all that are installed; an hour and a half on two idle cores
    python tests/benchmarks/optimizers.py adamw lion --seeds 3
    python tests/benchmarks/optimizers.py --text                # write the page again from docs/optimizers.json, without training

What is compared. A learning rate must fall to reach a good loss, so a run's loss half way says nothing: each length of training is
a run of its own with its whole schedule (linear warm-up over 10 %, linear fall to 0; schedule-free ones stay up). For each optimizer
the learning rate is the best of a grid of factors of two, extended until the best is not at its edge, found at the middle length
with a seed that takes no part in the comparison. Then every length is trained with every seed. The target is AdamW's mean loss on
held-out text at the middle length; the steps to it are read off the straight line between lengths, in the logarithm of the steps.

A difference to AdamW counts only by the rule of modded-nanogpt's optimization benchmark (one-sided z-test at 3.08 standard
errors, p = 0.001), with the deviation over seeds pooled over all optimizers: of the loss at the middle length, and of the logarithm
of the steps to the target. That a difference does not count is no evidence that there is none.

Finished runs are kept in a JSON file by everything that determines them: an interrupted call goes on, a changed setting runs anew.
What the page needs of them is in docs/optimizers.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

# What is trained, by name: the options that do not change, the middle of the grid of learning rates, and the schedule's name. Betas
# and decay are those that each one's paper gives for language models, scaled to nothing.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 4e-3, "betas": [0.9, 0.95], "weight_decay": 0.1},
    "adamw_8bit": {"lr": 4e-3, "betas": [0.9, 0.95], "weight_decay": 0.1},
    "lion": {"lr": 5e-4, "betas": [0.95, 0.98], "weight_decay": 1.0},
    "sophia": {"lr": 2e-3, "weight_decay": 0.2},
    "muon": {"lr": 4e-3, "weight_decay": 0.1},
    "schedulefree_adamw": {"lr": 8e-3, "betas": [0.95, 0.99], "weight_decay": 0.1},
}
CONSTANT = ("schedulefree_adamw", "schedulefree_sgd")  # whose averaging takes the place of the fall
BASELINE = "adamw"
Z = 3.08  # 0.004 / 0.0013, the rule's own numbers
TUNING_SEED = 1000  # chooses the rates, and is not scored
_START, _END = "<!-- results -->", "<!-- end of results -->"
_TITLE = """# Optimizers compared

Steps to the same loss on a small GPT, on CPUs. The command that makes the table, whose source says how it is measured:

```console
$ python tests/benchmarks/optimizers.py
```

Each optimizer's learning rate is tuned with a seed of its own; every length of training is a run of its own with its whole
schedule. Steps are counted, not seconds.
"""


class Setting(NamedTuple):
    """The model, the data and the lengths; part of each result's key."""

    layers: int = 4
    width: int = 128
    context: int = 128
    batch: int = 8
    lengths: tuple[int, ...] = (160, 240, 360, 540, 810)
    grid: tuple[float, ...] = (0.5, 1.0, 2.0)
    baseline_grid: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    train_bytes: int = 4_000_000
    eval_bytes: int = 65_536

    @property
    def middle(self) -> int:
        """The length at which the rates are chosen and the losses compared."""
        return self.lengths[len(self.lengths) // 2]


TINY = Setting(layers=1, width=32, context=32, batch=4, lengths=(6, 9, 14), train_bytes=20_000, eval_bytes=4_000)


class Job(NamedTuple):
    """One run."""

    name: str
    lr: float
    steps: int
    seed: int
    setting: Setting

    @property
    def key(self) -> str:
        """Everything that determines the result."""
        options = {**OPTIMIZERS.get(self.name, {}), "lr": self.lr}
        sizes = {k: v for k, v in self.setting._asdict().items() if k not in ("lengths", "grid", "baseline_grid")}
        return json.dumps([self.name, options, self.steps, self.seed, sizes])


def train(job: Job) -> dict[str, float]:
    """Train once; the loss on held-out text, the seconds of training, and Sophia's mean win rate. In a process of its own."""
    import torch

    from drivetrain import Callback, CallbackContext, Trainer, TrainingConfig

    torch.set_num_threads(1)
    s = job.setting
    text = {"use": "text", "context": s.context}
    config = TrainingConfig(
        seed=job.seed,
        device="cpu",
        precision="fp32",
        model={"use": "gpt", "layers": s.layers, "heads": 4, "width": s.width, "context": s.context},
        data={**text, "max_bytes": s.train_bytes},
        eval_data={**text, "max_bytes": s.eval_bytes},
        optimizer={"use": job.name, **OPTIMIZERS.get(job.name, {}), "lr": job.lr},
        scheduler={"use": "constant" if job.name in CONSTANT else "linear", "warmup": "10%"},
        max_duration=f"{job.steps}st",
        max_grad_norm=1.0,
        per_device_batch_size=s.batch,
        per_device_eval_batch_size=32,
        eval_interval=None,
        log_interval="10st",
        standard_callbacks=False,
    )
    rates: list[float] = []

    class WinRates(Callback):
        def on_log(self, ctx: CallbackContext) -> None:
            rates.extend(value for name, value in ctx.metrics.items() if name == "train/sophia_win_rate")

    trainer = Trainer(None, config, eval_dataset=held_out(config), callbacks=[WinRates()])
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    found = {"loss": trainer.evaluate()["eval/loss"], "seconds": seconds}
    return {**found, "win_rate": statistics.mean(rates)} if rates else found


def held_out(config: Any) -> Any:
    """The held-out part of the text: `eval_data` of a configuration means a text's training part."""
    from drivetrain import make_component

    maker: Any = make_component("dataset", config.eval_data, "eval_data")
    return maker.make_eval_dataset(None)


class Results:
    """Finished runs by key, in a JSON file that is replaced whole after each of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}

    def run(self, jobs: Iterable[Job], workers: int) -> None:
        """Train what is not known yet, `workers` at a time, saying how it goes."""
        todo = [job for job in jobs if job.key not in self.known]
        if not todo:
            return
        if workers == 0:
            self._take(todo, map(train, todo))
            return
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            self._take(todo, pool.map(train, todo))

    def _take(self, jobs: list[Job], results: Iterable[dict[str, float]]) -> None:
        for job, found in zip(jobs, results, strict=True):
            self.known[job.key] = found
            self._write()
            where = f"{job.name:<20} lr {job.lr:<8.3g} {job.steps:>5} steps, seed {job.seed}"
            print(f"{where}: {found['loss']:.4f} ({found['seconds']:.0f} s)", file=sys.stderr, flush=True)

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(self.known, indent=1))
        os.replace(fresh, self.path)

    def loss(self, job: Job) -> float:
        """The held-out loss of a finished run; a diverged one is infinitely bad."""
        found = self.known[job.key]["loss"]
        return found if math.isfinite(found) else math.inf


def tuned_rate(name: str, setting: Setting, results: Results, workers: int) -> tuple[float, dict[float, float]]:
    """The best learning rate of the grid, and the loss of each rate that was tried.

    The grid grows by factors of two, at most twice, while the best is at its edge.
    """
    factors = list(setting.baseline_grid if name == BASELINE else setting.grid)
    peak = OPTIMIZERS.get(name, {"lr": 1e-3})["lr"]
    for attempt in range(3):
        jobs = {factor: Job(name, peak * factor, setting.middle, TUNING_SEED, setting) for factor in factors}
        results.run(jobs.values(), workers)
        best = min(jobs, key=lambda factor: results.loss(jobs[factor]))
        if best not in (min(factors), max(factors)) or attempt == 2:
            break
        factors.append(best * 2 if best == max(factors) else best / 2)
    return jobs[best].lr, {jobs[factor].lr: results.loss(jobs[factor]) for factor in sorted(jobs)}


def steps_to(target: float, lengths: Iterable[int], losses: Iterable[float]) -> tuple[str, float]:
    """At how many steps the loss is `target`: as text ("<240", "312", ">540") and as a number, linear in log(steps) between lengths."""
    points = list(zip(lengths, losses, strict=True))
    if points[0][1] < target:
        return f"<{points[0][0]}", math.nan
    for (a, before), (b, after) in pairwise(points):
        if before >= target >= after:
            part = (before - target) / (before - after) if before > after else 0.0
            steps = math.exp(math.log(a) + part * (math.log(b) - math.log(a)))
            return f"{steps:.0f}", steps
    return f">{points[-1][0]}", math.nan


class Row(NamedTuple):
    """What is known of one optimizer."""

    name: str
    lr: float
    losses: dict[int, list[float]]  # by length, one for each seed
    sweep: dict[float, float] = {}  # noqa: RUF012  by learning rate, of the tuning seed at the middle length
    win_rate: float | None = None  # Sophia's: the share of weights whose step is not clipped, over the scored runs

    def steps(self, target: float) -> list[float]:
        """The steps to the target of each seed by itself; not a number where it is beyond the lengths."""
        lengths = sorted(self.losses)
        return [steps_to(target, lengths, run)[1] for run in zip(*(self.losses[n] for n in lengths), strict=True)]


def measure(names: list[str], setting: Setting, seeds: int, results: Results, workers: int) -> list[Row]:
    """Tune and train each optimizer."""
    rows = []
    for name in names:
        lr, sweep = tuned_rate(name, setting, results, workers)
        jobs = {steps: [Job(name, lr, steps, seed, setting) for seed in range(seeds)] for steps in setting.lengths}
        results.run((job for some in jobs.values() for job in some), workers)
        losses = {steps: [results.loss(job) for job in some] for steps, some in jobs.items()}
        won = [results.known[job.key].get("win_rate") for some in jobs.values() for job in some]
        rates = [rate for rate in won if rate is not None]
        rows.append(Row(name, lr, losses, sweep, statistics.mean(rates) if rates else None))
    return rows


class Comparison:
    """The rows against the baseline by the rule."""

    def __init__(self, rows: list[Row], setting: Setting) -> None:
        self.rows, self.setting = rows, setting
        self.base = next(row for row in rows if row.name == BASELINE)
        self.seeds = len(self.base.losses[setting.middle])
        self.target = statistics.mean(self.base.losses[setting.middle])
        self.steps = {row.name: row.steps(self.target) for row in rows}
        self.sigma = self._pooled([row.losses[setting.middle] for row in rows])
        self.step_sigma = self._pooled([list(map(math.log, s)) for s in self.steps.values() if not any(map(math.isnan, s))])

    def _pooled(self, samples: list[list[float]]) -> float:
        """The deviation over seeds; not a number for one seed."""
        if self.seeds < 2 or not samples:
            return math.nan
        return math.sqrt(statistics.mean(map(statistics.variance, samples)))

    def limit(self, sigma: float) -> float:
        """From which difference of two means on it counts."""
        return Z * sigma * math.sqrt(2 / self.seeds)

    def loss_verdict(self, row: Row) -> str:
        """What may be said of a row's mean loss at the middle length."""
        gain = self.target - statistics.mean(row.losses[self.setting.middle])
        return "the baseline" if row is self.base else verdict_of(gain, self.limit(self.sigma))

    def ratio(self, row: Row) -> float:
        """Its steps to the target over the baseline's, geometric means over seeds; not a number beyond the lengths."""
        mine, theirs = (statistics.mean(math.log(s) for s in self.steps[name]) for name in (row.name, BASELINE))
        return math.exp(mine - theirs)

    def step_verdict(self, row: Row) -> str:
        """What may be said of a row's steps to the target."""
        if row is self.base:
            return "the baseline"
        if math.isnan(self.ratio(row)) or math.isnan(self.ratio(self.base)):
            return "beyond the lengths"
        words = {"better": "fewer", "worse": "more"}
        verdict = verdict_of(-math.log(self.ratio(row)), self.limit(self.step_sigma))
        return words.get(verdict, verdict)


def table(rows: list[Row], setting: Setting) -> Iterator[str]:
    """Markdown lines: the comparison, how it was made, what may be said of it, and the rates that were tried."""
    found = Comparison(rows, setting)
    heads = (f"steps to {found.target:.3f}", f"× {BASELINE}", "steps", f"loss after {setting.middle} steps", "loss")
    yield f"| optimizer | learning rate | {' | '.join(heads)} |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        text, _ = steps_to(found.target, setting.lengths, [statistics.mean(row.losses[n]) for n in setting.lengths])
        ratio = "" if math.isnan(found.ratio(row)) else f"{found.ratio(row):.2f}"
        mean = statistics.mean(row.losses[setting.middle])
        verdicts = found.step_verdict(row), found.loss_verdict(row)
        yield f"| `{row.name}` | {row.lr:.2g} | {text} | {ratio} | {verdicts[0]} | {mean:.4f} | {verdicts[1]} |"
    size = f"{setting.layers} layers, width {setting.width}, context {setting.context}, batch {setting.batch}"
    by = f"{Z}·σ·√(2/{found.seeds})"
    least = math.expm1(found.limit(found.step_sigma))
    yield ""
    yield (
        f"GPT of {size}, bytes of Python's standard library, {found.seeds} seeds, lengths {', '.join(map(str, setting.lengths))}, "
        f"gradients clipped to 1. Deviation over seeds of the loss σ = {found.sigma:.4f}; a difference counts from {by} = "
        f"{found.limit(found.sigma):.4f} on. Of the logarithm of the steps σ = {found.step_sigma:.4f}; a ratio counts from "
        f"{100 * least:.0f} % more or {100 * least / (1 + least):.0f} % fewer steps on."
    )
    yield ""
    yield from words(found)
    if any(row.sweep for row in rows):
        yield ""
        yield f"Rates that were tried, with a seed of their own at {setting.middle} steps, and the loss on held-out text in nats per byte:"
        yield ""
        yield "| optimizer | |"
        yield "| --- | --- |"
        for row in rows:
            tried = (f"**{lr:.2g}: {loss:.3f}**" if lr == row.lr else f"{lr:.2g}: {loss:.3f}" for lr, loss in row.sweep.items())
            yield f"| `{row.name}` | {' · '.join(tried)} |"


def words(found: Comparison) -> Iterator[str]:
    """What the numbers say, by the rule, and what they do not."""
    said: dict[str, list[str]] = {}
    for row in found.rows:
        ratio = found.ratio(row)
        shown = f"`{row.name}`" if math.isnan(ratio) else f"`{row.name}` ({ratio:.2f} times as many)"
        said.setdefault(found.step_verdict(row), []).append(shown)
    sentences = []
    for verdict, start in (
        ("fewer", f"Fewer steps than `{BASELINE}` took"),
        ("more", "More took"),
        ("no difference", "No difference was shown, which is not to say that there is none, for"),
        ("beyond the lengths", "Some seeds' steps lie beyond the lengths, so nothing is said of the steps, for"),
    ):
        if verdict in said:
            sentences.append(f"{start} {', '.join(said[verdict])}.")
    yield " ".join(sentences)
    for row in found.rows:
        if row.win_rate is not None:
            yield (
                f"The win rate of `{row.name}`, the share of weights whose step is not clipped, was {row.win_rate:.2f} on average; "
                "its paper wants 0.1 to 0.5."
            )
    yield (
        "All of this is about models as small and runs as short as these. How long a step takes is not compared: `muon` and `sophia` do "
        "more work in one. The papers of `lion` and `sophia` claim their gains for runs hundreds of times longer and with larger "
        "batches, of which nothing here says anything."
    )


def verdict_of(gain: float, limit: float) -> str:
    """What may be said of a mean that is lower than the baseline's by `gain`; nothing without a known limit."""
    return "better" if gain >= limit else "worse" if -gain >= limit else "no difference"


def record(rows: list[Row], setting: Setting) -> dict[str, Any]:
    """What the page is made of, as plain data."""
    versions = {name: _version(name) for name in ("torch", "bitsandbytes")}
    return {"setting": setting._asdict(), "versions": versions, "rows": [row._asdict() for row in rows]}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def recorded(path: Path) -> tuple[list[Row], Setting]:
    """What `record` gave."""
    saved = json.loads(path.read_text())
    setting = Setting(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved["setting"].items()})
    rows = []
    for row in saved["rows"]:
        losses = {int(steps): values for steps, values in row["losses"].items()}
        rows.append(Row(**{**row, "losses": losses, "sweep": {float(lr): loss for lr, loss in row["sweep"].items()}}))
    return rows, setting


def write(document: Path, lines: Iterable[str]) -> None:
    """Put the lines between the document's marks, which are added at its end where they are missing."""
    text = document.read_text(encoding="utf-8") if document.is_file() else _TITLE
    if _START not in text:
        text = f"{text.rstrip()}\n\n{_START}\n{_END}\n"
    before, _, rest = text.partition(_START)
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(f"{before}{_START}\n\n" + "\n".join(lines) + f"\n\n{_END}{rest.partition(_END)[2]}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="optimizers; by default those of the table above that are installed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each; 0: in this process"
    )
    parser.add_argument("--results", type=Path, default=Path("runs/optimizers.json"), help="where finished runs are kept")
    parser.add_argument("--document", type=Path, default=Path("docs/optimizers.md"), help="where the table goes")
    parser.add_argument("--record", type=Path, default=Path("docs/optimizers.json"), help="where the page's numbers go")
    parser.add_argument("--text", action="store_true", help="train nothing: write the page from the record")
    parser.add_argument("--tiny", action="store_true", help="a toy size, to see the script work")
    given = parser.parse_args(arguments)
    from drivetrain import is_installed

    if given.text:
        rows, setting = recorded(given.record)
    else:
        setting = TINY if given.tiny else Setting()
        names = given.names or [name for name in OPTIMIZERS if is_installed("optimizer", name)]
        names = [BASELINE, *(name for name in names if name != BASELINE)]
        rows = measure(names, setting, given.seeds, Results(given.results), given.jobs)
        given.record.parent.mkdir(parents=True, exist_ok=True)
        given.record.write_text(json.dumps(record(rows, setting), indent=1) + "\n")
    lines = list(table(rows, setting))
    print("\n".join(lines))
    write(given.document, lines)


if __name__ == "__main__":
    main()
